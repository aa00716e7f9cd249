"""The interface of a personalisation method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tapfl.config import TrainOptions
from tapfl.training import Objective, Params

S = TypeVar("S")


@dataclass(frozen=True, eq=False)
class Personal:
    """What is a device's own: its parameters v, which never leave it, and how much of them it uses.

    Attributes:
        params: v, in the shapes of the device.
        alpha: α in [0, 1], float64: 0-d, or (L,) with one a layer (`tapfl.adapters.mixture.modules_of`).
    """

    params: Params
    alpha: Tensor

    @property
    def mean_alpha(self) -> float:
        """The mean of α over the layers."""
        return float(self.alpha.mean())


def wholly(params: Params) -> Personal:
    """Returns what a device keeps that uses its own parameters alone, α = 1."""
    return Personal(params, torch.ones((), dtype=torch.float64))


@dataclass(frozen=True)
class LocalResult:
    """A round's outcome on one device: what goes up (None: nothing), what stays, and the mean loss of each step."""

    upload: Params | None
    personal: Personal | None
    loss: float


class Method(Protocol, Generic[S]):
    """A method as three pure steps around its own state `S`, and the model that the device then uses.

    Attributes:
        evaluates_after_training: the device uses the result of training on the w just received, so its accuracy is
            measured after the training of a round; otherwise before.
        has_local_state: the device keeps parameters from round to round.
        shares_adapters: the device uploads w.
        models_per_step: number of models that one step trains.
    """

    evaluates_after_training: ClassVar[bool]
    has_local_state: ClassVar[bool]
    shares_adapters: ClassVar[bool]
    models_per_step: ClassVar[int]

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: frozenset[str]) -> S:
        """Returns the state at the start of a round.

        Args:
            received: the device's whole w, its names always in the order of its layout.
            personal: what stayed after the device's last round; None in its first.
            trained: the names that move in this round, in w as in v. The others are constants of the round: they stay
                as they are in `received` and in `personal.params`, to the bit.
        """
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
    trained: frozenset[str],
) -> LocalResult:
    """Returns what a device's round gives, a function of its arguments alone (they are those of `Method.init`)."""
    state = method.init(received, personal, train, trained)
    losses = [method.step(state, objective, batch).detach() for batch in batches]
    upload, stays = method.final(state)
    return LocalResult(upload, stays, float(sum(losses)) / len(losses))
