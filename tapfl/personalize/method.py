"""The interface of a personalisation method, and the methods by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from tapfl.config import PersonalizeOptions, TrainOptions
from tapfl.training import Objective, Params

S = TypeVar("S")


@dataclass(frozen=True)
class Personal:
    """What never leaves a device: its own parameters v, and how much of them it uses.

    Attributes:
        params: v, in the shapes of the device.
        alpha: α in [0, 1].
    """

    params: Params
    alpha: float


@dataclass(frozen=True)
class LocalResult:
    """A round's outcome on one device: what goes up (None: nothing), what stays, and the mean loss of each step."""

    upload: Params | None
    personal: Personal | None
    loss: float


class Method(Protocol, Generic[S]):
    """A method as three pure steps around its own state `S`, and the model that the device then uses."""

    def init(self, received: Params, personal: Personal | None, train: TrainOptions) -> S:
        """Returns the state at the start of a round; `personal` is None in a device's first."""
        ...

    def step(self, state: S, objective: Objective, batch: object) -> Tensor:
        """Advances the state by one batch; returns the loss of the model that the device would use."""
        ...

    def final(self, state: S) -> tuple[Params | None, Personal | None]:
        """Returns what goes up and what stays."""
        ...

    def inference(self, received: Params, personal: Personal | None) -> Params:
        """Returns the parameters of the model that the device uses, given what it received last."""
        ...


def local_round(
    method: Method[Any],
    objective: Objective,
    received: Params,
    personal: Personal | None,
    batches: Iterable[object],
    train: TrainOptions,
) -> LocalResult:
    """Returns what a device's round gives, a function of its arguments alone."""
    state = method.init(received, personal, train)
    losses = [method.step(state, objective, batch).detach() for batch in batches]
    upload, stays = method.final(state)
    return LocalResult(upload, stays, float(sum(losses)) / len(losses))


def method_of(options: PersonalizeOptions) -> Method[Any]:
    """Returns the method that the options name."""
    from tapfl.personalize.apfl import Apfl
    from tapfl.personalize.fedavg import FedAvg
    from tapfl.personalize.local import Local

    if options.method == "apfl":
        return Apfl(options.alpha, options.alpha_update, options.alpha_learning_rate)
    return FedAvg() if options.method == "fedavg" else Local()
