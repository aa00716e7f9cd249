"""Results of a sweep: measures per run and device as CSV, and a table of means over seeds for people."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.output import PACKAGES, as_markdown, caption
from experiments.statistics import TEST, paired
from experiments.sweep.grid import Point, SweepOptions, SweepRun, group_of, references
from strategies.records import SUMMARY, CurvePoint, Summary, read_summary
from strategies.simulation import first_at
from tapfl.errors import RunError
from tapfl.store import write_bytes

MEASURES = (
    "dense_accuracy",
    "pruned_accuracy",
    "global_accuracy",
    "personal_accuracy",
    "personal_accuracy_worst_decile",
    "bytes_up",
    "bytes_down",
    "simulated_seconds",
)
DEVICE_MEASURES = (
    "train_samples",
    "test_samples",
    "classes",
    "macs_share",
    "params_share",
    "dense_accuracy",
    "pruned_accuracy",
    "global_accuracy",
    "personal_accuracy",
)
BYTES_TO, SECONDS_TO = "bytes_to_", "seconds_to_"


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        point: its values along the axes of the grid, with the seed if that is an axis.
        options: all options of the run.
        versions: of the packages that the run used.
    """

    point: Mapping[str, Any]
    folder: Path
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    summary: Summary

    @property
    def group(self) -> Point:
        """The point without the seed."""
        return group_of(self.point)

    @property
    def curve(self) -> list[CurvePoint]:
        return self.summary.curve

    def measures(self, reach: Sequence[float]) -> dict[str, float | None]:
        """Returns `MEASURES`, the cost of round zero, and the cost after round zero of reaching each of `reach`.

        Bytes are those of all devices, up and down. An accuracy that was never reached has cost None; one that the
        pruned models had before the first round has cost 0. Round zero is listed apart because it dominates the traffic
        (backbone and pruned models) and is the same for all runs that share it.
        """
        start = self.curve[0]
        found: dict[str, float | None] = {name: getattr(self.summary, name) for name in MEASURES}
        found |= {"round_zero_bytes": start.bytes, "round_zero_seconds": start.seconds}
        for accuracy in reach:
            first = first_at(self.curve, accuracy)
            found[f"{BYTES_TO}{accuracy:g}"] = None if first is None else first.bytes - start.bytes
            found[f"{SECONDS_TO}{accuracy:g}"] = None if first is None else first.seconds - start.seconds
        return found

    def devices(self) -> list[dict[str, Any]]:
        """Returns one row for each device with a model: its data, its model's costs, accuracies, and bytes."""
        return [
            {
                "device": record.device,
                "budget": record.profile.budget,
                **{name: getattr(record, name) for name in DEVICE_MEASURES},
                "bytes_up": sum(record.bytes_up.values()),
                "bytes_down": sum(record.bytes_down.values()),
            }
            for record in self.summary.equipped
        ]


def outcomes(runs: Sequence[SweepRun], out: Path) -> list[Outcome]:
    """Returns the finished runs of a sweep, in their order in the file. Raises RunError if none is finished."""
    found = []
    for run in runs:
        folder = out / run.name
        if (folder / SUMMARY).is_file():
            config, versions = (json.loads((folder / name).read_text()) for name in ("config.json", "versions.json"))
            found.append(Outcome(run.point, folder, config, versions, read_summary(folder)))
    if not found:
        raise RunError(f"no run of the sweep in {out} is finished")
    return found


def grouped(runs: Iterable[Outcome]) -> dict[Point, list[Outcome]]:
    """Returns the runs that differ in their seed alone, by point of the grid."""
    groups: dict[Point, list[Outcome]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def personal_by_device(runs: Iterable[Outcome]) -> dict[Hashable, float]:
    """Returns the personal accuracy of each device, the mean over the runs' seeds."""
    devices = pd.DataFrame([record.model_dump() for run in runs for record in run.summary.equipped])
    means: dict[Hashable, float] = devices.groupby("device")["personal_accuracy"].mean().to_dict()
    return means


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
    _write_csv(rows, list(runs[0].measures(options.reach)), out / "results.csv")
    devices = [dict(run.point) | device for run in runs for device in run.devices()]
    _write_csv(devices, list(runs[0].devices()[0]), out / "devices.csv")
    return out / "results.csv"


def _write_csv(rows: Sequence[Mapping[str, Any]], last: Sequence[str], file: Path) -> None:
    """Writes the options in which runs differ, in the order in which they occur, and then the `last` columns."""
    table = pd.DataFrame(rows, dtype=object)
    write_bytes(file, table[[*table.columns.difference(last, sort=False), *last]].to_csv(index=False).encode())


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
    """Returns the caption of a sweep's table: command, seeds, options that all runs share, meaning of the columns."""
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
    """Returns backbone, devices and local training as text, as far as all runs agree on them."""
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
    """Writes the rows as a Markdown table, with their caption."""
    write_bytes(file, f"{as_markdown(rows)}\n{said[0].upper()}{said[1:]}\n".encode())
