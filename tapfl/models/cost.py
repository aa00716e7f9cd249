"""What a model costs: parameters, and multiply-accumulates (MACs) for one image."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from tapfl.models.forward import watch_example


class Cost(BaseModel):
    """Parameters, and MACs an image."""

    model_config = ConfigDict(frozen=True)

    params: int
    macs: int


def measure_cost(model: nn.Module) -> Cost:
    """Returns the cost of `model` as it is, pruned or not: linears, convolutions and the two products of attention.

    Counted from the shapes of a real forward pass; norms, activations and additions are not counted, as usual.
    """
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        x = inputs[0]
        if isinstance(module, nn.Linear):
            macs += math.prod(x.shape[:-1]) * module.in_features * module.out_features
        elif isinstance(module, nn.Conv2d):
            macs += output.numel() * module.weight[0].numel()
        elif isinstance(module, Attention | WindowAttention):
            macs += 2 * math.prod(x.shape[:-1]) * x.shape[-2] * module.proj.in_features

    counted = (nn.Linear, nn.Conv2d, Attention, WindowAttention)
    watch_example(model, {module: count for module in model.modules() if isinstance(module, counted)})
    return Cost(params=sum(p.numel() for p in model.parameters()), macs=macs)
