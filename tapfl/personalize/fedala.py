"""FedALA (Zhang et al. 2023, arXiv 2212.01197): adaptive local aggregation.

A device does not train and evaluate the received w itself, but a mixture of it and its own model v of the last round
(Algorithm 1, equations 4-6):

    Θ = v + (w - v) ⊙ W,     W ← clip(W - η ∂f(Θ; ξ)/∂W, 0, 1)

W is learnt before each round on a fraction of the device's training images: the first time from W = 1 in several
epochs, and later in one epoch. Then Θ is trained and uploaded, and the result is the next v.

Different from the paper, W has one number per layer (`tapfl.adapters.lora.modules_of`) instead of one per parameter,
because many pairs of LoRA factors have the same product. The code stores α = 1 - W, the weight of v, as in APFL.
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

FIRST_EPOCHS = 10  # the authors' code stops when the loss has been stable for ten epochs


@dataclass
class AlaState:
    """Θ in training, and α of this round."""

    w: Trainee
    alpha: Tensor


@dataclass(frozen=True)
class FedAla(Method[AlaState]):
    """FedALA.

    Attributes:
        learning_rate_w: η, the learning rate of W.
        layers: number of last layers whose W is learnt; the others use w. 0 means all.
        products: whether to mix effective weights, which the best approximation of the device's rank then replaces, or
            to mix the factors. A rule that averages products returns factors in another basis each round, so factors
            cannot be mixed. Other rules average factors, which must then keep their basis on the device.
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
        """Returns `personal` with α (L,) learnt for the w just received. Before it is first learnt, α is 0-d."""
        count, first = len(modules_of(received)), personal.alpha.dim() == 0
        alpha = personal.alpha.new_zeros(count) if first else personal.alpha
        learnt = torch.arange(count, device=alpha.device) >= (count - self.layers if self.layers else 0)
        mix = interpolate if self.products else of_factors
        for losses in [*batches] * (FIRST_EPOCHS if first else 1):
            leaf = alpha.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(losses(mix(personal.params, received, leaf)).mean(), leaf)
            alpha = torch.where(learnt, (alpha - self.learning_rate_w * gradient).clamp(0, 1), alpha)
        return Personal(personal.params, alpha)

    def inference(self, received: Params, personal: Personal | None) -> Params:
        """Returns Θ, in the shapes of w."""
        if personal is None or not personal.alpha.any():
            return received
        if self.products:
            return of_products(personal.params, received, personal.alpha)
        return of_factors(personal.params, received, personal.alpha)


def of_factors(v: Params, w: Params, alpha: Tensor) -> Params:
    """Returns w + α(v - w), tensor by tensor. A tensor that is equal in v and w is unchanged to the bit."""
    alphas = alphas_of(w, alpha)
    return {name: theta + alphas[name].to(theta.dtype) * (v[name] - theta) for name, theta in w.items()}


def of_products(v: Params, w: Params, alpha: Tensor) -> Params:
    """Returns ``interpolate(v, w, alpha)`` with each product approximated by factors of the rank of w."""
    mixed, alphas = interpolate(v, w, alpha), alphas_of(w, alpha)
    for a in [name for name in w if name.endswith(LORA_A)]:
        b = a.removesuffix(LORA_A) + LORA_B
        if alphas[a] == 0:
            mixed[a], mixed[b] = w[a], w[b]
        else:
            mixed[b], mixed[a] = best_rank(mixed[b].double(), mixed[a].double(), w[a])
    return {name: mixed[name].to(theta.dtype) for name, theta in w.items()}
