"""A run's folder, read for a report: whatever of it is there, and in words what is not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from clients.storage import IMAGES_FILE
from strategies.records import DeviceRecord
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, TapflError
from tapfl.pruning.plan import PruningPlan, read_plan
from tapfl.pruning.surgery import require_fitting
from tapfl.store import RunFolder, read_about

WHOLE, NUMBER, TEXT, SIZES = "whole", "number", "text", "sizes"  # what a value is
NEEDED = {  # what a line of metrics.jsonl must have to be of use, by kind
    "device": {
        "round": WHOLE,
        "device": WHOLE,
        "global_accuracy": NUMBER,
        "personal_accuracy": NUMBER,
        "alpha": NUMBER,
    },
    "round": {
        "round": WHOLE,
        "devices": WHOLE,
        "simulated_seconds": NUMBER,
        "bytes_up": NUMBER,
        "bytes_down": NUMBER,
    },
    "traffic": {
        "phase": TEXT,
        "round": WHOLE,
        "device": WHOLE,
        "down": SIZES,
        "up": SIZES,
        "simulated_seconds": NUMBER,
    },
    "failure": {"phase": TEXT, "device": WHOLE, "reason": TEXT},
    "absence": {"round": WHOLE, "device": WHOLE, "reason": TEXT},
}
SUMMARY = {  # what a report takes from summary.json, if it is there
    "simulated_seconds": NUMBER,
    "personal_accuracy_worst_decile": NUMBER,
    "full_model_bytes": NUMBER,
    "epsilon": NUMBER,
    "seconds": SIZES,
}
RECORD = TypeAdapter(DeviceRecord)
LARGEST = 2**63  # what is above is no count of anything

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
    """Returns what a run has left in its folder; a file of it that is damaged, or a link out of it, is none.

    Raises:
        ConfigError: if the folder holds no run.
    """
    path = path.absolute()
    config = _options(path)
    missing: list[str] = []
    summary = _json(path, "summary.json")
    devices = _records(summary.pop("devices", None))
    if devices is None or not _has(summary, SUMMARY, optional=True):
        summary, devices = {}, []
    wanted = rounds = int(config["train.rounds"])
    if not summary:
        rounds, devices = _checkpoint(path)
        state = f"after round {rounds} of {wanted}" if devices else "before the first round"
        missing.append(f"The run is not finished (it has no whole summary.json): what follows is as of {state}.")
    devices = sorted(devices, key=lambda record: record["device"])
    ids = [record["device"] for record in devices]
    lines, bad = _lines(path, "metrics.jsonl")
    if bad:
        missing.append(f"{bad} lines of metrics.jsonl are not whole and were left out.")
    if not lines:
        missing.append("metrics.jsonl is missing or empty: there are no curves, no times and no list of faults.")
    timing = _json(path, "timing.json")
    if not all(_is(timing.get(part, {}), SIZES) for part in ("seconds", "rounds")) or not all(
        round.isdecimal() for round in timing.get("rounds", {})
    ):
        timing = {}
    if not timing.get("seconds") and not summary.get("seconds"):
        missing.append("timing.json is missing: how long the run really took is not known.")
    versions = _json(path, "versions.json")
    if not versions:
        missing.append("versions.json is missing: it is not known with what the run was made.")
    folder = RunFolder(path)
    plans = _plans(path, [d["device"] for d in devices if d["params"]], missing)
    images = _counts(path, {i: folder.device(i) / IMAGES_FILE for i in ids}, ("train", "test"))
    metric_sets = _counts(path, {i: folder.metric_set(i) for i in plans}, ("metric", "pool"))
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
    """Returns the options of the run, and the defaults of those that a report needs and the run did not have."""
    found, defaults = _json(path, "config.json"), RunConfig().flat()
    if not found or not all(isinstance(value, str | int | float | bool) for value in found.values()):
        raise ConfigError(f"report {path}: is not a run's folder, which has the run's options in its config.json")
    for option, kind in {"train.rounds": WHOLE, "personalize.alpha": NUMBER}.items():
        if not _is(found.setdefault(option, defaults[option]), kind):
            raise ConfigError(f"report {path}: config.json is damaged ({option} = {found[option]!r:.40})")
    return found


def _text(path: Path, name: str) -> str:
    """Returns the text of a file of the run; none if it cannot be read, or is a link that leads out of the folder."""
    file = path / name
    try:
        return file.read_text("utf-8", "replace") if file.resolve().is_relative_to(path.resolve()) else ""
    except (OSError, RuntimeError):  # a link to itself, say
        return ""


def _parse(text: str) -> Any:
    """Returns JSON, of which all numbers are finite and all words can be written. Raises ValueError if it is none."""
    try:
        found = json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_whole)
        json.dumps(found, ensure_ascii=False).encode()  # no half of a pair of surrogates
    except RecursionError:
        raise ValueError("is nested too deep") from None
    return found


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


def _whole(text: str) -> int:
    if abs(number := int(text)) > LARGEST:
        raise ValueError(f"{text:.40} is no count")
    return number


def _json(path: Path, name: str) -> dict[str, Any]:
    """Returns a JSON object; an empty one where there is none."""
    try:
        found = _parse(_text(path, name))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is(value: object, kind: str) -> bool:
    if kind == SIZES:
        return isinstance(value, dict) and all(_is(each, NUMBER) for each in value.values())
    kinds = {WHOLE: (int,), NUMBER: (int, float), TEXT: (str,)}
    return isinstance(value, kinds[kind]) and not isinstance(value, bool)


def _has(values: dict[str, Any], needed: dict[str, str], optional: bool = False) -> bool:
    """Says whether all that is needed is there, and what it should be; `optional`: or not there."""
    return all(_is(values[name], kind) if values.get(name) is not None else optional for name, kind in needed.items())


def _records(content: object) -> list[dict[str, Any]] | None:
    """Returns the devices' records, older ones with what they lacked; None if one is none or there twice."""
    try:
        records = [RECORD.validate_json(json.dumps(each)).model_dump() for each in content]  # type: ignore[attr-defined]
    except (ValueError, TypeError):
        return None
    names_shares = all(not record["params"] or record["macs_share"] > 0 < record["params_share"] for record in records)
    return records if names_shares and len({record["device"] for record in records}) == len(records) else None


def _lines(path: Path, name: str) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines that are of use, and how many are not whole."""
    lines, bad = [], 0
    for text in _text(path, name).splitlines():
        try:
            line = _parse(text)
            needed = NEEDED.get(line["kind"])
            whole = needed is None or _has(line, needed)
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
            about = _parse(read_about(server.path(round))["checkpoint"])
            records = _records(about["records"])
        except (TapflError, ValueError, KeyError, TypeError):
            continue
        if records is not None and about.get("round") == round:
            return round, records
    return 0, []


def _plans(path: Path, ids: Iterable[int], missing: list[str]) -> dict[int, PruningPlan]:
    plans, without = {}, []
    for i in ids:
        name = f"plans/{i:02d}.json"
        try:
            if _text(path, name):
                plan = read_plan(path / name)
                require_fitting(plan)
                plans[i] = plan
        except TapflError:
            pass
        if i not in plans:
            without.append(i)
    if without:
        missing.append(f"The plans of {_named(without)} are missing or damaged (plans/NN.json).")
    return plans


def _counts(path: Path, files: dict[int, Path], parts: tuple[str, ...]) -> dict[int, Counts]:
    found = {i: _json(path, str(file.relative_to(path))) for i, file in files.items()}
    return {i: counts for i, counts in found.items() if _is_counts(counts, parts)}


def _is_counts(counts: dict[str, Any], parts: tuple[str, ...]) -> bool:
    names = counts.get("classes")
    return isinstance(names, list) and all(
        isinstance(counts.get(part), list)
        and len(counts[part]) == len(names)
        and all(_is(n, WHOLE) and n >= 0 for n in counts[part])
        for part in parts
    )


def _named(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:12])) + (f" and {len(ids) - 12} more" if len(ids) > 12 else "")
    return f"device {shown}" if len(ids) == 1 else f"devices {shown}"
