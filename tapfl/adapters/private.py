"""Client-level differential privacy of a round's mean (Gaussian mechanism; McMahan et al. 2018, arXiv 1710.06963).

Every device counts once and its whole update is clipped to an L2 norm of C (`tapfl.adapters.clip`), so that one device
more or less moves the sum of the updates by at most C. N(0, (zC)²) is added to that sum in every coordinate, and the
result is divided by the number of the coordinate's holders. Who holds what is taken as public: kept units, ranks, and
with `head = class-rows` classes. A coordinate without a holder keeps its value and needs no noise. What the server's
optimiser makes of the mean is post-processing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tapfl.adapters.layout import Part, overlap_sums, quotient
from tapfl.adapters.rule import Combine


def noisy_mean(std: float, generator: torch.Generator) -> Combine:
    """Returns a function like `scatter_mean` that adds N(0, std²) to each sum before it is divided."""

    def combine(previous: Tensor, parts: Sequence[Part]) -> Tensor:
        total, holders = overlap_sums(previous.shape, parts)
        noise = torch.randn(previous.shape, generator=generator, dtype=torch.float64)
        return quotient(total + std * noise, holders, previous)

    return combine
