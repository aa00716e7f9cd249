"""Per-FedAvg (Fallah, Mokhtari, Ozdaglar 2020, arXiv 2002.07948): a shared w that one gradient step adapts to a device.

This is Algorithm 1 in its first-order variant, FO (section 5), which leaves out the Hessian. A local step takes two
batches:

    w̃ ← w - α ∇f(w; D)
    w ← w - β ∇f(w̃; D')

The device uses w_received - α ∇f(w_received; D), with the first batch D of a round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tapfl.config import TrainOptions
from tapfl.personalize.method import Method, Names, Personal, Trainee, wholly
from tapfl.training import Objective, Params


@dataclass
class PerFedAvgState:
    """The state of a round.

    Attributes:
        w: w in training.
        left: number of remaining batches.
        adapted: w̃ between the two batches of a step, with its trained tensors as leaves; otherwise None.
        used: the first w̃ of the round, which the device uses.
    """

    w: Trainee
    left: int
    adapted: Params | None = None
    used: Params | None = None


@dataclass(frozen=True)
class PerFedAvg(Method[PerFedAvgState]):
    """Per-FedAvg (FO). The steps of w use the optimiser of `train`; the adaptation is a plain gradient step.

    If a round has an odd number of batches, the last one serves as both D and D'.

    Attributes:
        inner_learning_rate: α.
    """

    evaluates_after_training: ClassVar[bool] = True
    has_local_state: ClassVar[bool] = False

    inner_learning_rate: float = 0.1

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: Names) -> PerFedAvgState:
        return PerFedAvgState(Trainee.of(received, train, trained), train.steps)

    def step(self, state: PerFedAvgState, objective: Objective, batch: object) -> Tensor:
        state.left -= 1
        if state.adapted is None:
            loss = objective(state.w.params, batch)
            state.adapted = self._adapted(state.w, state.w.gradients(loss))
            state.used = state.used or {name: theta.detach() for name, theta in state.adapted.items()}
            if state.left != 0:
                return loss
        loss = objective(state.adapted, batch)
        state.w.apply(torch.autograd.grad(loss, [state.adapted[name] for name in state.w.moving]))
        state.adapted = None
        return loss

    def final(self, state: PerFedAvgState) -> tuple[Params | None, Personal | None]:
        return state.w.values(), wholly(state.used or state.w.values())

    def _adapted(self, w: Trainee, gradients: tuple[Tensor, ...]) -> Params:
        values = w.values()
        for name, g in zip(w.moving, gradients, strict=True):
            values[name] = (values[name] - self.inner_learning_rate * g).requires_grad_()
        return values
