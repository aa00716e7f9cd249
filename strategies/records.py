"""The typed records of a run: `summary.json` and the lines of `metrics.jsonl`. Only this module writes and reads them.

Both have a `VERSION`: the summary as a field, metrics.jsonl in its first line. Files from before versions existed are
read if they have the required fields. Bytes are counted by kind of content: "adapters", "weights", …
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
    """Base of all records: numbers are finite and stored exactly; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", frozen=True)


class Accurate(Record):
    """Base of records with the accuracies of several models."""

    reference_accuracies: Accuracies | None = None  # of `personalize.references`, by name; None: there are none

    def accuracy_of(self, model: str) -> float | None:
        """Returns the accuracy of `dense`, `pruned`, `global`, `personal` or a reference; None if it is not known."""
        found: float | None = getattr(self, f"{model}_accuracy", None)
        return (self.reference_accuracies or {}).get(model) if found is None else found


class DeviceRecord(Accurate):
    """What the server knows about a device. Shares and accuracies are in [0, 1]."""

    device: Count
    profile: DeviceProfile
    train_samples: Count
    test_samples: Count = 0
    classes: Count = 0
    held_classes: list[bool] | None = None  # for each class, whether it has training images; None: not reported
    generic: bool = False  # True: it sent no mixture, and its plan was made from the whole public pool
    components: Count = 0  # components of its mixture; 0: it sent none
    macs: Count = 0
    macs_share: float = 0.0
    adapted_share: float = 1.0  # share of the MACs in blocks with adapters (`adapters.blocks`)
    params: Count = 0  # parameters of its pruned model; 0: it has none yet
    params_share: float = 0.0
    dense_accuracy: float = 0.0
    pruned_accuracy: float = 0.0
    global_accuracy: float = 0.0
    personal_accuracy: float = 0.0
    alpha: float = 0.0
    bytes_up: ByKind = {}
    bytes_down: ByKind = {}
    failures: Count = 0
    rounds: Count = 0  # number of rounds in which its answer was used
    last_round: Count = 0  # the last of these rounds; the device continues from its own state after it
    epsilon: float | None = None  # ε of differential privacy, only in the summary; None: no guarantee
    drift: float | None = None  # distance of its last mixture from that of round zero; see docs/data.md

    @model_validator(mode="after")
    def _has_shares(self) -> Self:
        if self.params and not self.macs_share > 0 < self.params_share:
            raise ValueError("a pruned model must have shares above 0")
        return self

    @property
    def one_component(self) -> bool:
        """Whether the mixture is a single Gaussian although the device has several classes."""
        return self.components == 1 and self.classes > 1


class CurvePoint(Record):
    """The state of a run after a round: cost since the start, and mean personal accuracy of devices with a model."""

    seconds: float  # simulated
    bytes: Count  # sent and received by all devices
    accuracy: float


def first_at(curve: Sequence[CurvePoint], accuracy: float) -> CurvePoint | None:
    """Returns the first point of a learning curve that reaches an accuracy, or None."""
    return next((point for point in curve if point.accuracy >= accuracy - 1e-9), None)


def milestones(curve: Sequence[CurvePoint]) -> dict[str, CurvePoint]:
    """Returns, for each of the accuracies 0.05, 0.10, … that the curve reaches, the first point that reaches it."""
    found = {f"{percent / 100:.2f}": first_at(curve, percent / 100) for percent in range(5, 101, 5)}
    return {accuracy: point for accuracy, point in found.items() if point is not None}


class Summary(Accurate):
    """The content of `summary.json`, which exists once a run is finished.

    Means are over devices that have a model; the mean dense accuracy is over those that evaluated the dense backbone.
    """

    version: Literal[1] = VERSION
    dense_accuracy: float
    pruned_accuracy: float
    global_accuracy: float
    personal_accuracy: float
    personal_accuracy_worst_decile: float  # mean over the worst tenth of the devices (at least one)
    bytes_up: Count  # total of all devices over the whole run
    bytes_down: Count
    adapter_bytes_up_per_round: float  # mean over devices of the adapter bytes per round in which an answer was used
    full_model_bytes: Count  # upload of one device if it sent the dense model, fp32, in every round
    failures: Count  # messages without a usable answer
    epsilon: float | None  # ε of differential privacy, the largest over devices; None: no guarantee
    quantity_shift: float | None = None  # how much the devices differ; see docs/data.md. None: not known
    feature_shift: float | None = None
    drift: float | None = None  # mean over devices whose mixture was fitted again
    simulated_seconds: float  # until the last round ended
    time_to_accuracy: dict[str, float]  # simulated seconds at which the curve first reached 0.05, 0.10, …
    bytes_to_accuracy: ByKind  # bytes at which it did
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
        """The devices that have a pruned model; only these have accuracies."""
        return [record for record in self.devices if record.params]


class Header(Record):
    """The first line of metrics.jsonl."""

    kind: Literal["header"] = "header"
    version: Literal[1] = VERSION


class DeviceLine(Accurate):
    """A device's accuracies with the adapters at the end of `round`; round 0: with the initial adapters."""

    kind: Literal["device"] = "device"
    round: Count
    device: Count
    global_accuracy: float | None = None  # None: not evaluated after this round (train.evaluate-every)
    personal_accuracy: float | None = None
    alpha: float
    next_loss: float | None = None  # mean training loss in the next round; None after the last round


class RoundLine(Accurate):
    """Means over the devices that answered after `round`, and the cost of the run until the end of `round`."""

    kind: Literal["round"] = "round"
    round: Count
    devices: Count  # number of devices that answered; if none did, there are no means
    simulated_seconds: float
    global_accuracy: float | None = None
    personal_accuracy: float | None = None
    alpha: float | None = None
    bytes_up: Count
    bytes_down: Count


class TrafficLine(Record):
    """One message and its answer: bytes by kind of content and simulated seconds.

    Messages between two rounds (mixtures that are fitted again, models for devices that have none) count to the earlier
    one, as in `RoundLine`. Round 0 is round zero.
    """

    kind: Literal["traffic"] = "traffic"
    phase: str
    round: Count
    device: Count
    down: ByKind
    up: ByKind
    simulated_seconds: float


class FailureLine(Record):
    """A message without a usable answer, or a device that gets no model."""

    kind: Literal["failure"] = "failure"
    phase: str
    device: Count
    reason: str


class AbsenceLine(Record):
    """A device that took no part in a round: away, dropped out or late, as simulated, or with too few images."""

    kind: Literal["absence"] = "absence"
    round: Count
    device: Count
    reason: str


class DriftLine(Record):
    """Distance of a device's mixture, fitted again after `round`, from its mixture of round zero."""

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
    damaged: int  # number of further lines, which cannot be read
    end: int  # bytes of the file up to the end of the last complete line


def added(one: ByKind, other: ByKind) -> ByKind:
    """Returns the sums by kind, without kinds that have 0 bytes."""
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
        raise PlanError(f"{file}: is not a complete summary of version {VERSION} ({_first(error)})") from None


def read_classes(file: Path) -> list[str]:
    """Returns the names of the classifier's classes, in order. Raises PlanError if the file is missing or damaged."""
    try:
        return NAMES.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else _first(error)
        raise PlanError(f"{file}: is not a list of class names ({why})") from None


def append_lines(folder: Path, *lines: Line) -> None:
    """Appends lines to metrics.jsonl; a new file gets a header first. Raises OSError with the file's name."""
    file = folder / METRICS
    try:
        with file.open("ab") as opened:
            new = [] if opened.tell() else [Header()]
            for line in (*new, *lines):
                opened.write(json.dumps(line.model_dump(exclude_none=True)).encode() + b"\n")
    except OSError as error:  # on a full disk it has no file name
        raise OSError(error.errno, os.strerror(error.errno or 0), str(file)) from error


def read_metrics(folder: Path, start: int = 0) -> Metrics:
    """Returns the lines after the first `start` bytes, without those of unknown kinds; no lines if there is no file.

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
    """Flushes metrics.jsonl to the disk and returns its size in bytes."""
    with (folder / METRICS).open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def cut_metrics(folder: Path, size: int) -> None:
    """Truncates metrics.jsonl to `size` bytes, which removes the lines of a round that did not end.

    Raises:
        PlanError: if it has fewer bytes.
    """
    file = folder / METRICS
    available = file.stat().st_size if file.exists() else 0
    if available < size:
        raise PlanError(f"{file}: has {available} bytes, but had {size} at the last checkpoint: it was truncated since")
    if available:
        os.truncate(file, size)


def _require_version(error: ValidationError, file: Path) -> None:
    for problem in error.errors():
        if problem["loc"][-1:] == ("version",):
            raise ConfigError(f"{file}: has version {problem['input']!r:.40}; accepted: {VERSION}, or none") from None


def _first(error: ValidationError) -> str:
    first: Any = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
