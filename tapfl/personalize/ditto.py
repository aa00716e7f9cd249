"""Ditto (Li et al. 2021, arXiv 2012.04221): a personal model that is pulled towards the shared one.

    w ← w - η ∇f(w; ξ)
    v ← v - η (∇f(v; ξ) + λ ∇_v d(v, w_received)),     d = ½ ‖θ(v) - θ(w_received)‖²

θ are the model's weights, as published. With adapters these are W₀ + s BA, so the distance is one of effective weights,
½ s² ‖B_vA_v - B_wA_w‖² a pair, as APFL's mixture is one of them: the factors of one BA are many, and the rule `flex`
gives others each round, so that a distance of raw factors would pull v towards an arbitrary choice of them. What is
trained whole counts as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tapfl.adapters.layout import LORA_A, LORA_B
from tapfl.config import TrainOptions
from tapfl.personalize.method import Personal, wholly
from tapfl.personalize.trainee import Trainee
from tapfl.training import Objective, Params


@dataclass(frozen=True)
class DittoState:
    """w and v in training, and what w was when it came."""

    w: Trainee
    v: Trainee
    received: Params


@dataclass(frozen=True)
class Ditto:
    """Ditto with the strength λ of the pull, and s of the adapters."""

    strength: float
    scale: float

    evaluates_after_training: ClassVar[bool] = False
    has_local_state: ClassVar[bool] = True
    shares_adapters: ClassVar[bool] = True
    models_per_step: ClassVar[int] = 2

    def init(
        self, received: Params, personal: Personal | None, train: TrainOptions, trained: frozenset[str]
    ) -> DittoState:
        v = personal.params if personal else received
        return DittoState(Trainee.of(received, train, trained), Trainee.of(v, train, trained), received)

    def step(self, state: DittoState, objective: Objective, batch: object) -> Tensor:
        state.w.apply(state.w.gradients(objective(state.w.params, batch)))
        loss = objective(state.v.params, batch)
        gradients = state.v.gradients(loss)
        v = state.v.values()
        pull = (pull_of(name, v, state.received, self.scale) for name in state.v.moving)
        state.v.apply([g + self.strength * p for g, p in zip(gradients, pull, strict=True)])
        return loss

    def final(self, state: DittoState) -> tuple[Params | None, Personal | None]:
        return state.w.values(), wholly(state.v.values())

    def inference(self, received: Params, personal: Personal | None) -> Params:
        return personal.params if personal else received


def pull_of(name: str, v: Params, w: Params, scale: float) -> Tensor:
    """Returns ∂d/∂v[name], without a product of the size of the weights.

    With D = B_vA_v - B_wA_w it is s² B_vᵀD for A_v, s² D A_vᵀ for B_v, and v - w for what is trained whole.
    """
    if name.endswith(LORA_A):
        other = name.removesuffix(LORA_A) + LORA_B
        return scale**2 * ((v[other].T @ v[other]) @ v[name] - (v[other].T @ w[other]) @ w[name])
    if name.endswith(LORA_B):
        other = name.removesuffix(LORA_B) + LORA_A
        return scale**2 * (v[name] @ (v[other] @ v[other].T) - w[name] @ (w[other] @ v[other].T))
    return v[name] - w[name]
