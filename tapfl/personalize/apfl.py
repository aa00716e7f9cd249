"""APFL (Deng, Kamani, Mahdavi 2020, arXiv 2003.13461): adaptive personalised federated learning.

A local step, all right-hand sides from the old iterates and the same minibatch ξ (Algorithm 1):

    w ← w - η ∇f(w; ξ)
    v ← v - η ∇_v f(v̄; ξ),           v̄ = αv + (1-α)w with w held fixed
    α ← clip(α - η_α ∂f(v̄; ξ)/∂α, 0, 1)

The mixture v̄ is in effective weights (`tapfl.adapters.mixture`). Only w goes up. v starts as w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tapfl.adapters.mixture import Pair, mix, modules_of
from tapfl.config import TrainOptions
from tapfl.personalize.method import Personal
from tapfl.personalize.trainee import Trainee
from tapfl.training import Objective, Params


@dataclass
class ApflState:
    """w and v in training, α, and the number of steps that this round has seen.

    Attributes:
        stacked: the memory of both, (2, ...) a tensor, w at 0 and v at 1.
    """

    stacked: Params
    w: Trainee
    v: Trainee
    alpha: Tensor
    steps: int = field(default=0)


@dataclass(frozen=True)
class Apfl:
    """APFL.

    Attributes:
        alpha: α before a device's first round.
        update: whether α moves at each step, at the first of a round, or never.
        alpha_learning_rate: η_α.
        per: one α a device, or one a layer (`tapfl.adapters.mixture.modules_of`).
        passes: w and the mixture one after the other, or as the two halves of one batch, for which the objective must
            take a `Pair`. The same up to rounding; one batch is faster where a backbone is small.
    """

    alpha: float = 0.5
    update: Literal["round", "step", "fixed"] = "round"
    alpha_learning_rate: float = 0.1
    per: Literal["device", "layer"] = "device"
    passes: Literal["one", "two"] = "two"

    evaluates_after_training: ClassVar[bool] = False
    has_local_state: ClassVar[bool] = True
    shares_adapters: ClassVar[bool] = True
    models_per_step: ClassVar[int] = 2

    def init(
        self, received: Params, personal: Personal | None, train: TrainOptions, trained: frozenset[str]
    ) -> ApflState:
        personal = personal or self._first(received)
        stacked = {name: torch.stack([theta.detach(), personal.params[name]]) for name, theta in received.items()}
        w, v = (Trainee.over({name: both[i] for name, both in stacked.items()}, train, trained) for i in (0, 1))
        return ApflState(stacked, w, v, personal.alpha)

    def step(self, state: ApflState, objective: Objective, batch: object) -> Tensor:
        moves = self.update == "step" or (self.update == "round" and state.steps == 0)
        alpha = state.alpha.clone().requires_grad_(moves)
        run = _in_one_pass if self.passes == "one" else _in_two_passes
        loss, of_w, of_v, of_alpha = run(state, alpha, objective, batch)
        state.w.apply(of_w)
        state.v.apply(of_v)
        if of_alpha is not None:
            state.alpha = (state.alpha - self.alpha_learning_rate * of_alpha).clamp(0, 1)
        state.steps += 1
        return loss

    def final(self, state: ApflState) -> tuple[Params | None, Personal | None]:
        w, v = ({name: both[i].clone() for name, both in state.stacked.items()} for i in (0, 1))
        return w, Personal(v, state.alpha)

    def inference(self, received: Params, personal: Personal | None) -> Params:
        personal = personal or self._first(received)
        return mix(personal.params, received, personal.alpha)

    def _first(self, received: Params) -> Personal:
        alpha = torch.tensor(self.alpha, dtype=torch.float64)
        return Personal(received, alpha if self.per == "device" else alpha.repeat(len(modules_of(received))))


Gradients = tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor | None]
"""The loss of the mixture; the gradients of w and of v; that of α if it moves."""


def _in_one_pass(state: ApflState, alpha: Tensor, objective: Objective, batch: object) -> Gradients:
    """w and v as one tensor: fewer and larger operations."""
    pair = Pair({name: both.detach() for name, both in state.stacked.items()}, alpha)
    targets = [pair[name].requires_grad_() for name in state.w.moving]
    losses = objective(pair, batch)
    gradients, of_alpha = _gradients(losses.sum(), targets, alpha)
    of_w, of_v = zip(*(both.unbind() for both in gradients), strict=True)
    return losses[1], of_w, of_v, of_alpha


def _in_two_passes(state: ApflState, alpha: Tensor, objective: Objective, batch: object) -> Gradients:
    """One after the other: the activations of one model at a time."""
    of_w = state.w.gradients(objective(state.w.params, batch))
    loss = objective(mix(state.v.params, state.w.values(), alpha), batch)
    of_v, of_alpha = _gradients(loss, list(state.v.moving.values()), alpha)
    return loss, of_w, of_v, of_alpha


def _gradients(loss: Tensor, targets: list[Tensor], alpha: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
    if not alpha.requires_grad:
        return torch.autograd.grad(loss, targets), None
    *gradients, of_alpha = torch.autograd.grad(loss, [*targets, alpha])
    return tuple(gradients), of_alpha
