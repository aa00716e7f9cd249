"""Reads a run's folder for a report: whatever of it is whole, and in words what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from clients.storage import IMAGES_FILE
from strategies.records import METRICS, SUMMARY, Count, DeviceRecord, Line, Record, Summary, read_metrics, read_summary
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, PlanError, TapflError
from tapfl.pruning.plan import PruningPlan, read_plan
from tapfl.pruning.surgery import require_fitting
from tapfl.store import RunFolder, read_about

T = TypeVar("T")
L = TypeVar("L", bound=Line)

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
OPTIONS: TypeAdapter[dict[str, str | bool | int | float]] = TypeAdapter(
    dict[str, str | bool | int | float], config=STRICT
)
VERSIONS: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str], config=STRICT)


class Timing(Record):
    """`timing.json`: wall seconds by phase and by round."""

    seconds: dict[str, float] = Field(default_factory=dict)
    rounds: dict[int, float] = Field(default_factory=dict)


class ClassCounts(Record):
    """Numbers of images, each list with a count a class."""

    classes: list[str | int | float]

    @model_validator(mode="after")
    def _one_a_class(self) -> Self:
        if any(len(values) != len(self.classes) for values in vars(self).values()):
            raise ValueError("needs one count a class")
        return self

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.classes]


class Images(ClassCounts):
    """A device's own images."""

    train: list[Count]
    test: list[Count]


class MetricSet(ClassCounts):
    """The public images chosen for a device, and the pool that they were chosen from."""

    metric: list[Count]
    pool: list[Count]


class _State(Record):
    """What a checkpoint records of the devices."""

    round: Count
    records: list[DeviceRecord]


@dataclass(frozen=True)
class Run:
    """The content of a run's folder; what is missing or damaged is empty here, and described in `missing`.

    Attributes:
        config: all options, dotted.
        summary: None of a run that is not finished.
        lines: of metrics.jsonl, in order.
        devices: by partition id; of a run that is not finished, from its last checkpoint.
        plans, images, metric_sets: by partition id.
        rounds: how many are done.
        missing: a sentence for everything that a report would show and cannot.
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
    rounds: int
    missing: list[str]

    @property
    def equipped(self) -> list[DeviceRecord]:
        """The devices that have a pruned model; only for these there is an accuracy."""
        return [device for device in self.devices if device.params]

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall seconds by phase."""
        return (self.summary.seconds if self.summary else {}) or self.timing.seconds

    def of(self, kind: type[L]) -> list[L]:
        """Returns the lines of metrics.jsonl of one kind, in order."""
        return [line for line in self.lines if isinstance(line, kind)]


def read_run(path: Path) -> Run:
    """Returns what a run has left in its folder. Damaged files, and links that lead out of it, count as missing.

    Raises:
        ConfigError: if the folder holds no run, or records of another version.
    """
    path = path.absolute()
    config = _options(path)
    missing: list[str] = []
    summary, rounds = _summary(path), int(config["train.rounds"])
    devices = summary.devices if summary else []
    if not summary:
        wanted = rounds
        rounds, devices = _checkpoint(path)
        state = f"after round {rounds} of {wanted}" if devices else "before the first round"
        missing.append(f"The run is not finished (it has no whole {SUMMARY}). This is its state {state}.")
    devices = sorted(devices, key=lambda record: record.device)
    metrics = read_metrics(path if _inside(path, METRICS) else path / "nowhere")
    if metrics.damaged:
        missing.append(f"{metrics.damaged} lines of {METRICS} are damaged and were left out.")
    if not metrics.lines:
        missing.append(f"{METRICS} is missing or empty: there are no curves, no times and no list of faults.")
    timing = _read(path, "timing.json", TypeAdapter(Timing)) or Timing()
    if not timing.seconds and not (summary and summary.seconds):
        missing.append("timing.json is missing: how long the run really took is not known.")
    versions = _read(path, "versions.json", VERSIONS) or {}
    if not versions:
        missing.append("versions.json is missing: the versions of the packages are not known.")
    folder, ids = RunFolder(path), [record.device for record in devices]
    plans = _plans(path, [device.device for device in devices if device.params])
    if without := [device.device for device in devices if device.params and device.device not in plans]:
        missing.append(f"The plans of {_named(without)} are missing or damaged (plans/NN.json).")
    images = _each(path, {i: folder.device(i) / IMAGES_FILE for i in ids}, TypeAdapter(Images))
    if without := [i for i in ids if i not in images]:
        where = f"of {_named(without)} " if images else ""
        missing.append(
            f"The class counts {where}are missing (devices/NN/{IMAGES_FILE}). Devices do not send them: they are here "
            "only if the devices were simulated in this run."
        )
    metric_sets = _each(path, {i: folder.metric_set(i) for i in plans}, TypeAdapter(MetricSet))
    if without := [i for i in plans if i not in metric_sets]:
        where = f"of {_named(without)} " if metric_sets else ""
        missing.append(f"The metric sets {where}are missing (metric-sets/NN.json): those plans were made elsewhere.")
    return Run(
        path, config, versions, summary, timing, metrics.lines, devices, plans, images, metric_sets, rounds, missing
    )


def _options(path: Path) -> dict[str, Any]:
    """Returns the run's options, with defaults for those that a report needs and the run does not have."""
    read = _read(path, "config.json", OPTIONS)
    found: dict[str, Any] = dict(read or {})
    if not found:
        raise ConfigError(f"report {path}: is not a run's folder, which has the run's options in its config.json")
    defaults = RunConfig().flat()
    for option, kinds in {"train.rounds": (int,), "personalize.alpha": (int, float)}.items():
        value = found.setdefault(option, defaults[option])
        if type(value) not in kinds:
            raise ConfigError(f"report {path}: config.json is damaged ({option} = {value!r:.40})")
    return found


def _inside(path: Path, name: str) -> bool:
    """Returns whether a file of the folder is no link that leads out of it."""
    try:
        return (path / name).resolve().is_relative_to(path.resolve())
    except (OSError, RuntimeError):  # a link to itself
        return False


def _read(path: Path, name: str, content: TypeAdapter[T]) -> T | None:
    """Returns the content of a JSON file; None if it is missing, damaged, or a link out of the folder."""
    try:
        return content.validate_json((path / name).read_bytes()) if _inside(path, name) else None
    except (OSError, ValidationError):
        return None


def _each(path: Path, files: Mapping[int, Path], content: TypeAdapter[T]) -> dict[int, T]:
    found = {i: _read(path, str(file.relative_to(path)), content) for i, file in files.items()}
    return {i: each for i, each in found.items() if each is not None}


def _summary(path: Path) -> Summary | None:
    try:
        return read_summary(path) if _inside(path, SUMMARY) else None
    except PlanError:
        return None


def _checkpoint(path: Path) -> tuple[int, list[DeviceRecord]]:
    """Returns the round of the last whole checkpoint and its records, or 0 and none."""
    server = RunFolder(path).server
    for round in reversed(server.rounds()):
        try:
            state = _State.model_validate_json(read_about(server.path(round))["checkpoint"])
        except (TapflError, ValidationError, KeyError):
            continue
        if state.round == round and len({record.device for record in state.records}) == len(state.records):
            return round, state.records
    return 0, []


def _plans(path: Path, ids: Iterable[int]) -> dict[int, PruningPlan]:
    plans = {}
    for i in ids:
        name = f"plans/{i:02d}.json"
        try:
            if _inside(path, name):
                plan = read_plan(path / name)
                require_fitting(plan)
                plans[i] = plan
        except TapflError:
            continue
    return plans


def _named(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:12])) + (f" and {len(ids) - 12} more" if len(ids) > 12 else "")
    return f"device {shown}" if len(ids) == 1 else f"devices {shown}"
