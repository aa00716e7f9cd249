"""Norm clipping of what a device changed (Sun et al. 2019, arXiv 1911.07963, where it bounds what one device can do).

The same function bounds the sensitivity of the private sums (`tapfl.adapters.private`): there the device clips as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tapfl.adapters.layout import Layout, to_global_scale
from tapfl.training import Params


def clip_update(params: Mapping[str, Tensor], received: Mapping[str, Tensor], layout: Layout, bound: float) -> Params:
    """Returns received + (params - received) · min(1, bound / ‖params - received‖₂), in the shapes of the device.

    The norm is that of all tensors of the layout together and on the global scale, on which the server sums: the rows
    of q are larger there (`Placement.row_scale`). What is within the bound comes back as it is, the
    rest in float64.
    """
    change = {name: params[name].double() - received[name].double() for name in layout}
    squares = sum(to_global_scale(change[name], place).square().sum() for name, place in layout.items())
    norm = float(torch.as_tensor(squares).sqrt())
    if norm <= bound:
        return {name: params[name] for name in layout}
    return {name: received[name].double() + change[name] * (bound / norm) for name in layout}
