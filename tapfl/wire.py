"""The messages between a device and the server, and the checks of their values.

Each message is a dataclass (`tapfl.wire_format`). The fields of the classes named ``...Reply`` are the complete list of
what can leave a device. Each field is annotated with its meaning, and arrays also with their shape; `tapfl inspect
--uplink` shows these annotations.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import numpy as np
import torch

from tapfl.data.images import is_plain
from tapfl.errors import ConfigError, DataError, WireError
from tapfl.options import validated
from tapfl.profiles import DeviceProfile
from tapfl.summary.mixture import GaussianSummary
from tapfl.training import LARGEST
from tapfl.wire_format import WireMessage

MAX_SAMPLES = 10**9
LONGEST_NAMES = 2**20  # most bytes of all class names of a device
ENVELOPE = 4096  # bytes that a message may have in addition to its expected arrays: names, headers, scalars
PROFILE_FIELDS = ("budget", "rank", "compute", "upload", "download", "availability")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise WireError(message)


@dataclass(frozen=True)
class Hello(WireMessage, type="query.hello", kind="hello"):
    """The server's first message: the backbone that this federation starts from."""

    backbone_key: str


@dataclass(frozen=True)
class HelloReply(WireMessage, type=Hello.type, kind="hello", when="once, first"):
    """A device's profile, as in `tapfl.profiles`."""

    partition_id: Annotated[int, "number of the device"]
    budget: Annotated[str, "budget of its model"]
    rank: Annotated[int, "LoRA rank of its adapters"]
    compute: Annotated[float, "MAC/s, for the simulated time"]
    upload: Annotated[float, "bytes/s, for the simulated time"]
    download: Annotated[float, "bytes/s, for the simulated time"]
    availability: Annotated[float, "probability that it is available when a round begins"]
    train_samples: Annotated[int, "number of images in its training part"]
    holds_backbone: Annotated[bool, "whether it already has the dense backbone"]
    class_names: Annotated[
        str, "names of its classes, or 0, 1, … in their place if its head is personal; only for a new head (model.head)"
    ]

    def profile(self, devices: int, max_rank: int, fewest: int = 1) -> DeviceProfile:
        """Returns the profile. Raises WireError unless the device is one of `devices` and its profile is valid.

        Args:
            devices: number of devices.
            max_rank: largest accepted rank.
            fewest: smallest accepted number of training samples.
        """
        _require(0 <= self.partition_id < devices, f"unknown device: partition {self.partition_id} of {devices}")
        _require(fewest <= self.train_samples <= MAX_SAMPLES, f"{self.train_samples} training samples")
        _require(self.rank <= max_rank, f"rank {self.rank} must lie in 1..{max_rank}")
        try:
            return validated(DeviceProfile, {name: getattr(self, name) for name in PROFILE_FIELDS})
        except ConfigError as error:
            raise WireError(f"{error!s:.300}") from None

    def named(self, asked: bool) -> tuple[str, ...]:
        """Returns the sorted classes of its training part, if `asked` for. Raises WireError if they are not valid."""
        try:
            names = json.loads(self.class_names)
        except (ValueError, RecursionError):
            names = None
        _require(isinstance(names, list) and bool(names) == asked, f"class names {self.class_names!r:.80}")
        plain = all(isinstance(name, str) and is_plain(name) for name in names)
        _require(plain and names == sorted(set(names)), "class names must be plain text, sorted and different")
        _require(len(names) <= self.train_samples, f"{len(names)} classes of {self.train_samples} training samples")
        return tuple(names)


@dataclass(frozen=True)
class Summarize(WireMessage, type="query.summarize", kind="backbone"):
    """The dense backbone (with weights if the device does not have them), and the projection and classes of the pool.

    `classes` is a JSON list of names, in the order of the backbone's outputs.
    """

    backbone_key: str
    backbone_spec: str
    backbone_weights: bytes
    projection_mean: np.ndarray
    projection_components: np.ndarray
    classes: str


@dataclass(frozen=True)
class SummaryReply(WireMessage, type=Summarize.type, kind="summary", when="once, before pruning"):
    """The mixture, and for the report, the accuracy of the dense model on the device's test part."""

    weights: Annotated[np.ndarray, "mixture: share π of each component", "K"]
    means: Annotated[np.ndarray, "mixture: mean μ of each component's descriptors", "K, d"]
    covariances: Annotated[
        np.ndarray, "mixture: variances of each component (K, d, d: covariances, if summary.covariance = full)", "K, d"
    ]
    n: Annotated[int, "mixture: number of distinct training images it was fitted on"]
    dense_accuracy: Annotated[float, "for the report: accuracy of the dense model on the device's test part"]
    test_samples: Annotated[int, "for the report: number of images in the test part"]
    classes: Annotated[int, "for the report: number of classes in the training part"]
    held_classes: Annotated[
        np.ndarray, "classes that it has images of, 0 or 1; only for adapters.head = class-rows", "C"
    ]

    @property
    def gaussians(self) -> GaussianSummary:
        """The mixture, unchecked."""
        weights, means, covariances = (part.astype(np.float64) for part in (self.weights, self.means, self.covariances))
        return GaussianSummary(weights, means, covariances, self.n)

    def mixture(self, dim: int, min_support: float, train_samples: int) -> GaussianSummary:
        """Returns the mixture. Raises WireError if it is not valid or has more samples than announced."""
        summary = self.gaussians
        _require(1 <= self.n <= train_samples, f"mixture of {self.n} samples, {train_samples} were announced")
        try:
            summary.check(dim, min_support)
            if summary.covariances.ndim == 3:
                np.linalg.cholesky(summary.covariances)  # for the densities: positive eigenvalues do not guarantee it
        except DataError as error:
            raise WireError(str(error)) from None
        except np.linalg.LinAlgError as error:
            raise WireError(f"mixture: covariances: {error}") from None
        _require(0 <= self.dense_accuracy <= 1, f"dense accuracy {self.dense_accuracy}")
        _require(1 <= self.test_samples <= MAX_SAMPLES and 1 <= self.classes <= MAX_SAMPLES, "test samples or classes")
        return summary

    def held(self, classes: int, asked: bool) -> torch.Tensor | None:
        """Returns which classes the device has images of, bool (classes,); None if the server did not ask.

        Args:
            classes: number of classes.
        """
        expected = (classes if asked else 0,)
        _require(self.held_classes.shape == expected, f"held classes have shape {self.held_classes.shape}")
        _require(bool(np.isin(self.held_classes, (0, 1)).all()), "held classes must be 0 or 1")
        return torch.from_numpy(self.held_classes > 0) if asked else None


@dataclass(frozen=True)
class Prune(WireMessage, type="query.prune", kind="plan"):
    """The device's plan for its backbone, and the weights if the plan alone does not determine its model.

    `weights` is a safetensors file of the pruned model's state dict. If it is empty, the device cuts its own backbone.
    `adapters` are those of the warm start, for a device that also trains references; otherwise it is empty.
    """

    backbone_key: str
    plan: str
    weights: bytes = field(default=b"", metadata={"kind": "weights"})
    adapters: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), metadata={"kind": "adapters"})


@dataclass(frozen=True)
class PruneReply(WireMessage, type=Prune.type, kind="hello", when="once, after pruning"):
    """The cost of the device's model as counted on the device, and its accuracy on the test part."""

    params: Annotated[int, "parameters of the device's model, as counted there"]
    macs: Annotated[int, "multiply-accumulates of the device's model, as counted there"]
    pruned_accuracy: Annotated[float, "for the report: accuracy of the pruned model on the test part"]

    def check(self, params: int, macs: int) -> None:
        """Raises WireError unless the cost of the device's model equals that of its plan."""
        _require(
            (self.params, self.macs) == (params, macs),
            f"model of {self.params} parameters and {self.macs} MACs, the plan says {params} and {macs}",
        )
        _require(0 <= self.pruned_accuracy <= 1, f"pruned accuracy {self.pruned_accuracy}")


@dataclass(frozen=True)
class _Adapters(WireMessage, kind="adapters"):
    round: int
    state_round: int
    adapters: np.ndarray


@dataclass(frozen=True)
class Train(_Adapters, type="train"):
    """The device's part of the global adapters: evaluate them, train, and reply. `local` receives them only once.

    `state_round` is the last round for which the server has this device's reply, or 0. The device continues from its
    own state after that round, and discards later states, whose replies were lost.
    """


@dataclass(frozen=True)
class Evaluate(_Adapters, type="evaluate"):
    """The final global adapters: evaluate them, and store the personal model. `state_round` is as in `Train`."""


@dataclass(frozen=True)
class _Evaluation(WireMessage):
    round: Annotated[int, "number of the round that this replies to"]
    alpha: Annotated[float, "for the report: weight α of the private model"]
    # accuracies are on the test part, and 0 if nothing was evaluated in this round
    global_accuracy: Annotated[float, "for the report: accuracy of the global adapters, on the test part"]
    personal_accuracy: Annotated[float, "for the report: accuracy of the personal model, on the test part"]
    reference_accuracies: Annotated[
        np.ndarray, "for the report: accuracies of personalize.references, on the test part", "references"
    ]
    images: Annotated[
        np.ndarray,
        "numbers of training and test images, both 0 if they are too few and it skips the round; only with "
        "data.changing",
        "2",
    ]

    @classmethod
    def absent(cls, round: int, references: Collection[str], **rest: Any) -> Self:
        """Returns the reply of a device that skips `round`.

        Args:
            references: names of the reference models.
            rest: the other fields.
        """
        none = dict.fromkeys(("alpha", "global_accuracy", "personal_accuracy"), 0.0)
        return cls(round=round, **none, reference_accuracies=np.zeros(len(references)), images=np.zeros(2), **rest)

    @property
    def sits_out(self) -> bool:
        """Whether the device has too few images in this round, and therefore did nothing."""
        return bool(len(self.images)) and not self.images.any()

    def check(self, round: int, references: int = 0, changing: bool = False) -> None:
        """Raises WireError unless this replies to `round`, with α and accuracies in [0, 1].

        Args:
            references: number of reference models.
            changing: whether the server has asked for numbers of images.
        """
        _require(self.round == round, f"answers round {self.round}, not {round}")
        for name in ("alpha", "global_accuracy", "personal_accuracy"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name.removesuffix('_accuracy')} {value} must lie in [0, 1]")
        values, expected = self.reference_accuracies, (references,)
        _require(values.shape == expected, f"accuracies of references have shape {values.shape}, not {expected}")
        _require(bool(((values >= 0) & (values <= 1)).all()), "accuracies of references must lie in [0, 1]")
        expected, n = (2 if changing else 0,), self.images
        _require(n.shape == expected, f"numbers of images have shape {n.shape}, not {expected}")
        whole = ((n == n.round()) & (n >= 0 if self.sits_out else n >= 1) & (n <= MAX_SAMPLES)).all()
        _require(bool(whole), f"numbers of images must be whole, both from 1 to {MAX_SAMPLES} or both 0")


@dataclass(frozen=True)
class TrainReply(_Evaluation, type=Train.type, kind="adapters", when="every round"):
    """The device's shared adapters (empty with `local`), and its accuracy *before* this round's training."""

    adapters: Annotated[
        np.ndarray, "shared adapters and head after local training; empty if the method is local", "parameters"
    ]
    loss: Annotated[float, "for the report: training loss of this round"]

    def check(self, round: int, references: int = 0, changing: bool = False, length: int = 0) -> None:
        """Raises WireError as `_Evaluation` does, and if the adapters have another length (in a skipped round, 0)."""
        super().check(round, references, changing)
        length = 0 if self.sits_out else length
        _require(self.adapters.shape == (length,), f"adapters have shape {self.adapters.shape}, not {(length,)}")
        _require(self.adapters.dtype == np.float32, f"adapters are {self.adapters.dtype}, not float32")
        largest = float(np.abs(self.adapters).max(initial=0))
        _require(largest <= LARGEST, f"adapters reach {largest:.3g}, at most {LARGEST:g} is accepted")


@dataclass(frozen=True)
class EvaluateReply(_Evaluation, type=Evaluate.type, kind="hello", when="once, last"):
    """The device's final accuracies."""
