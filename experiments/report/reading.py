"""A run's folder, read for a report: whatever of it is there, and in words what is not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.storage import IMAGES_FILE
from tapfl.errors import ConfigError, TapflError
from tapfl.pruning.plan import PruningPlan, read_plan
from tapfl.store import RunFolder, read_about

NEEDED = {  # what a line of metrics.jsonl must have to be of use, by kind
    "device": {"round", "device", "global_accuracy", "personal_accuracy", "alpha"},
    "round": {"round", "devices", "simulated_seconds", "bytes_up", "bytes_down"},
    "traffic": {"phase", "round", "device", "down", "up", "simulated_seconds"},
    "failure": {"phase", "device", "reason"},
    "absence": {"round", "device", "reason"},
}

Counts = dict[str, list[Any]]  # "classes": their names, and beside them lists of how many images each has


@dataclass(frozen=True)
class Run:
    """What lies in a run's folder; what does not is empty here, and named in `missing`.

    Attributes:
        config: all options, dotted.
        summary: the content of summary.json without its devices.
        lines: those of metrics.jsonl, in order.
        devices: a record each, as summary.json has them, by partition id; of a run that goes on, from its checkpoint.
        plans, images, metric_sets: by partition id.
        rounds: how many are done.
        missing: a sentence for everything that a report would have shown and cannot.
    """

    path: Path
    config: dict[str, Any]
    versions: dict[str, str]
    summary: dict[str, Any]
    timing: dict[str, dict[str, float]]
    lines: list[dict[str, Any]]
    devices: list[dict[str, Any]]
    plans: dict[int, PruningPlan]
    images: dict[int, Counts]
    metric_sets: dict[int, Counts]
    rounds: int
    missing: list[str]

    @property
    def equipped(self) -> list[dict[str, Any]]:
        """The devices that got a model: only of these there is an accuracy."""
        return [device for device in self.devices if device["params"]]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl of one kind, in order."""
        return [line for line in self.lines if line["kind"] == kind]


def read_run(path: Path) -> Run:
    """Returns what a run has left in its folder.

    Raises:
        ConfigError: if the folder holds no run.
    """
    path = path.absolute()
    config = _options(path)
    missing: list[str] = []
    summary = _json(path / "summary.json")
    devices = summary.pop("devices", [])
    wanted, rounds = int(config.get("train.rounds", 0)), int(config.get("train.rounds", 0))
    if not summary:
        rounds, devices = _checkpoint(path)
        state = f"after round {rounds} of {wanted}" if devices else "before the first round"
        missing.append(f"The run is not finished (it has no whole summary.json): what follows is as of {state}.")
    devices = sorted(devices, key=lambda record: record["device"])
    ids = [record["device"] for record in devices]
    lines, bad = _lines(path / "metrics.jsonl")
    if bad:
        missing.append(f"{bad} lines of metrics.jsonl are not whole and were left out.")
    if not lines:
        missing.append("metrics.jsonl is missing or empty: there are no curves, no times and no list of faults.")
    timing = _json(path / "timing.json")
    if not timing.get("seconds") and not summary.get("seconds"):
        missing.append("timing.json is missing: how long the run really took is not known.")
    versions = _json(path / "versions.json")
    if not versions:
        missing.append("versions.json is missing: it is not known with what the run was made.")
    folder = RunFolder(path)
    plans = _plans(path / "plans", [d["device"] for d in devices if d["params"]], missing)
    images = _counts({i: folder.device(i) / IMAGES_FILE for i in ids}, ("train", "test"))
    metric_sets = _counts({i: folder.metric_set(i) for i in plans}, ("metric", "pool"))
    if without := [i for i in ids if i not in images]:
        where = f"of {_named(without)} " if images else ""
        missing.append(
            f"The class counts {where}are missing (devices/NN/{IMAGES_FILE}): they stay on the devices, and are here "
            "only if those were simulated, in this run."
        )
    if without := [i for i in plans if i not in metric_sets]:
        where = f"of {_named(without)} " if metric_sets else ""
        missing.append(f"The metric sets {where}are missing (metric-sets/NN.json): those plans were made elsewhere.")
    return Run(path, config, versions, summary, timing, lines, devices, plans, images, metric_sets, rounds, missing)


def _options(path: Path) -> dict[str, Any]:
    found = _json(path / "config.json")
    if not found or not all(isinstance(value, str | int | float | bool) for value in found.values()):
        raise ConfigError(f"report {path}: is not a run's folder, which has the run's options in its config.json")
    return found


def _json(file: Path) -> dict[str, Any]:
    """Returns a JSON object; an empty one where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines that are of use, and how many are not whole."""
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [], 0
    lines, bad = [], 0
    for text in texts:
        try:
            line = json.loads(text)
            needed = NEEDED.get(line["kind"])
            whole = needed is None or needed <= line.keys()
        except (ValueError, KeyError, TypeError, AttributeError):
            whole, needed = False, None
        if not whole:
            bad += 1
        elif needed:
            lines.append(line)
    return lines, bad


def _checkpoint(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Returns the round of the last checkpoint and its records, or 0 and none."""
    server = RunFolder(path).server
    for round in reversed(server.rounds()):
        try:
            about = json.loads(read_about(server.path(round))["checkpoint"])
            return int(about["round"]), list(about["records"])
        except (TapflError, ValueError, KeyError, TypeError):
            continue
    return 0, []


def _plans(folder: Path, ids: Iterable[int], missing: list[str]) -> dict[int, PruningPlan]:
    plans, without = {}, []
    for i in ids:
        try:
            plans[i] = read_plan(folder / f"{i:02d}.json")
        except TapflError:
            without.append(i)
    if without:
        missing.append(f"The plans of {_named(without)} are missing or damaged (plans/NN.json).")
    return plans


def _counts(files: dict[int, Path], parts: tuple[str, ...]) -> dict[int, Counts]:
    found = {i: _json(file) for i, file in files.items()}
    return {i: counts for i, counts in found.items() if _is_counts(counts, parts)}


def _is_counts(counts: dict[str, Any], parts: tuple[str, ...]) -> bool:
    names = counts.get("classes")
    return isinstance(names, list) and all(
        isinstance(counts.get(part), list)
        and len(counts[part]) == len(names)
        and all(isinstance(n, int) for n in counts[part])
        for part in parts
    )


def _named(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:12])) + (f" and {len(ids) - 12} more" if len(ids) > 12 else "")
    return f"device {shown}" if len(ids) == 1 else f"devices {shown}"
