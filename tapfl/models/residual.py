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

PLACE = {"attention": "1", "ffn": "2"}  # norm1 and ls1 belong to a block's attention, norm2 and ls2 to its FFN


@dataclass(frozen=True)
class Passage:
    """Tensors around a branch, recorded in one pass through its step (`branch_steps`).

    Attributes:
        stream: the residual stream that the branch's norm reads.
        arguments: positional and keyword arguments of the branch's call.
        units: input of the branch's output linear; it has 0 units if the branch was pruned entirely.
        output: output of the branch.
        after: output of the step.
        source: as in `tapfl.models.merging.Merged`; None if no token was merged.
    """

    stream: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    units: Tensor
    output: Tensor
    after: Any
    source: Tensor | None


@torch.no_grad()
def observe(model: nn.Module, layer: PrunableLayer, step: Callable[[Any], Any], x: Tensor | Merged) -> Passage:
    """Returns the tensors around the branch `layer` when the residual stream `x` passes through its step `step`."""
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
        stream = stream.reshape(seen["output"].shape)  # in a Swin, the stream is a grid
    return Passage(stream, after=after, source=source, **({"units": seen["output"][..., :0]} | seen))


@torch.no_grad()
def as_branch_output(model: nn.Module, layer: PrunableLayer, stream: Tensor) -> Tensor:
    """Returns the branch output that would add `stream` to the residual stream.

    It is in the layout of the branch (windows in a Swin), before LayerScale.

    Raises:
        ModelError: if the block is not one of timm's pre-norm blocks.
    """
    block = pre_norm_block(model, layer)
    if isinstance(block, SwinTransformerBlock) and layer.kind == "attention":
        stream = _windows(model, layer, stream)
    scale = getattr(block, f"ls{PLACE[layer.kind]}", None)
    if isinstance(scale, LayerScale):
        gamma = scale.gamma
        stream = torch.where(gamma != 0, stream / gamma, 0.0)
    return stream


@torch.no_grad()
def real_tokens(model: nn.Module, layer: PrunableLayer) -> Tensor | None:
    """Returns a mask of the tokens of an image that are not padding, bool (tokens,), or None if none is padding.

    The tokens are in the order in which the branch sees them. A Swin attention pads windows that extend beyond the
    grid, and its block drops the output at the padding.
    """
    block: Any = model.get_submodule(layer.block)
    if layer.kind != "attention" or not isinstance(block, SwinTransformerBlock):
        return None
    ones = layer.output_of(model).weight.new_ones(1, *block.input_resolution, layer.embed_dim)
    real = _windows(model, layer, ones)[..., 0].flatten() > 0
    return None if bool(real.all()) else real


def _windows(model: nn.Module, layer: PrunableLayer, stream: Tensor) -> Tensor:
    """Returns the stream of a Swin block as its attention sees it: in windows, with padding."""
    block: Any = model.get_submodule(layer.block)
    echo = Echo()
    with replaced(model, layer.name, echo):
        block._attn(stream)
    return echo.heard


def branch_steps(model: nn.Module, all_tokens: bool = False) -> list[Step]:
    """Returns `segments` with blocks split into their residual branches: one step per branch, under the branch's name.

    A pass can then be resumed from the stream that enters a branch, and a step uses the module that is in the model
    when it is called. Applied in order, the steps equal ``model(x)`` up to rounding, if `prunable_layers` accepts the
    branches of the model. Blocks of other kinds stay whole. Tokens merge at the end of an attention's step.

    Args:
        all_tokens: compute all tokens in the last block of a ViT, instead of only those that the head reads.
    """
    chain = segments(model)
    last = chain[-2][0]
    steps: list[Step] = []
    for name, step in chain:
        attend: Callable[[Any], Any]
        feed: Callable[[Any], Any]
        if type(step) is Block:  # a subclass may combine its branches differently
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
    """Returns ``attention(x)[:, :count]`` without computing the keys and values of all tokens.

    For few queries it is cheaper to apply W_k to the query, q·(W_k x) = (W_kᵀ q)·x, and W_v to the weighted sum,
    Σ a_n W_v x_n = W_v Σ a_n x_n. The bias of the keys adds the same number to all logits of a query, so it has no
    effect.
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
    """Takes the place of a branch, records its input (in the windows of a Swin block) and returns it."""

    heard: Tensor

    def forward(self, x: Tensor, **_: object) -> Tensor:
        self.heard = x
        return x


def pre_norm_block(model: nn.Module, layer: PrunableLayer) -> Any:
    """Returns the block of a branch. Raises ModelError if it is not one of timm's pre-norm blocks."""
    block = model.get_submodule(layer.block)
    if type(block) not in (Block, SwinTransformerBlock, MergingBlock):
        raise ModelError(f"{layer.block}: is a {type(block).__name__}; accepted: timm's Block and SwinTransformerBlock")
    return block
