"""The server's optimiser: a round's change as a pseudo-gradient g = previous - combined.

    FedAvgM (Hsu, Qi, Brown 2019, arXiv 1909.06335):     m ← βm + g,  θ ← θ - ηm
    FedAdam (Reddi et al. 2021, arXiv 2003.00295, Alg. 2): m ← β₁m + (1 - β₁)g,  v ← β₂v + (1 - β₂)g²,
                                                          θ ← θ - ηm / (√v + τ);  v starts at τ², no bias correction

A coordinate that nobody held in a round says nothing of itself: neither it nor its moments move. Else a neuron that
only an absent device has would drift on what the device said long ago.

Moments are float32, one (FedAvgM) or two (FedAdam) of the size of what they act on: of the adapters for every rule but
`flex`, of the dense weights of the adapted linears for that one, because the factors of an SVD turn from round to round
and their products do not. For DeiT-S with rank 8 that is 2.4 or
4.7 MB, and the head's, against 85 or 170 MB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tapfl.config import AdapterOptions
from tapfl.training import Params

DEFAULT_LEARNING_RATE = {"momentum": 1.0, "adam": 0.01}


class ServerOptimizer:
    """One round's steps: reads the moments of the round before and collects those of this one in `moments`."""

    def __init__(self, options: AdapterOptions, moments: Params) -> None:
        self.options, self.moments = options, dict(moments)
        self.rate = options.server_learning_rate or DEFAULT_LEARNING_RATE[options.server]

    def step(self, name: str, previous: Tensor, combined: Tensor, held: Tensor) -> Tensor:
        """Returns the next θ of a tensor, in the dtype of the previous one; `held` (bool) says where it may move."""
        β, theta = self.options.server_momentum, previous.double()
        g = theta - combined.double()
        if self.options.server == "momentum":
            direction = self._moment("momentum", name, held, lambda m: β * m + g)
        else:
            β2, τ = self.options.server_beta2, self.options.server_epsilon
            m = self._moment("momentum", name, held, lambda m: β * m + (1 - β) * g)
            v = self._moment("variance", name, held, lambda v: β2 * v + (1 - β2) * g.square(), start=τ**2)
            direction = m / (v.sqrt() + τ)
        return torch.where(held, theta - self.rate * direction, theta).to(previous.dtype)

    def _moment(
        self, kind: str, name: str, held: Tensor, follow: Callable[[Tensor], Tensor], start: float = 0.0
    ) -> Tensor:
        """Returns the next value of a moment, float64, and keeps it."""
        key = f"{kind}.{name}"
        before = self.moments[key].double() if key in self.moments else torch.full(held.shape, start).double()
        after = torch.where(held, follow(before), before)
        self.moments[key] = after.float()
        return after
