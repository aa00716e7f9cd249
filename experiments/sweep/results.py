"""Results of a sweep: measures of runs and devices as CSV, and a table of means over seeds."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.output import PACKAGES, as_csv, as_markdown, caption, versions_of
from experiments.statistics import CORRECTED, TEST, corrected, paired
from experiments.sweep.grid import Point, SweepOptions, SweepRun, group_of, references
from strategies.records import SUMMARY, CurvePoint, Summary, first_at, read_summary
from tapfl.run_folder import RunFolder
from tapfl.store import write_bytes

MEASURES = {  # fields of a run's summary, with their titles in the table
    "dense_accuracy": "dense",
    "pruned_accuracy": "pruned",
    "global_accuracy": "global",
    "personal_accuracy": "personal",
    "personal_accuracy_worst_decile": "worst decile",
    "bytes_up": "up",
    "bytes_down": "down",
    "simulated_seconds": "time",
}
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


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        point: its values along the axes of the grid; they include the seed if that is an axis.
        versions: the versions of the packages that the run used.
    """

    point: Mapping[str, Any]
    folder: Path
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    summary: Summary

    @property
    def group(self) -> Point:
        return group_of(self.point)

    @property
    def curve(self) -> list[CurvePoint]:
        return self.summary.curve

    def measures(self, reach: Sequence[float]) -> dict[str, float | None]:
        """Returns `MEASURES`, accuracies of references, the cost of round zero, and the further cost to `reach`.

        Bytes are those of all devices, up and down. The cost to an accuracy is None if it was never reached, and 0 if
        the pruned models had it before the first round. Round zero is separate, because it dominates the traffic
        (backbone and pruned models) and is the same for all runs that share it.
        """
        start = self.curve[0]
        row: dict[str, float | None] = {name: getattr(self.summary, name) for name in MEASURES}
        row |= {f"{name}_accuracy": value for name, value in (self.summary.reference_accuracies or {}).items()}
        row |= {"round_zero_bytes": start.bytes, "round_zero_seconds": start.seconds}
        for accuracy in reach:
            first = first_at(self.curve, accuracy)
            row[f"bytes_to_{accuracy:g}"] = None if first is None else first.bytes - start.bytes
            row[f"seconds_to_{accuracy:g}"] = None if first is None else first.seconds - start.seconds
        return row

    def devices(self) -> list[dict[str, Any]]:
        """Returns one row for each device with a model: its data, the costs of its model, accuracies and bytes."""
        return [
            {
                "device": record.device,
                "budget": record.profile.budget,
                **{name: getattr(record, name) for name in DEVICE_MEASURES},
                **{f"{name}_accuracy": value for name, value in (record.reference_accuracies or {}).items()},
                "bytes_up": sum(record.bytes_up.values()),
                "bytes_down": sum(record.bytes_down.values()),
            }
            for record in self.summary.equipped
        ]


def outcomes(runs: Sequence[SweepRun], out: Path) -> list[Outcome]:
    """Returns the finished runs of a sweep, in the order of the file."""
    found = []
    for run in runs:
        folder = out / run.name
        if (folder / "config.json").is_file() and (folder / SUMMARY).is_file():
            options = RunFolder(folder).config()
            found.append(Outcome(run.point, folder, options, versions_of(folder), read_summary(folder)))
    return found


def grouped(runs: Iterable[Outcome]) -> dict[Point, list[Outcome]]:
    """Returns the runs that differ only in their seed, by point of the grid."""
    groups: dict[Point, list[Outcome]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def write_results(runs: Sequence[Outcome], out: Path, options: SweepOptions) -> None:
    """Writes `results.csv`, with one line per run, and `devices.csv`, with one line per run and device."""
    results = [(run.point, run.measures(options.reach)) for run in runs]
    devices = [(run.point, device) for run in runs for device in run.devices()]
    axes = list(dict.fromkeys(key for run in runs for key in run.point))
    for name, lines in (("results.csv", results), ("devices.csv", devices)):
        columns = dict.fromkeys([*axes, *(key for _, line in lines for key in line)])
        write_bytes(out / name, as_csv([{**point, **line} for point, line in lines], [*columns]))


def means_over_seeds(runs: Sequence[Outcome], options: SweepOptions) -> list[Mapping[str, str]]:
    """Returns one row for each point of the grid, over its seeds.

    Accuracies are mean ± sample standard deviation over the runs; other values are means. Each point that has a
    reference is tested against it: mean difference of the devices' personal accuracies, p, number of devices, and p
    after Holm's correction over all points with the same reference. Personal accuracies are also tested against those
    of the `personalize.references` of the same runs.
    """
    groups = grouped(runs)
    against = references(groups, options.reference)
    raw = {point: paired(_accuracies(groups[point]), _accuracies(groups[base])) for point, base in against.items()}
    tests = corrected(raw, against)
    axes = dict.fromkeys((key for point in groups for key, _ in point), "")
    rows: list[Mapping[str, str]] = []
    for point, alike in groups.items():
        table = pd.DataFrame([run.measures(options.reach) for run in alike], dtype=float)
        row = axes | {key: str(value) for key, value in point} | {"runs": str(len(alike))}
        row |= {_title(name): _shown(str(name), table[name]) for name in table}
        row |= {
            f"personal - {name}": str(paired(_accuracies(alike), _accuracies(alike, name)))
            for name in alike[0].summary.reference_accuracies or {}
        }
        if options.reference:
            row |= {"difference": "", "p": "", "Holm": ""}
        if test := tests.get(point):
            row |= {"difference": f"{test.difference:+.3f}", "p": f"{test.p:.2g} (n = {test.n})"}
            row |= {"Holm": f"{test.holm:.2g}"}
        rows.append(row)
    titles = dict.fromkeys(title for row in rows for title in row)
    return [{title: row.get(title, "") for title in titles} for row in rows]


def _title(measure: object) -> str:
    name = str(measure)
    if what := re.fullmatch("round_zero_(.*)", name):
        return f"{what[1].replace('seconds', 'time')} of round zero"
    return MEASURES.get(name) or name.removesuffix("_accuracy").replace("seconds", "time").replace("_", " ")


def _shown(measure: str, values: pd.Series[float]) -> str:
    known = values.dropna()
    if known.empty:
        return "never"
    some = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    if "bytes" in measure:
        return f"{known.mean() / 1e6:.2f} MB{some}"
    if "seconds" in measure:
        return f"{known.mean():.3g} s{some}"
    return f"{known.mean():.3f}" + (f" ± {known.std():.3f}" if len(known) > 1 else "")


def _accuracies(runs: Iterable[Outcome], model: str = "personal") -> dict[Hashable, float]:
    """Returns the accuracy of a model on each device, as the mean over the runs."""
    devices = pd.DataFrame([(r.device, r.accuracy_of(model)) for run in runs for r in run.summary.equipped])
    means: dict[Hashable, float] = devices.groupby(0)[1].mean().to_dict()
    return means


SETTING = {  # options that the caption names if all runs share them
    "model.name": "{}",
    "model.args": "({})",
    "pruning.criterion": "criterion {}",
    "devices.budgets": "budgets {}",
    "devices.count": "{} devices",
    "train.rounds": "rounds: {}",
    "train.epochs": "local epochs: {}",
}


def caption_of(runs: Sequence[Outcome], made_by: str, options: SweepOptions) -> str:
    """Returns the caption of a sweep's table: command, seeds, shared options, and the meaning of the columns."""
    same, versions = _common(run.options for run in runs), _common(run.versions for run in runs)
    setting = ", ".join(form.format(same[key]) for key, form in SETTING.items() if same.get(key, "") != "")
    about = [
        setting.replace(", (", " ("),
        "bytes of all devices, simulated time; up, down and time include round zero",
    ]
    if options.reach:
        about.append("to an accuracy: bytes up and down, and time, after round zero")
    if any(len(alike) > 1 for alike in grouped(runs).values()):
        about.append("mean ± sd over seeds")
    if options.reference:
        values = ", ".join(f"{key} = {value}" for key, value in options.reference.items())
        about.append(f"difference in personal accuracy from {values} and its p: {TEST}; {CORRECTED}")
    packages = {name: versions[name] for name in PACKAGES if name in versions}
    return caption(made_by, (int(run.options["seed"]) for run in runs), packages, about)


def _common(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = tables
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def write_table(rows: Sequence[Mapping[str, str]], text: str, file: Path) -> None:
    """Writes rows as a Markdown table with their caption."""
    write_bytes(file, f"{as_markdown(rows)}\n{text[0].upper()}{text[1:]}\n".encode())
