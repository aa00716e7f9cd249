"""APFL (Deng, Kamani, Mahdavi 2020, arXiv 2003.13461): adaptive personalised federated learning.

A local step, all right-hand sides from the old iterates and the same minibatch ξ (Algorithm 1):

    w ← w - η ∇f(w; ξ)
    v ← v - η ∇_v f(v̄; ξ),           v̄ = αv + (1-α)w with w held fixed
    α ← clip(α - η_α ∂f(v̄; ξ)/∂α, 0, 1)

The mixture v̄ is in effective weights (`tapfl.adapters.lora.mix`). Only w goes up. v starts as w.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tapfl.adapters.lora import mix
from tapfl.config import TrainOptions
from tapfl.personalize.fedavg import Trainee
from tapfl.personalize.method import Personal
from tapfl.training import Objective, Params


@dataclass
class ApflState:
    """w and v in training, α, and the number of steps that this round has seen."""

    w: Trainee
    v: Trainee
    alpha: float
    steps: int = field(default=0)


@dataclass(frozen=True)
class Apfl:
    """APFL with α at the start, when α is updated (each step, the first of a round, never), and its step size η_α."""

    alpha: float = 0.5
    update: Literal["round", "step", "fixed"] = "round"
    alpha_learning_rate: float = 0.1

    def init(self, received: Params, personal: Personal | None, train: TrainOptions) -> ApflState:
        personal = personal or Personal(received, self.alpha)
        return ApflState(Trainee.of(received, train), Trainee.of(personal.params, train), personal.alpha)

    def step(self, state: ApflState, objective: Objective, batch: object) -> Tensor:
        w_gradients = state.w.gradients(objective(state.w.params, batch))
        moving = self.update == "step" or (self.update == "round" and state.steps == 0)
        alpha = torch.tensor(state.alpha, dtype=torch.float64, requires_grad=moving)
        fixed_w = {name: parameter.detach() for name, parameter in state.w.params.items()}
        loss = objective(mix(state.v.params, fixed_w, alpha), batch)
        targets = [*state.v.params.values(), *([alpha] if moving else [])]
        gradients = torch.autograd.grad(loss, targets)
        state.w.apply(w_gradients)
        state.v.apply(gradients[: len(state.v.params)])
        if moving:
            state.alpha = min(max(state.alpha - self.alpha_learning_rate * float(gradients[-1]), 0.0), 1.0)
        state.steps += 1
        return loss

    def final(self, state: ApflState) -> tuple[Params | None, Personal | None]:
        return state.w.result(), Personal(state.v.result(), state.alpha)

    def inference(self, received: Params, personal: Personal | None) -> Params:
        personal = personal or Personal(received, self.alpha)
        return mix(personal.params, received, personal.alpha)
