"""Methods that pull one set of weights towards another.

As published, the distance is between the weights θ of two models. With adapters the weights are W₀ + s BA, so the
distance is between effective weights, d = ½ s² ‖B_vA_v - B_wA_w‖² for each pair of factors. Many pairs of factors have
the same product BA, and the rule `flex` sends a different pair each round, so a distance between factors would pull
towards an arbitrary one of them. Parameters without factors are compared directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tapfl.adapters.layout import LORA_A, LORA_B
from tapfl.personalize.fedavg import FedAvg, Trainees, TwoModels
from tapfl.personalize.method import Trainee
from tapfl.training import Objective, Params


@dataclass(frozen=True)
class Ditto(TwoModels):
    """Ditto (Li et al. 2021, arXiv 2012.04221): a private model that is pulled towards the shared one.

        w ← w - η ∇f(w; ξ)
        v ← v - η_v (∇f(v; ξ) + λ ∇_v d(v, w_received)),     d = ½ ‖θ(v) - θ(w_received)‖²

    Attributes:
        strength: λ.
        scale: s.
        learning_rate: η_v; 0 means η.
    """

    together: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    strength: float
    scale: float
    learning_rate: float = 0.0

    def step(self, state: Trainees, objective: Objective, batch: object) -> Tensor:
        state.w.apply(state.w.gradients(objective(state.w.params, batch)))
        loss = objective(state.v.params, batch)
        state.v.apply(pulled(state.v.gradients(loss), state.v, state.w.start, self.strength, self.scale))
        return loss


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedProx (Li et al. 2020, arXiv 1812.06127, equation 2): FedAvg that stays close to the received w.

        w ← w - η ∇_w (f(w; ξ) + μ d(w, w_received)),     d = ½ ‖θ(w) - θ(w_received)‖²

    Nothing is personal. A device always does all of its work; the paper's γ-inexact solutions of slow devices are not
    simulated.

    Attributes:
        strength: μ.
        scale: s.
    """

    strength: float
    scale: float

    def step(self, state: Trainee, objective: Objective, batch: object) -> Tensor:
        loss = objective(state.params, batch)
        state.apply(pulled(state.gradients(loss), state, state.start, self.strength, self.scale))
        return loss


@dataclass(frozen=True)
class PFedMe(TwoModels):
    """pFedMe (T. Dinh, Tran, Nguyen 2020, arXiv 2006.08848, Algorithm 1): FedAvg of the devices' Moreau envelopes.

        θ ≈ argmin_θ f(θ; ξ) + λ d(θ, w)     by `inner_steps` steps on one batch, from the previous θ
        w ← w - η λ ∇_w d(w, θ)              for parameters without factors: w - ηλ (w - θ)

    In each round θ starts as the w just received. The device uses θ at the end of the round and keeps nothing for the
    next. Both steps use the optimiser of `train`; with `sgd` they are as published.

    Attributes:
        strength: λ.
        scale: s.
        inner_steps: K.
        learning_rate: of θ; 0 means η.
    """

    evaluates_after_training: ClassVar[bool] = True
    has_local_state: ClassVar[bool] = False

    strength: float
    scale: float
    inner_steps: int = 5
    learning_rate: float = 0.0

    @property
    def models_per_step(self) -> int:
        return self.inner_steps

    def step(self, state: Trainees, objective: Objective, batch: object) -> Tensor:
        w, theta = state.w.values(), state.v
        for _ in range(self.inner_steps):
            loss = objective(theta.params, batch)
            theta.apply(pulled(theta.gradients(loss), theta, w, self.strength, self.scale))
        now = theta.values()
        state.w.apply([self.strength * pull_of(name, w, now, self.scale) for name in state.w.moving])
        return loss


def pulled(gradients: Sequence[Tensor], trainee: Trainee, to: Params, strength: float, scale: float) -> list[Tensor]:
    """Returns the gradients of the trained parameters plus those of strength · d(trainee, to)."""
    now = trainee.values()
    pulls = (pull_of(name, now, to, scale) for name in trainee.moving)
    return [g + strength * pull for g, pull in zip(gradients, pulls, strict=True)]


def pull_of(name: str, v: Params, w: Params, scale: float) -> Tensor:
    """Returns ∂d/∂v[name] without computing a product of the size of the weights.

    With D = B_vA_v - B_wA_w, it is s² B_vᵀD for A_v, s² D A_vᵀ for B_v, and v - w for parameters without factors.
    """
    if name.endswith(LORA_A):
        other = name.removesuffix(LORA_A) + LORA_B
        return scale**2 * ((v[other].mT @ v[other]) @ v[name] - (v[other].mT @ w[other]) @ w[name])
    if name.endswith(LORA_B):
        other = name.removesuffix(LORA_B) + LORA_A
        return scale**2 * (v[name] @ (v[other] @ v[other].mT) - w[name] @ (w[other] @ v[other].mT))
    return v[name] - w[name]
