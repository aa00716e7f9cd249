"""What a device and the server say to each other, and the check of everything that arrives.

One dataclass a message. Arrays travel in an ArrayRecord, everything else in a ConfigRecord, nothing is pickled. This is
the only module of `tapfl` that knows Flower, and the complete list of what can leave a device: the fields of the
classes named ``...Reply``.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, get_type_hints

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from tapfl.errors import DataError, WireError
from tapfl.summary.mixture import GaussianSummary

MAX_SAMPLES = 10**9
MAX_ADAPTER = 1e6  # no trained adapter comes near, and what is made of such values stays finite in float32


@dataclass(frozen=True)
class WireMessage:
    """Base of all messages: to and from Flower's records by its fields."""

    type: ClassVar[str]  # Flower's message type
    kind: ClassVar[str]  # under which its bytes are counted, but for fields that have a kind of their own

    def to_records(self) -> RecordDict:
        """Returns the message as Flower sends it."""
        arrays, config = ArrayRecord(), ConfigRecord()
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, np.ndarray):
                arrays[each.name] = Array(np.ascontiguousarray(value))
            else:
                config[each.name] = value
        return RecordDict({"arrays": arrays, "config": config})

    @classmethod
    def from_records(cls, content: RecordDict) -> Self:
        """Returns the message that `content` holds.

        Raises:
            WireError: if a field is missing, unknown, of another type, or not finite.
        """
        arrays, config = content.get("arrays", ArrayRecord()), content.get("config", ConfigRecord())
        known = set(content) <= {"arrays", "config"}
        if not isinstance(arrays, ArrayRecord) or not isinstance(config, ConfigRecord) or not known:
            raise WireError(f"{cls.__name__}: records {sorted(content)} are not `arrays` and `config`")
        hints = get_type_hints(cls)
        names = [each.name for each in fields(cls)]
        in_arrays = {name for name in names if hints[name] is np.ndarray}
        if odd := sorted((set(arrays) ^ in_arrays) | (set(config) ^ (set(names) - in_arrays))):
            raise WireError(f"{cls.__name__}: fields differ: {', '.join(odd[:5])}")
        values: dict[str, Any] = {}
        for name in names:
            if name in in_arrays:
                values[name] = _array(f"{cls.__name__}.{name}", arrays[name])
            elif type(config[name]) is not hints[name]:
                raise WireError(f"{cls.__name__}.{name}: must be {hints[name].__name__}, got {config[name]!r:.40}")
            else:
                values[name] = config[name]
        if bad := [n for n, v in values.items() if isinstance(v, float) and not math.isfinite(v)]:
            raise WireError(f"{cls.__name__}.{bad[0]}: is not finite")
        return cls(**values)

    @property
    def bytes_by_kind(self) -> Counter[str]:
        """Bytes of the fields, without Flower's envelope; a kind of which there are none is not named."""
        counted: Counter[str] = Counter()
        for each in fields(self):
            counted[each.metadata.get("kind", self.kind)] += _nbytes(getattr(self, each.name))
        return +counted


def _array(field: str, array: Array) -> np.ndarray:
    try:
        value = array.numpy()
    except Exception as error:  # whatever a stranger's bytes make numpy's reader raise
        raise WireError(f"{field}: cannot be read ({type(error).__name__})") from None
    if not isinstance(value, np.ndarray):  # numpy's reader opens archives as well
        raise WireError(f"{field}: must be an array, got {type(value).__name__}")
    if value.dtype not in (np.float32, np.float64) or not np.isfinite(value).all():
        raise WireError(f"{field}: must be finite float32 or float64, got {value.dtype}")
    return value


def _nbytes(value: object) -> int:
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, str | bytes):
        return len(value.encode() if isinstance(value, str) else value)
    return 8


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise WireError(message)


# -- who are you, and what can you do -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello(WireMessage):
    """The server's first word: which backbone this federation starts from."""

    type: ClassVar[str] = "query.hello"
    kind: ClassVar[str] = "hello"

    backbone_key: str


@dataclass(frozen=True)
class HelloReply(WireMessage):
    """A device's profile."""

    type: ClassVar[str] = Hello.type
    kind: ClassVar[str] = "hello"

    partition_id: int
    budget: float
    rank: int
    train_samples: int
    holds_backbone: bool

    def check(self, devices: int, max_rank: int) -> None:
        """Raises WireError unless the device is one of `devices` and its profile is possible."""
        _require(0 <= self.partition_id < devices, f"unknown device: partition {self.partition_id} of {devices}")
        _require(0 < self.budget <= 1, f"budget {self.budget} must lie in (0, 1]")
        _require(1 <= self.rank <= max_rank, f"rank {self.rank} must lie in 1..{max_rank}")
        _require(1 <= self.train_samples <= MAX_SAMPLES, f"{self.train_samples} training samples")


# -- what do your images look like ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summarize(WireMessage):
    """The dense backbone (its weights only if the device lacks them), the pool's projection and its class names.

    `classes` is a JSON list, in the order of the backbone's outputs.
    """

    type: ClassVar[str] = "query.summarize"
    kind: ClassVar[str] = "backbone"

    backbone_key: str
    backbone_spec: str
    backbone_weights: bytes
    projection_mean: np.ndarray
    projection_components: np.ndarray
    classes: str


@dataclass(frozen=True)
class SummaryReply(WireMessage):
    """The mixture; and for the report, how the dense model does on the device's test part."""

    type: ClassVar[str] = Summarize.type
    kind: ClassVar[str] = "summary"

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    n: int
    dense_accuracy: float
    test_samples: int
    classes: int

    def mixture(self, dim: int, min_support: float, train_samples: int) -> GaussianSummary:
        """Returns the mixture. Raises WireError unless it is one, supported, and of the samples that were announced."""
        summary = GaussianSummary(
            self.weights.astype(np.float64), self.means.astype(np.float64), self.covariances.astype(np.float64), self.n
        )
        _require(self.n == train_samples, f"mixture of {self.n} samples, {train_samples} were announced")
        _require(self.weights.ndim == 1, f"mixture: weights have shape {self.weights.shape}")
        try:
            summary.check(dim, min_support)
            if summary.covariances.ndim == 3:
                np.linalg.cholesky(summary.covariances)  # the densities need it; positive eigenvalues may not suffice
        except DataError as error:
            raise WireError(str(error)) from None
        except np.linalg.LinAlgError as error:
            raise WireError(f"mixture: covariances: {error}") from None
        _require(0 <= self.dense_accuracy <= 1, f"dense accuracy {self.dense_accuracy}")
        _require(1 <= self.test_samples <= MAX_SAMPLES and 1 <= self.classes <= MAX_SAMPLES, "test samples or classes")
        return summary


# -- here is your model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prune(WireMessage):
    """The device's plan for the backbone that it was given, and where that alone does not give its model, the weights.

    `weights` is a safetensors file of the smaller model's state dict, or empty: the device then cuts its own backbone.
    """

    type: ClassVar[str] = "query.prune"
    kind: ClassVar[str] = "plan"

    backbone_key: str
    plan: str
    weights: bytes = field(default=b"", metadata={"kind": "weights"})


@dataclass(frozen=True)
class PruneReply(WireMessage):
    """What the device's model costs, measured on the model as it is, and how it does on the test part."""

    type: ClassVar[str] = Prune.type
    kind: ClassVar[str] = "hello"

    params: int
    macs: int
    pruned_accuracy: float

    def check(self, params: int, macs: int) -> None:
        """Raises WireError unless the device's model costs what its plan says."""
        _require(
            (self.params, self.macs) == (params, macs),
            f"model of {self.params} parameters and {self.macs} MACs, the plan says {params} and {macs}",
        )
        _require(0 <= self.pruned_accuracy <= 1, f"pruned accuracy {self.pruned_accuracy}")


# -- a round --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Train(WireMessage):
    """The global adapters, cut to the device: evaluate them, train, and answer."""

    type: ClassVar[str] = "train"
    kind: ClassVar[str] = "adapters"

    round: int
    adapters: np.ndarray


@dataclass(frozen=True)
class TrainReply(WireMessage):
    """The device's shared adapters (empty under `local`), and how it did *before* this round's training."""

    type: ClassVar[str] = Train.type
    kind: ClassVar[str] = "adapters"

    round: int
    adapters: np.ndarray
    loss: float
    alpha: float
    global_accuracy: float
    personal_accuracy: float

    def check(self, round: int, length: int, uploads: bool) -> None:
        """Raises WireError unless this answers `round` with adapters of the right length."""
        _require(self.round == round, f"answers round {self.round}, not {round}")
        expected = (length if uploads else 0,)
        _require(self.adapters.shape == expected, f"adapters have shape {self.adapters.shape}, not {expected}")
        _require(self.adapters.dtype == np.float32, f"adapters are {self.adapters.dtype}, not float32")
        largest = float(np.abs(self.adapters).max(initial=0))
        _require(largest <= MAX_ADAPTER, f"adapters reach {largest:.3g}, at most {MAX_ADAPTER:g} is accepted")
        _check_evaluation(self.alpha, self.global_accuracy, self.personal_accuracy)


@dataclass(frozen=True)
class Evaluate(WireMessage):
    """The last global adapters: evaluate them, and keep the personal model."""

    type: ClassVar[str] = "evaluate"
    kind: ClassVar[str] = "adapters"

    round: int
    adapters: np.ndarray


@dataclass(frozen=True)
class EvaluateReply(WireMessage):
    """How the device did."""

    type: ClassVar[str] = Evaluate.type
    kind: ClassVar[str] = "hello"

    round: int
    alpha: float
    global_accuracy: float
    personal_accuracy: float

    def check(self, round: int) -> None:
        """Raises WireError unless this answers `round`."""
        _require(self.round == round, f"answers round {self.round}, not {round}")
        _check_evaluation(self.alpha, self.global_accuracy, self.personal_accuracy)


def _check_evaluation(alpha: float, global_accuracy: float, personal_accuracy: float) -> None:
    for name, value in (("alpha", alpha), ("global", global_accuracy), ("personal", personal_accuracy)):
        _require(0 <= value <= 1, f"{name} {value} must lie in [0, 1]")
