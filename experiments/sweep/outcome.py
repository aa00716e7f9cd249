"""A finished run of a sweep, and what it is measured by."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.statistics import by_device
from experiments.sweep.grid import SweepRun
from strategies.records import SUMMARY, CurvePoint, Summary, read_summary
from strategies.simulated import first_at
from tapfl.errors import RunError

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

Point = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        point: where it lies in the grid, its seed too if that is an axis.
        folder: the run's.
        options: all of the run's, as resolved.
        versions: of the packages it was made with.
    """

    point: Mapping[str, Any]
    folder: Path
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    summary: Summary

    @property
    def group(self) -> Point:
        """Where the run lies in the grid but for its seed."""
        return group_of(self.point)

    @property
    def curve(self) -> list[CurvePoint]:
        return self.summary.curve

    def measures(self, reach: Sequence[float]) -> dict[str, float | None]:
        """Returns `MEASURES`, what round zero cost of them, and what each accuracy of `reach` cost after it.

        Bytes are those of all devices, up and down. An accuracy that was never reached has None; one that the smaller
        models had before any round, 0. Round zero is apart because it is the same for all that differ after it, and
        most of what is sent: the backbone, and the smaller models.
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
        """Returns for every device that got a model what it has, what it gained, and what it sent and received."""
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


def group_of(point: Mapping[str, Any]) -> Point:
    return tuple((key, value) for key, value in point.items() if key != "seed")


def outcomes(cells: Sequence[SweepRun], out: Path) -> list[Outcome]:
    """Returns the finished runs of a sweep, in the order of its cells. Raises RunError if there is none."""
    found = []
    for cell in cells:
        folder = out / cell.name
        if (folder / SUMMARY).is_file():
            config, versions = (json.loads((folder / name).read_text()) for name in ("config.json", "versions.json"))
            found.append(Outcome(cell.point, folder, config, versions, read_summary(folder)))
    if not found:
        raise RunError(f"no run of the sweep in {out} came to its end")
    return found


def grouped(runs: Iterable[Outcome]) -> dict[Point, list[Outcome]]:
    """Returns the runs that differ in their seed alone, by point of the grid."""
    groups: dict[Point, list[Outcome]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def personal_by_device(runs: Iterable[Outcome]) -> dict[Hashable, float]:
    """Returns the personal accuracy of each device, the mean over the runs' seeds."""
    return by_device((row["device"], row["personal_accuracy"]) for run in runs for row in run.devices())
