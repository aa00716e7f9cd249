"""What a run records, typed: `summary.json` and the lines of `metrics.jsonl`. Both are written and read here only.

Both carry `VERSION`: the summary as a field, metrics.jsonl in its first line. Files without one, from before versions
existed, are read if they have the required fields. Bytes are counted by kind of content: "adapters", "weights", …
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from tapfl.errors import ConfigError, PlanError
from tapfl.profiles import DeviceProfile
from tapfl.store import write_json

VERSION: Final = 1
SUMMARY, METRICS, CLASSES = "summary.json", "metrics.jsonl", "classes.json"

Count = Annotated[int, Field(ge=0, le=2**63)]
ByKind = dict[str, Count]
Accuracies = dict[str, float]


class Record(BaseModel):
    """Base of all records: numbers are finite and keep every bit, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", frozen=True)


class Accurate(Record):
    """Base of records with the accuracies of several models."""

    reference_accuracies: Accuracies | None = None  # of `personalize.references`, by name; None: there are none

    def accuracy_of(self, model: str) -> float | None:
        """Returns the accuracy of `dense`, `pruned`, `global`, `personal` or a reference; None if it is not known."""
        found: float | None = getattr(self, f"{model}_accuracy", None)
        return (self.reference_accuracies or {}).get(model) if found is None else found


class DeviceRecord(Accurate):
    """What the server knows of one device. Shares and accuracies lie in [0, 1]."""

    device: Count
    profile: DeviceProfile
    train_samples: Count
    test_samples: Count = 0
    classes: Count = 0
    held_classes: list[bool] | None = None  # whether it has training images of each class, where it reports that
    generic: bool = False  # it sent no mixture, so its plan is made from the whole public pool
    components: Count = 0  # of its mixture; 0: it sent none
    macs: Count = 0
    macs_share: float = 0.0
    adapted_share: float = 1.0  # of the MACs: that of the blocks with adapters (`adapters.blocks`)
    params: Count = 0  # of its pruned model; 0: it has none yet
    params_share: float = 0.0
    dense_accuracy: float = 0.0
    pruned_accuracy: float = 0.0
    global_accuracy: float = 0.0
    personal_accuracy: float = 0.0
    alpha: float = 0.0
    bytes_up: ByKind = {}
    bytes_down: ByKind = {}
    failures: Count = 0
    rounds: Count = 0  # in how many its answer was used
    last_round: Count = 0  # the last of these; the device continues from its own state after it
    epsilon: float | None = None  # of differential privacy, in the summary only; None: no guarantee
    drift: float | None = None  # of its mixture since round zero, when it was last fitted again; docs/data.md

    @model_validator(mode="after")
    def _has_shares(self) -> Self:
        if self.params and not self.macs_share > 0 < self.params_share:
            raise ValueError("a pruned model must have shares above 0")
        return self

    @property
    def one_component(self) -> bool:
        """Whether the mixture of a device with several classes is one Gaussian, which does not tell them apart."""
        return self.components == 1 and self.classes > 1


class CurvePoint(Record):
    """How far a run was after a round: cost since the start, and mean personal accuracy over devices with a model."""

    seconds: float  # simulated
    bytes: Count  # of all devices, up and down
    accuracy: float


def first_at(curve: Sequence[CurvePoint], accuracy: float) -> CurvePoint | None:
    """Returns the first point of a learning curve that reaches an accuracy, or None."""
    return next((point for point in curve if point.accuracy >= accuracy - 1e-9), None)


def milestones(curve: Sequence[CurvePoint]) -> dict[str, CurvePoint]:
    """Returns the first point that reaches each of the accuracies 0.05, 0.10, …, as far as the curve comes."""
    found = {f"{percent / 100:.2f}": first_at(curve, percent / 100) for percent in range(5, 101, 5)}
    return {accuracy: point for accuracy, point in found.items() if point is not None}


class Summary(Accurate):
    """The content of `summary.json`, which exists once a run is finished.

    Means are over devices that have a model; the dense one over those that evaluated the dense backbone.
    """

    version: Literal[1] = VERSION
    dense_accuracy: float
    pruned_accuracy: float
    global_accuracy: float
    personal_accuracy: float
    personal_accuracy_worst_decile: float  # mean over the worst tenth of the devices (at least one)
    bytes_up: Count  # of all devices, whole run
    bytes_down: Count
    adapter_bytes_up_per_round: float  # of a device in a round that used its answer; mean over those with such a round
    full_model_bytes: Count  # what one device would upload if it sent the dense model, fp32, in every round
    failures: Count  # messages without a usable answer
    epsilon: float | None  # of differential privacy, the largest over devices; None: no guarantee
    quantity_shift: float | None = None  # how far the devices are apart; docs/data.md. None: not known
    feature_shift: float | None = None
    drift: float | None = None  # mean over devices whose mixture was fitted again
    simulated_seconds: float  # until the last round ended
    time_to_accuracy: dict[str, float]  # cost at which the curve first reached 0.05, 0.10, …
    bytes_to_accuracy: ByKind
    curve: list[CurvePoint]  # after round zero and after each round
    seconds: dict[str, float]  # wall time by phase
    devices: list[DeviceRecord]

    @model_validator(mode="after")
    def _devices_differ(self) -> Self:
        if len({record.device for record in self.devices}) < len(self.devices):
            raise ValueError("a device is listed twice")
        return self

    @property
    def equipped(self) -> list[DeviceRecord]:
        """The devices that have a pruned model; only for these there is an accuracy."""
        return [record for record in self.devices if record.params]


class Header(Record):
    """The first line of metrics.jsonl."""

    kind: Literal["header"] = "header"
    version: Literal[1] = VERSION


class DeviceLine(Accurate):
    """How a device did with the adapters that `round` ended with; round 0: with the first ones."""

    kind: Literal["device"] = "device"
    round: Count
    device: Count
    global_accuracy: float | None = None  # None: not evaluated after this round (train.evaluate-every)
    personal_accuracy: float | None = None
    alpha: float
    next_loss: float | None = None  # mean training loss in the round after, unless this was the last


class RoundLine(Accurate):
    """Means over the devices that answered after `round`, and what the run had cost when it ended."""

    kind: Literal["round"] = "round"
    round: Count
    devices: Count  # how many answered; if none did, there are no means
    simulated_seconds: float
    global_accuracy: float | None = None
    personal_accuracy: float | None = None
    alpha: float | None = None
    bytes_up: Count
    bytes_down: Count


class TrafficLine(Record):
    """One message and its answer: bytes by kind of content and simulated seconds; round 0: before the first round."""

    kind: Literal["traffic"] = "traffic"
    phase: str
    round: Count
    device: Count
    down: ByKind
    up: ByKind
    simulated_seconds: float


class FailureLine(Record):
    """A message to which no usable answer came, or a device that gets no model."""

    kind: Literal["failure"] = "failure"
    phase: str
    device: Count
    reason: str


class AbsenceLine(Record):
    """A device that took no part in a round, as simulated: away, dropped out, or late."""

    kind: Literal["absence"] = "absence"
    round: Count
    device: Count
    reason: str


class DriftLine(Record):
    """How far a device's mixture has moved since round zero, when it was fitted again after `round`."""

    kind: Literal["drift"] = "drift"
    round: Count
    device: Count
    drift: float


Line = DeviceLine | RoundLine | TrafficLine | FailureLine | AbsenceLine | DriftLine
NAMES = TypeAdapter(Annotated[list[str], Field(strict=True, min_length=1)])
LINE: TypeAdapter[Line | Header] = TypeAdapter(Annotated[Line | Header, Field(discriminator="kind")])


class Metrics(NamedTuple):
    """Lines of metrics.jsonl."""

    lines: list[Line]
    damaged: int  # how many more there are that cannot be read
    end: int  # bytes of the file up to the end of the last whole line


def added(one: ByKind, other: ByKind) -> ByKind:
    """Returns the sums by kind, without kinds of 0 bytes."""
    return dict(Counter(one) + Counter(other))


def write_summary(folder: Path, summary: Summary) -> None:
    write_json(folder / SUMMARY, summary.model_dump())


def read_summary(folder: Path) -> Summary:
    """Returns the summary of a finished run.

    Raises:
        PlanError: if there is none in `folder`, or it is damaged.
        ConfigError: if it has another version.
    """
    file = folder / SUMMARY
    try:
        return Summary.model_validate_json(file.read_bytes())
    except OSError as error:
        raise PlanError(f"{file}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        _require_version(error, file)
        raise PlanError(f"{file}: is not a whole summary of version {VERSION} ({_first(error)})") from None


def read_classes(file: Path) -> list[str]:
    """Returns the names of the classifier's classes, in order. Raises PlanError if the file is missing or damaged."""
    try:
        return NAMES.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else _first(error)
        raise PlanError(f"{file}: is no list of class names ({why})") from None


def append_lines(folder: Path, *lines: Line) -> None:
    """Adds lines to metrics.jsonl, to a new file after the header. Raises OSError with the file's name."""
    file = folder / METRICS
    try:
        with file.open("ab") as opened:
            new = [] if opened.tell() else [Header()]
            for line in (*new, *lines):
                opened.write(json.dumps(line.model_dump(exclude_none=True)).encode() + b"\n")
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, os.strerror(error.errno or 0), str(file)) from error


def read_metrics(folder: Path, start: int = 0) -> Metrics:
    """Returns the lines after the first `start` bytes; none if there is no file. Unknown kinds are left out.

    Raises:
        ConfigError: if the file has another version.
    """
    file = folder / METRICS
    try:
        with file.open("rb") as opened:
            opened.seek(start)
            content = opened.read()
    except OSError:
        content = b""
    lines: list[Line] = []
    damaged = 0
    for text in content.splitlines():
        try:
            if not isinstance(line := LINE.validate_json(text), Header):
                lines.append(line)
        except ValidationError as error:
            _require_version(error, file)
            damaged += error.errors()[0]["type"] != "union_tag_invalid"
    return Metrics(lines, damaged, start + content.rfind(b"\n") + 1)


def metrics_size(folder: Path) -> int:
    """Returns how many bytes metrics.jsonl has, after waiting until they are on the disk."""
    with (folder / METRICS).open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def cut_metrics(folder: Path, size: int) -> None:
    """Drops what follows the first `size` bytes of metrics.jsonl: lines of a round that did not end.

    Raises:
        PlanError: if there are fewer.
    """
    file = folder / METRICS
    available = file.stat().st_size if file.exists() else 0
    if available < size:
        raise PlanError(f"{file}: has {available} bytes, but had {size} at the last checkpoint: it was truncated since")
    if available:
        os.truncate(file, size)


def _require_version(error: ValidationError, file: Path) -> None:
    for each in error.errors():
        if each["loc"][-1:] == ("version",):
            raise ConfigError(f"{file}: has version {each['input']!r:.40}; accepted: {VERSION}, or none") from None


def _first(error: ValidationError) -> str:
    first: Any = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
