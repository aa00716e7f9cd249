"""A sweep as tables: a line a run and a line a device as CSV, and means over seeds for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.output import PACKAGES, as_csv, as_markdown, caption
from experiments.statistics import TEST, paired
from experiments.sweep.outcome import BYTES_TO, SECONDS_TO, Outcome, Point, grouped, personal_by_device
from experiments.sweep.settings import SweepOptions, references
from tapfl.store import write_bytes

LABELS = {
    "dense_accuracy": "dense",
    "pruned_accuracy": "pruned",
    "global_accuracy": "global",
    "personal_accuracy": "personal",
    "personal_accuracy_worst_decile": "worst decile",
    "bytes_up": "up",
    "bytes_down": "down",
    "simulated_seconds": "time",
    "round_zero_bytes": "bytes of round zero",
    "round_zero_seconds": "time of round zero",
}


def write_results(runs: Sequence[Outcome], out: Path, options: SweepOptions) -> Path:
    """Writes `results.csv`, a line a run, and `devices.csv`, a line a run and device; returns the first's path."""
    rows = [dict(run.point) | run.measures(options.reach) for run in runs]
    measures = list(runs[0].measures(options.reach))
    write_bytes(out / "results.csv", as_csv(rows, _columns(rows, measures)))
    devices = [dict(run.point) | device for run in runs for device in run.devices()]
    write_bytes(out / "devices.csv", as_csv(devices, _columns(devices, list(runs[0].devices()[0]))))
    return out / "results.csv"


def _columns(rows: Sequence[Mapping[str, Any]], last: Sequence[str]) -> list[str]:
    """Where runs differ in other options than others do, the columns are those of all; `last` ones come last."""
    return [*dict.fromkeys(key for row in rows for key in row if key not in last), *last]


def means_over_seeds(runs: Sequence[Outcome], options: SweepOptions) -> list[Mapping[str, str]]:
    """Returns a row for each point of the grid without its seed.

    Accuracies are mean ± sample standard deviation, where there are several runs; the rest are means. With a reference,
    each point that has one is tested against it: mean difference of the devices' personal accuracies, p and devices.
    """
    groups = grouped(runs)
    against = references(groups, options.reference)
    rows: list[dict[str, str]] = []
    for point, found in groups.items():
        row = {key: str(value) for key, value in point} | {"runs": str(len(found))}
        measured = [run.measures(options.reach) for run in found]
        row |= {_label(name): _shown(name, [m[name] for m in measured]) for name in measured[0]}
        if options.reference:
            row |= _tested(groups, point, against.get(point))
        rows.append(row)
    axes = dict.fromkeys(key for point in groups for key, _ in point)
    return [{**dict.fromkeys(axes, ""), **row} for row in rows]


def _label(measure: str) -> str:
    if measure.startswith(BYTES_TO):
        return f"bytes to {measure.removeprefix(BYTES_TO)}"
    return LABELS.get(measure) or f"time to {measure.removeprefix(SECONDS_TO)}"


def _shown(measure: str, values: Sequence[float | None]) -> str:
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return "never"
    some = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    if "bytes" in measure:
        return f"{known.mean() / 1e6:.2f} MB{some}"
    if measure.endswith("seconds") or measure.startswith(SECONDS_TO):
        return f"{known.mean():.3g} s{some}"
    return f"{known.mean():.3f}" + (f" ± {known.std(ddof=1):.3f}" if len(known) > 1 else "")


def _tested(groups: Mapping[Point, Sequence[Outcome]], point: Point, reference: Point | None) -> dict[str, str]:
    if reference is None:
        return {"difference": "", "p": ""}
    found = paired(personal_by_device(groups[point]), personal_by_device(groups[reference]))
    return {"difference": f"{found.difference:+.3f}", "p": f"{found.p:.2g} (n = {found.n})"}


def caption_of(runs: Sequence[Outcome], made_by: str, options: SweepOptions) -> str:
    """Returns what stands under a sweep's table: command, seeds, what the runs share, what the columns are."""
    about = [setting_of(runs), "bytes of all devices, time simulated; up, down and time with round zero"]
    if options.reach:
        about.append("to an accuracy: bytes up and down, and time, after round zero")
    if any(len(found) > 1 for found in grouped(runs).values()):
        about.append("mean ± sd over seeds")
    if options.reference:
        values = ", ".join(f"{key} = {value}" for key, value in options.reference.items())
        about.append(f"difference in personal accuracy from {values} and its p: {TEST}")
    same = _common(run.versions for run in runs)
    versions = {name: same[name] for name in PACKAGES if name in same}
    return caption(made_by, (int(run.options["seed"]) for run in runs), versions, about)


def setting_of(runs: Sequence[Outcome]) -> str:
    """Returns backbone, devices and local work in words, as far as all runs agree on them."""
    same = _common(run.options for run in runs)
    words = {
        "model.name": "{}",
        "model.args": "({})",
        "pruning.criterion": "criterion {}",
        "devices.budgets": "budgets {}",
        "devices.count": "{} devices",
        "train.rounds": "rounds: {}",
        "train.epochs": "local epochs: {}",
    }
    return ", ".join(form.format(same[key]) for key, form in words.items() if same.get(key, "") != "").replace(
        ", (", " ("
    )


def _common(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = tables
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def write_table(rows: Sequence[Mapping[str, str]], said: str, file: Path) -> None:
    """Writes Markdown: the rows, and under them how they came about."""
    write_bytes(file, f"{as_markdown(rows)}\n{said[0].upper()}{said[1:]}\n".encode())
