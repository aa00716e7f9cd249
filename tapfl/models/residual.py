"""The residual stream around a prunable branch: x + scale · branch(norm(x)), in timm's pre-norm blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerScale
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tapfl.errors import ModelError
from tapfl.models.units import PrunableLayer, replaced

PLACE = {"attention": "1", "ffn": "2"}  # norm1 and ls1 belong to the attention of a block, norm2 and ls2 to its FFN


@dataclass(frozen=True)
class Passage:
    """What one pass of a block showed of a branch.

    Attributes:
        stream: the residual stream that the branch's norm read.
        arguments: what the branch was called with (positional, by name).
        units: input of the branch's output linear, with 0 units where the branch is gone.
        output: what the branch gave back.
    """

    stream: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    units: Tensor
    output: Tensor


@torch.no_grad()
def observe(model: nn.Module, layer: PrunableLayer, step: Callable[[Tensor], Tensor], x: Tensor) -> Passage:
    """Returns the passage of `x` through the branch `layer` when `step` (its block) takes it.

    Raises:
        ModelError: if the block is not of timm's pre-norm kinds.
    """
    branch: Any = model.get_submodule(layer.name)
    linear: Any = branch.get_submodule(layer.output)
    norm = getattr(_block(model, layer), f"norm{PLACE[layer.kind]}")
    seen: dict[str, Any] = {}
    handles = [
        norm.register_forward_pre_hook(lambda _module, inputs: seen.update(stream=inputs[0])),
        linear.register_forward_pre_hook(lambda _module, inputs: seen.update(units=inputs[0])),
        branch.register_forward_hook(
            lambda _module, args, kwargs, output: seen.update(arguments=(args, kwargs), output=output), with_kwargs=True
        ),
    ]
    try:
        step(x)
    finally:
        for handle in handles:
            handle.remove()
    return Passage(**({"units": seen["output"][..., :0]} | seen))


@torch.no_grad()
def as_branch_output(model: nn.Module, layer: PrunableLayer, stream: Tensor) -> Tensor:
    """Returns the branch output that adds `stream` to the residual stream: in its layout, before LayerScale."""
    block = _block(model, layer)
    if isinstance(block, SwinTransformerBlock) and layer.kind == "attention":
        echo = Echo()
        with replaced(model, layer.name, echo):
            block._attn(stream)
        stream = echo.heard
    scale = getattr(block, f"ls{PLACE[layer.kind]}", None)
    if isinstance(scale, LayerScale):
        gamma = scale.gamma
        stream = torch.where(gamma != 0, stream / gamma, 0.0)
    return stream


class Echo(nn.Module):
    """Stands in for a branch, to learn in what layout (windows) its block gives it the stream."""

    heard: Tensor

    def forward(self, x: Tensor, **_: object) -> Tensor:
        self.heard = x
        return x


def _block(model: nn.Module, layer: PrunableLayer) -> Any:
    block = model.get_submodule(layer.block)
    if not isinstance(block, Block | SwinTransformerBlock):
        raise ModelError(f"{layer.block}: is a {type(block).__name__}; accepted: timm's Block and SwinTransformerBlock")
    return block
