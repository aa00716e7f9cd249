"""Client-level differential privacy of the uploaded adapters: the clip, and what the noise is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tapfl.adapters.layout import Params


def clip_to_norm(update: Mapping[str, Tensor], norm: float) -> Params:
    """Returns min(1, norm / ‖update‖₂) · update, the norm taken over all tensors together, in float64.

    The result never exceeds `norm`, rounding to the tensors' own type included, whatever is finite in the update; a
    shorter one is returned bit for bit.

    Args:
        update: what a device uploads minus what it received, by name, on the scale on which the server adds updates up
            (`to_global_scale`): on another one the bound would be another.
        norm: the largest L2 norm, above 0.
    """
    length = l2_norm(update)
    if length <= norm:
        return dict(update)
    scale = norm / length
    clipped = {name: (value.double() * scale).to(value.dtype) for name, value in update.items()}
    while l2_norm(clipped) > norm:  # rounding to nearest may end a hair outside
        scale *= 1 - torch.finfo(torch.float32).eps
        clipped = {name: (value.double() * scale).to(value.dtype) for name, value in update.items()}
    return clipped


def l2_norm(update: Mapping[str, Tensor]) -> float:
    """Returns √Σ x² over all values of all tensors."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in update.values()))
