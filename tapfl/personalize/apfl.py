"""APFL (Deng, Kamani, Mahdavi 2020, arXiv 2003.13461): adaptive personalised federated learning.

A local step, all right-hand sides from the old iterates and the same minibatch ξ (Algorithm 1):

    w ← w - η ∇f(w; ξ)
    v ← v - η ∇_v f(v̄; ξ),           v̄ = αv + (1-α)w with w held fixed
    α ← clip(α - η_α ∂f(v̄; ξ)/∂α, 0, 1)

The mixture v̄ is in effective weights (`tapfl.adapters.lora.mix`). Only w goes up. v starts as w.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tapfl.adapters.lora import mix
from tapfl.config import TrainOptions
from tapfl.personalize.method import Personal
from tapfl.personalize.trainee import Trainee
from tapfl.training import Objective, Params


@dataclass
class ApflState:
    """w and v in training, α, and the number of steps that this round has seen."""

    w: Trainee
    v: Trainee
    alpha: Tensor
    steps: int = field(default=0)


@dataclass(frozen=True)
class Apfl:
    """APFL with α at the start, when α is updated (each step, the first of a round, never), and its step size η_α."""

    alpha: float = 0.5
    update: Literal["round", "step", "fixed"] = "round"
    alpha_learning_rate: float = 0.1

    tunes: ClassVar[bool] = False

    def init(
        self, received: Params, personal: Personal | None, train: TrainOptions, trained: frozenset[str]
    ) -> ApflState:
        personal = personal or self._first(received)
        return ApflState(
            Trainee.of(received, train, trained), Trainee.of(personal.params, train, trained), personal.alpha
        )

    def step(self, state: ApflState, objective: Objective, batch: object) -> Tensor:
        w_gradients = state.w.gradients(objective(state.w.params, batch))
        moving = self.update == "step" or (self.update == "round" and state.steps == 0)
        alpha = state.alpha.clone().requires_grad_(moving)
        loss = objective(mix(state.v.params, state.w.values(), alpha), batch)
        gradients = torch.autograd.grad(loss, [*state.v.moving.values(), *([alpha] if moving else [])])
        state.w.apply(w_gradients)
        state.v.apply(gradients[: len(state.v.moving)])
        if moving:
            state.alpha = (state.alpha - self.alpha_learning_rate * gradients[-1]).clamp(0, 1)
        state.steps += 1
        return loss

    def final(self, state: ApflState) -> tuple[Params | None, Personal | None]:
        return state.w.values(), Personal(state.v.values(), state.alpha)

    def inference(self, received: Params, personal: Personal | None) -> Params:
        personal = personal or self._first(received)
        return mix(personal.params, received, personal.alpha)

    def _first(self, received: Params) -> Personal:
        return Personal(received, torch.tensor(self.alpha, dtype=torch.float64))
