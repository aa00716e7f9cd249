"""Reads a run's folder for a report. What is missing or damaged is left out and described in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from clients.storage import ALPHAS_FILE, IMAGES_FILE
from experiments.output import versions_of
from strategies.records import (
    CLASSES,
    METRICS,
    SUMMARY,
    Count,
    DeviceRecord,
    Line,
    Record,
    Summary,
    read_classes,
    read_metrics,
    read_summary,
)
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, PlanError, TapflError
from tapfl.pruning.plan import PruningPlan, read_plan
from tapfl.pruning.surgery import require_fitting
from tapfl.run_folder import RunFolder
from tapfl.store import read_about

T = TypeVar("T")
L = TypeVar("L", bound=Line)

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
OPTIONS: TypeAdapter[dict[str, str | bool | int | float]] = TypeAdapter(
    dict[str, str | bool | int | float], config=STRICT
)


class Timing(Record):
    """`timing.json`: wall seconds by phase and by round."""

    seconds: dict[str, float] = Field(default_factory=dict)
    rounds: dict[int, float] = Field(default_factory=dict)


class ClassCounts(Record):
    """Numbers of images; every list has one count per class."""

    classes: list[str | int | float]

    @model_validator(mode="after")
    def _one_a_class(self) -> Self:
        if any(len(values) != len(self.classes) for values in vars(self).values() if isinstance(values, list)):
            raise ValueError("needs one count per class")
        return self

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.classes]


class Images(ClassCounts):
    """Counts of a device's own images; `ids` are the ids of their owners if the images were divided by owner."""

    train: list[Count]
    test: list[Count]
    ids: tuple[str, ...] = ()


class MetricSet(ClassCounts):
    """Counts of the public images chosen for a device, and of their pool; without labels there are no classes."""

    metric: list[Count]
    pool: list[Count]
    size: Count = 0  # number of images chosen; 0: the file is older than this field
    effective_size: float | None = None  # effective sample size (Kish); None: the device sent no mixture


class Alphas(Record):
    """Test accuracy of a device's interpolation at several α."""

    alpha: list[float]
    accuracy: list[float]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if not self.alpha or len(self.alpha) != len(self.accuracy):
            raise ValueError("needs one accuracy for each α")
        return self

    @property
    def best(self) -> float:
        """The α with the highest accuracy; if several have it, their mean."""
        return float(np.mean([a for a, x in zip(self.alpha, self.accuracy, strict=True) if x == max(self.accuracy)]))


class State(Record):
    """The part of a checkpoint that a report reads."""

    round: Count
    records: list[DeviceRecord]


TIMING, IMAGES, METRIC_SET, STATE = TypeAdapter(Timing), TypeAdapter(Images), TypeAdapter(MetricSet), TypeAdapter(State)
ALPHAS = TypeAdapter(Alphas)


@dataclass(frozen=True)
class Run:
    """The content of a run's folder. Parts that are missing or damaged are empty, and `missing` describes them.

    Attributes:
        config: all options by dotted name.
        summary: None if the run is not finished.
        lines: the lines of metrics.jsonl, in order.
        devices: one record per device, by partition id; from the last checkpoint if the run is not finished.
        plans, images, metric_sets: by partition id.
        alphas: by partition id; only of devices whose file is in the folder.
        rounds: number of finished rounds.
        missing: one sentence for each thing that a report cannot show.
        classes: the classes of the classifier, if devices reported them.
    """

    path: Path
    config: dict[str, Any]
    versions: dict[str, str]
    summary: Summary | None
    timing: Timing
    lines: list[Line]
    devices: list[DeviceRecord]
    plans: dict[int, PruningPlan]
    images: dict[int, Images]
    metric_sets: dict[int, MetricSet]
    alphas: dict[int, Alphas]
    rounds: int
    missing: list[str]
    classes: list[str] = field(default_factory=list)

    @property
    def equipped(self) -> list[DeviceRecord]:
        """The devices that have a pruned model; only these have accuracies."""
        return [device for device in self.devices if device.params]

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall seconds by phase."""
        return (self.summary.seconds if self.summary else {}) or self.timing.seconds

    def of(self, kind: type[L]) -> list[L]:
        """Returns the lines of metrics.jsonl that are of this kind, in order."""
        return [line for line in self.lines if isinstance(line, kind)]


def read_run(path: Path) -> Run:
    """Returns the content of a run's folder. Damaged files and symbolic links to places outside count as missing.

    Raises:
        ConfigError: if the folder is not a run's, or its records are of another version.
    """
    path = path.absolute()
    config, summary, folder = _options(path), _summary(path), RunFolder(path)
    rounds, devices = (int(config["train.rounds"]), summary.devices) if summary else _checkpoint(path)
    devices = sorted(devices, key=lambda record: record.device)
    ids = [record.device for record in devices]
    metrics = read_metrics(path if _inside(path, path / METRICS) else path / "nowhere")
    timing = _whole(path, path / "timing.json", _json(TIMING)) or Timing()
    versions = versions_of(path) if _inside(path, path / "versions.json") else {}
    equipped = [record.device for record in devices if record.params]
    plans = _each(path, {i: path / f"plans/{i:02d}.json" for i in equipped}, _plan)
    images = _each(path, {i: folder.device(i) / IMAGES_FILE for i in ids}, _json(IMAGES))
    metric_sets = _each(path, {i: folder.metric_set(i) for i in plans}, _json(METRIC_SET))
    alphas = _each(path, {i: folder.device(i) / ALPHAS_FILE for i in equipped}, _json(ALPHAS)) if summary else {}
    state = f"after round {rounds} of {config['train.rounds']}" if devices else "before the first round"
    clock = timing.seconds or (summary and summary.seconds)
    sentences = [
        (not summary, f"The run is not finished ({SUMMARY} is missing or damaged). This is its state {state}."),
        (metrics.damaged, f"{metrics.damaged} lines of {METRICS} are damaged and were left out."),
        (not metrics.lines, f"{METRICS} is missing or empty: there are no curves, no times and no list of faults."),
        (not clock, "timing.json is missing: the wall time of the run is not known."),
        (not versions, "versions.json is missing: the versions of the packages are not known."),
        (
            without := [i for i in equipped if i not in plans],
            f"The plans of {named(without)} are missing or damaged (plans/NN.json).",
        ),
        (
            len(images) < len(ids),
            f"The class counts {_lacking(ids, images)}are missing (devices/NN/{IMAGES_FILE}). Devices do not send "
            "them, so the folder has them only if the devices were simulated in this run.",
        ),
        (
            len(metric_sets) < len(plans),
            f"The metric sets {_lacking(plans, metric_sets)}are missing (metric-sets/NN.json): those plans were made "
            "elsewhere.",
        ),
    ]
    missing = [sentence for holds, sentence in sentences if holds]
    return Run(
        path,
        config,
        versions,
        summary,
        timing,
        metrics.lines,
        devices,
        plans,
        images,
        metric_sets,
        alphas,
        rounds,
        missing,
        _whole(path, path / CLASSES, read_classes) or [],
    )


def _options(path: Path) -> dict[str, Any]:
    """Returns the run's options; `train.rounds`, which a report needs, gets its default if it is missing."""
    options = _whole(path, path / "config.json", _json(OPTIONS))
    found: dict[str, Any] = dict(options or {})
    if not found:
        raise ConfigError(f"report {path}: is not a run's folder (no options in config.json)")
    rounds = found.setdefault("train.rounds", RunConfig().train.rounds)
    if type(rounds) is not int:
        raise ConfigError(f"report {path}: config.json is damaged (train.rounds = {rounds!r:.40})")
    return found


def _summary(path: Path) -> Summary | None:
    try:
        return read_summary(path) if _inside(path, path / SUMMARY) else None
    except PlanError:
        return None


def _checkpoint(path: Path) -> tuple[int, list[DeviceRecord]]:
    """Returns the round and the records of the last intact checkpoint, or 0 and no records."""
    server = RunFolder(path).server
    for round in reversed(server.rounds()):
        state = _whole(
            path, server.path(round), lambda file: STATE.validate_json(read_about(file).get("checkpoint", ""))
        )
        if state and state.round == round and len({r.device for r in state.records}) == len(state.records):
            return round, state.records
    return 0, []


def _plan(file: Path) -> PruningPlan:
    plan = read_plan(file)
    require_fitting(plan)
    return plan


def _json(content: TypeAdapter[T]) -> Callable[[Path], T]:
    return lambda file: content.validate_json(file.read_bytes())


def _inside(path: Path, file: Path) -> bool:
    """Returns whether a file really lies in the folder, with symbolic links followed."""
    try:
        return file.resolve().is_relative_to(path.resolve())
    except (OSError, RuntimeError):  # a link to itself
        return False


def _whole(path: Path, file: Path, read: Callable[[Path], T]) -> T | None:
    """Returns what `read` returns for a file; None if it is missing, damaged, or a link to a place outside."""
    try:
        return read(file) if _inside(path, file) else None
    except (OSError, ValidationError, TapflError):
        return None


def _each(path: Path, files: Mapping[int, Path], read: Callable[[Path], T]) -> dict[int, T]:
    return {i: found for i, file in files.items() if (found := _whole(path, file, read)) is not None}


def _lacking(ids: Collection[int], found: Collection[int]) -> str:
    return f"of {named([i for i in ids if i not in found])} " if found else ""


def named(ids: Sequence[int]) -> str:
    """Returns ``device 3`` or ``devices 0, 1, 2``; of many devices as `listed`."""
    return f"device{'' if len(ids) == 1 else 's'} {listed(ids)}"


def listed(values: Sequence[object], most: int = 12) -> str:
    """Returns values as text: the first 12, and how many more there are."""
    shown = ", ".join(map(str, values[:most]))
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown
