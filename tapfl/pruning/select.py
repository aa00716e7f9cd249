"""Which units stay, given their scores and a width."""

from __future__ import annotations

import torch
from torch import Tensor

from tapfl.models.units import PrunableLayer


def keep_best(layer: PrunableLayer, scores: Tensor, width: int) -> Tensor:
    """Returns the sorted positions of the `width` best units; of an attention, equally many in each head.

    Ties go to the lower position, so the choice depends on nothing but the scores.
    """
    per_head = width // layer.heads
    order = scores.view(layer.heads, layer.units_per_head).argsort(dim=1, descending=True, stable=True)[:, :per_head]
    first = torch.arange(layer.heads)[:, None] * layer.units_per_head
    return (order.sort(dim=1).values + first).flatten()
