"""The residual stream around a prunable branch: x + scale · branch(norm(x)), in timm's pre-norm blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, LayerScale
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tapfl.errors import ModelError
from tapfl.models.forward import Step, hooked, segments, tokens_read
from tapfl.models.merging import Merged, MergingBlock
from tapfl.models.units import PrunableLayer, replaced

PLACE = {"attention": "1", "ffn": "2"}  # norm1 and ls1 belong to the attention of a block, norm2 and ls2 to its FFN


@dataclass(frozen=True)
class Passage:
    """Tensors around a branch in one pass of its step (`branch_steps`).

    Attributes:
        stream: the residual stream that the branch's norm read.
        arguments: of the branch's call (positional, by name).
        units: input of the branch's output linear, with 0 units where the branch is gone.
        output: of the branch.
        after: of the step.
        source: where each of the image's tokens is in the stream (`tapfl.models.merging`); None: none was merged.
    """

    stream: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    units: Tensor
    output: Tensor
    after: Any
    source: Tensor | None


@torch.no_grad()
def observe(model: nn.Module, layer: PrunableLayer, step: Callable[[Any], Any], x: Tensor | Merged) -> Passage:
    """Returns the passage of the residual stream `x` through the branch `layer`, of which `step` is the step."""
    branch: Any = model.get_submodule(layer.name)
    seen: dict[str, Any] = {}

    def leave(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen.update(arguments=(args, kwargs), output=output)

    handles = [
        branch.get_submodule(layer.output).register_forward_pre_hook(lambda _, inputs: seen.update(units=inputs[0])),
        branch.register_forward_hook(leave, with_kwargs=True),
    ]
    with hooked(handles):
        after = step(x)
    stream, source = (x.x, x.source) if isinstance(x, Merged) else (x, None)
    if layer.kind == "ffn":
        stream = stream.reshape(seen["output"].shape)  # a Swin's is a grid
    return Passage(stream, after=after, source=source, **({"units": seen["output"][..., :0]} | seen))


@torch.no_grad()
def as_branch_output(model: nn.Module, layer: PrunableLayer, stream: Tensor) -> Tensor:
    """Returns the branch output that adds `stream` to the residual stream: in its layout, before LayerScale.

    Raises:
        ModelError: if the block is not of timm's pre-norm kinds.
    """
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


def branch_steps(model: nn.Module, all_tokens: bool = False) -> list[Step]:
    """Returns `segments` with the blocks taken apart: one step a residual branch, under the branch's name.

    A pass can then be resumed from the stream that enters a branch, whatever module stands in its place by then.
    Applied in turn the steps equal ``model(x)`` up to rounding, for a model whose branches `prunable_layers` accepts;
    blocks of other kinds stay whole. Tokens merge at the end of an attention's step.

    Args:
        all_tokens: otherwise the last block of a ViT computes only those that the head reads.
    """
    chain = segments(model)
    last = chain[-2][0]
    steps: list[Step] = []
    for name, step in chain:
        attend: Callable[[Any], Any]
        feed: Callable[[Any], Any]
        if type(step) is Block:  # a subclass may pass its branches in another way
            read = tokens_read(model) if name == last and not all_tokens else None
            attend, feed = partial(_attention_step, step, read), partial(_ffn_step, step)
        elif type(step) is SwinTransformerBlock:
            attend, feed = partial(_window_attention_step, step), partial(_grid_ffn_step, step)
        elif type(step) is MergingBlock:
            attend, feed = step.attend, step.feed
        else:
            steps.append((name, step))
            continue
        steps += [(f"{name}.attn", attend), (f"{name}.mlp", feed)]
    return steps


def first_queries(attention: Attention, x: Tensor, count: int) -> Tensor:
    """Returns ``attention(x)[:, :count]`` without the keys and values of all tokens.

    For few queries it is less work to bring W_k to the query, q·(W_k x) = (W_kᵀ q)·x, and W_v to the mixture,
    Σ a_n W_v x_n = W_v Σ a_n x_n. The bias of the keys adds the same to all logits of a query and falls out.
    """
    shape = (3, attention.num_heads, attention.head_dim)
    W_q, W_k, W_v = attention.qkv.weight.view(*shape, -1)
    q = torch.einsum("bkc,hdc->bhkd", x[:, :count], W_q)
    if attention.qkv.bias is not None:
        q = q + attention.qkv.bias.view(*shape, 1)[0].transpose(1, 2)
    logits = torch.einsum("bhkd,hdc->bhkc", q * attention.scale, W_k).flatten(1, 2) @ x.transpose(1, 2)
    mixed = (logits.softmax(-1) @ x).unflatten(1, (attention.num_heads, count))
    out = torch.einsum("bhkc,hdc->bkhd", mixed, W_v)
    if attention.qkv.bias is not None:
        out = out + attention.qkv.bias.view(*shape)[2]
    return attention.proj_drop(attention.proj(out.flatten(2)))


def _attention_step(block: Any, read: int | None, x: Tensor) -> Tensor:
    normed = block.norm1(x)
    if read is None:
        output = block.attn(normed)
    elif isinstance(block.attn, Attention):
        x, output = x[:, :read], first_queries(block.attn, normed, read)
    else:
        x, output = x[:, :read], block.attn(normed[:, :read])
    return x + block.drop_path1(block.ls1(output))


def _ffn_step(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _window_attention_step(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path1(block._attn(block.norm1(x)))


def _grid_ffn_step(block: Any, x: Tensor) -> Tensor:
    return (x.flatten(1, 2) + block.drop_path2(block.mlp(block.norm2(x.flatten(1, 2))))).view_as(x)


class Echo(nn.Module):
    """Takes the place of a branch and records its input, in the layout (windows) of its block."""

    heard: Tensor

    def forward(self, x: Tensor, **_: object) -> Tensor:
        self.heard = x
        return x


def _block(model: nn.Module, layer: PrunableLayer) -> Any:
    block = model.get_submodule(layer.block)
    if type(block) not in (Block, SwinTransformerBlock, MergingBlock):
        raise ModelError(f"{layer.block}: is a {type(block).__name__}; accepted: timm's Block and SwinTransformerBlock")
    return block
