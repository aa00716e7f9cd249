"""APFL (Deng, Kamani, Mahdavi 2020, arXiv 2003.13461): adaptive personalised federated learning.

A local step (Algorithm 1); all right-hand sides use the old iterates and the same minibatch ξ:

    w ← w - η ∇f(w; ξ)
    v ← v - η_v α ∇f(v̄; ξ),          v̄ = αv + (1-α)w, with w a constant
    α ← clip(α - η_α ∂f(v̄; ξ)/∂α, 0, 1)

v̄ interpolates effective weights (`tapfl.adapters.lora.interpolate`). Only w is uploaded. v starts as w. The factor α
in the step of v comes from the chain rule; it scales the step under any optimiser (`Trainee.apply_scaled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tapfl.adapters.lora import Pair, interpolate, modules_of, spread
from tapfl.adapters.stack import LINE, lead
from tapfl.config import TrainOptions
from tapfl.personalize.held_out import Losses, held_out_alpha
from tapfl.personalize.method import Method, Names, Personal, Trainee
from tapfl.training import Objective, Params


@dataclass
class ApflState:
    """w and v in training, α, and the number of steps in this round so far."""

    w: Trainee
    v: Trainee
    alpha: Tensor
    steps: int = 0


@dataclass(frozen=True)
class Apfl(Method[ApflState]):
    """APFL.

    Attributes:
        alpha: α before a device's first round; for stacked devices (K, 1).
        update: whether training updates α at each step, at the first step of a round, or never; `weigh` may still
            choose it.
        alpha_learning_rate: η_α.
        per: one α per device, or one per layer (`tapfl.adapters.lora.modules_of`).
        learning_rate: η_v; 0 means η.
    """

    steady: ClassVar[bool] = True

    alpha: float = 0.5
    update: Literal["round", "step", "fixed"] = "round"
    alpha_learning_rate: float = 0.1
    per: Literal["device", "layer"] = "device"
    learning_rate: float = 0.0

    @property
    def together(self) -> bool:  # type: ignore[override]  # a class variable of the other methods
        return self.per == "device"

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: Names) -> ApflState:
        personal = personal or self._first(received)
        v = {name: personal.params[name] for name in received}
        own = Trainee.of(v, train, trained, self.learning_rate)
        return ApflState(Trainee.of(received, train, trained), own, personal.alpha.clone())

    def step(self, state: ApflState, objective: Objective, batch: object) -> Tensor:
        update_alpha = self.update == "step" or (self.update == "round" and state.steps == 0)
        alpha = state.alpha.clone().requires_grad_(update_alpha)
        losses = objective(Pair(state.w.params, state.v.params, alpha), batch)
        gradients = state.w.gradients(losses, *state.v.moving.values(), *([alpha] if update_alpha else []))
        of_w, of_v = gradients[: len(state.w.moving)], gradients[len(state.w.moving) :][: len(state.v.moving)]
        state.w.apply(of_w)
        state.v.apply_scaled(of_v, spread(state.alpha, state.w.params, state.v.moving, LINE))
        if update_alpha:
            state.alpha.sub_(self.alpha_learning_rate * gradients[-1]).clamp_(0, 1)
        state.steps += 1
        return losses[1]

    def final(self, state: ApflState) -> tuple[Params | None, Personal | None]:
        return state.w.values(), Personal(state.v.values(), state.alpha)

    def inference(self, received: Params, personal: Personal | None) -> Params:
        return interpolate(personal.params, received, personal.alpha) if personal else received

    def weigh(self, received: Params, personal: Personal, batches: Sequence[Losses]) -> Personal:
        """Returns the private model with the α that the held-out images give for the w just received."""
        return Personal(personal.params, held_out_alpha(personal.params, received, batches))

    def _first(self, received: Params) -> Personal:
        theta = next(iter(received.values()))
        alpha = torch.tensor(self.alpha, dtype=torch.float64, device=theta.device)
        if lead(theta):
            return Personal(received, alpha.repeat(len(theta), 1))
        return Personal(received, alpha if self.per == "device" else alpha.repeat(len(modules_of(received))))
