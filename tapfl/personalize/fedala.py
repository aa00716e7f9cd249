"""FedALA (Zhang et al. 2023, arXiv 2212.01197): adaptive local aggregation.

A device starts a round, and is evaluated, not with the w received but with a mixture of it and its own model v of the
last round (Algorithm 1, equations 4-6):

    Θ = v + (w - v) ⊙ W,     W ← clip(W - η ∂f(Θ; ξ)/∂W, 0, 1)

W is learnt on a share of the device's training images before each round, in one epoch, and from W = 1 in several when
it is learnt first. Then Θ is trained and uploaded; v is the result.

Ours: W has one number a layer (`tapfl.adapters.lora.modules_of`), not one a parameter, of which a pair of factors has
many with one product. α = 1 - W is kept, the weight of v as in APFL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tapfl.adapters.flex import best_rank
from tapfl.adapters.layout import LORA_A, LORA_B
from tapfl.adapters.lora import alphas_of, interpolate, modules_of
from tapfl.config import TrainOptions
from tapfl.personalize.held_out import Losses
from tapfl.personalize.method import Method, Names, Personal, Trainee
from tapfl.training import Objective, Params

FIRST_EPOCHS = 10  # the authors' code stops when the loss is steady over ten epochs


@dataclass
class AlaState:
    """Θ in training, and α of this round."""

    w: Trainee
    alpha: Tensor


@dataclass(frozen=True)
class FedAla(Method[AlaState]):
    """FedALA.

    Attributes:
        learning_rate_w: η, of W.
        layers: number of last layers whose W is learnt; the others take w. 0: all.
        products: mix effective weights, of which the start is the best approximation of the device's rank; otherwise
            mix the factors. A rule that averages products turns the factors anew in each round; the others average
            factors, which must then not be turned on a device.
    """

    models_per_step: ClassVar[int] = 1

    learning_rate_w: float = 1.0
    layers: int = 0
    products: bool = True

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: Names) -> AlaState:
        device = next(iter(received.values())).device
        alpha = personal.alpha if personal else torch.zeros((), dtype=torch.float64, device=device)
        start = self.inference(received, personal)
        start = {name: start[name] if name in trained else theta for name, theta in received.items()}
        return AlaState(Trainee.of(start, train, trained), alpha)

    def step(self, state: AlaState, objective: Objective, batch: object) -> Tensor:
        loss = objective(state.w.params, batch)
        state.w.apply(state.w.gradients(loss))
        return loss

    def final(self, state: AlaState) -> tuple[Params | None, Personal | None]:
        return state.w.values(), Personal(state.w.values(), state.alpha)

    def weigh(self, received: Params, personal: Personal, batches: Sequence[Losses]) -> Personal:
        """Returns `personal` with the α that is learnt for the w just received; 0-d before it is learnt first."""
        count, first = len(modules_of(received)), personal.alpha.dim() == 0
        alpha = personal.alpha.new_zeros(count) if first else personal.alpha
        moves = torch.arange(count, device=alpha.device) >= (count - self.layers if self.layers else 0)
        mix = interpolate if self.products else of_factors
        for losses in [*batches] * (FIRST_EPOCHS if first else 1):
            leaf = alpha.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(losses(mix(personal.params, received, leaf)).mean(), leaf)
            alpha = torch.where(moves, (alpha - self.learning_rate_w * gradient).clamp(0, 1), alpha)
        return Personal(personal.params, alpha)

    def inference(self, received: Params, personal: Personal | None) -> Params:
        """Returns Θ, in the shapes of w."""
        if personal is None or not personal.alpha.any():
            return received
        if self.products:
            return of_products(personal.params, received, personal.alpha)
        return of_factors(personal.params, received, personal.alpha)


def of_factors(v: Params, w: Params, alpha: Tensor) -> Params:
    """Returns w + α(v - w), tensor by tensor; a tensor that is the same in v and w stays so to the bit."""
    each = alphas_of(w, alpha)
    return {name: theta + each[name].to(theta.dtype) * (v[name] - theta) for name, theta in w.items()}


def of_products(v: Params, w: Params, alpha: Tensor) -> Params:
    """Returns `interpolate`, each product approximated by factors of the rank that it has in w."""
    mixed, each = interpolate(v, w, alpha), alphas_of(w, alpha)
    for a in [name for name in w if name.endswith(LORA_A)]:
        b = a.removesuffix(LORA_A) + LORA_B
        if each[a] == 0:
            mixed[a], mixed[b] = w[a], w[b]
        else:
            mixed[b], mixed[a] = best_rank(mixed[b].double(), mixed[a].double(), w[a])
    return {name: mixed[name].to(theta.dtype) for name, theta in w.items()}
