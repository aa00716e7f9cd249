"""The tables of the page, as text; numbers say what they are right-aligned for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.figures.page import Table
from experiments.output import count, size
from experiments.report import series
from experiments.report.reading import Run
from tapfl.config import RunConfig

PLACE = {"out", "resume", "cache", "devices.count"}  # options that say where, or are set by every run


def devices(run: Run) -> Table:
    """Returns a line a device: what it has, what it got, and what came of it."""
    columns = (
        *("device", "profile", "images", "classes", "budget", *_dense(run)),
        *("dense", "pruned", "global", "personal", "gain", "α", "up", "down"),
    )
    rows = [_device(run, device) for device in run.devices]
    named = any(row[1] for row in rows)
    keep = [k for k in range(len(columns)) if named or k != 1]
    return Table(
        [columns[k] for k in keep],
        [[row[k] for k in keep] for row in rows],
        keys=[device["device"] for device in run.devices],
        words=frozenset({1}) if named else frozenset(),
        note="images: training + test; gain: of personal over pruned.",
    )


def _dense(run: Run) -> list[str]:
    """Returns the heads of the columns of costs, which say those of the dense model."""
    first = next(iter(run.equipped), None)
    if first is None:
        return ["MACs", "params"]
    return [
        f"{title}, of {count(first[name] / first[f'{name}_share'])}"
        for title, name in (("MACs", "macs"), ("params", "params"))
    ]


def _device(run: Run, device: Mapping[str, Any]) -> list[str]:
    profile = device["profile"]
    head = [
        str(device["device"]),
        str(profile.get("name") or ""),
        f"{device['train_samples']} + {device['test_samples']}",
        str(device["classes"] or "?"),
        str(profile["budget"]),
    ]
    traffic = [size(series.total_bytes(device, side)) for side in ("bytes_up", "bytes_down")]
    if not device["params"]:
        return [*head, *["–"] * 8, *traffic]
    scores = [series.accuracy(device, stage) for stage in series.STAGES]
    mixes = run.config.get("personalize.method") == "apfl" and device["rounds"]
    return [
        *head,
        f"{count(device['macs'])}, {device['macs_share']:.1%}",
        f"{count(device['params'])}, {device['params_share']:.0%}",
        *("–" if score is None else f"{score:.3f}" for score in scores),
        f"{series.gain(device):+.3f}",
        f"{device['alpha']:.3f}" if mixes else "–",
        *traffic,
    ]


def events(run: Run) -> Table:
    """Returns what did not come through, alike ones in one line."""
    rows = [
        [
            str(row["what"]),
            str(row["where"]) + (f" {_some(row['rounds'])}" if row["rounds"] else ""),
            str(row["times"]),
            _some(row["devices"]),
            str(row["reason"]),
        ]
        for row in series.events(run)
    ]
    return Table(("what", "where", "times", "devices", "reason"), rows, words=frozenset({0, 1, 3, 4}))


def changed_options(run: Run) -> Table:
    """Returns the options whose values are not the defaults, with these."""
    defaults = RunConfig().flat()
    rows = [
        [name, shown_option(value), shown_option(defaults[name]) if name in defaults else "(not an option now)"]
        for name, value in run.config.items()
        if name not in PLACE and defaults.get(name) != value
    ]
    return Table(("option", "value", "default"), rows, words=frozenset({0, 1, 2}))


def options(run: Run) -> Table:
    """Returns all options."""
    rows = [[name, shown_option(value)] for name, value in run.config.items()]
    return Table(("option", "value"), rows, words=frozenset({0, 1}))


def versions(run: Run) -> Table:
    """Returns with what the run was made."""
    rows = [[name, str(version)] for name, version in run.versions.items()]
    return Table(("package", "version"), rows, words=frozenset({0, 1}))


def shown_option(value: object) -> str:
    """Returns the value of an option; what is empty is said to be."""
    return str(value) if value != "" else "(empty)"


def _some(values: Sequence[object], most: int = 12) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return f"{shown}, … ({len(values)} in all)" if len(values) > most else shown
