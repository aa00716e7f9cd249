"""Token merging: between the attention and the FFN of a block, each token may be averaged with its most similar token.

This is bipartite soft matching (ToMe, Bolya et al., ICLR 2023, arXiv 2210.09461). The tokens are assigned alternately
to A and B. Each token of A is matched with the most similar token of B, by the cosine of their keys. The `merges` most
similar pairs become one token each: the mean of all original tokens that were merged into it. A token of size s (made
of s original tokens) counts s times in later attentions: log s is added to its logits. Class, distillation and register
tokens never merge. Ties go to the earlier token. Ours is that the keys of all heads are compared together; ToMe's code
compares their mean over the heads.

A *schedule* is the number of merges in each block. If the head reads only class tokens, the last block may drop all
other tokens, which does not change the output. Merging depends only on the images, so these models can be exported like
any other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.errors import ModelError
from tapfl.models.forward import example_input, tokens_read
from tapfl.models.units import PrunableLayer, put

Schedule = tuple[int, ...]
TIE = 1e-12  # breaks ties; smaller than the difference of any two float32 cosines


class Merged(NamedTuple):
    """A residual stream with merged tokens.

    Attributes:
        x: the tokens (n, t, d).
        size: number of original tokens that each token is made of (n, t).
        source: for each of the T original tokens, the position of the token it was merged into, int64 (n, T); None if
            this is not traced.
    """

    x: Tensor
    size: Tensor
    source: Tensor | None

    @classmethod
    def of(cls, x: Tensor, traced: bool = True) -> Merged:
        """Returns the stream before any token is merged.

        Args:
            traced: whether to track `source`.
        """
        source = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if traced else None
        return cls(x, x.new_ones(()).expand(x.shape[:2]), source)


def group_sums(values: Tensor, source: Tensor, tokens: int) -> Tensor:
    """Returns the sums (n, tokens, d) of the original tokens' values (n, T, d) over the tokens merged into one."""
    return _members(source, tokens, values.dtype) @ values  # scatter-add is not deterministic on a GPU


def group_means(values: Tensor, source: Tensor, tokens: int) -> Tensor:
    """Returns the means (n, tokens, d) of the original tokens' values (n, T, d) over the tokens merged into one."""
    return group_sums(values, source, tokens) / group_sums(torch.ones_like(values[..., :1]), source, tokens)


class Merge(nn.Module):
    """Merges `merges` pairs of the tokens after the first `protected` ones, or with `drop`, drops all of them."""

    def __init__(self, merges: int, protected: int, drop: bool) -> None:
        super().__init__()
        self.merges, self.protected, self.drop = merges, protected, drop

    def macs(self, tokens: int, embed_dim: int, key_dims: int) -> int:
        """Returns the MACs per image: of the similarities, and of the sums, which are products with a 0/1 matrix."""
        if not self.merges or self.drop:
            return 0
        return pairs(tokens - self.protected) * key_dims + (tokens - self.protected) // 2 * self.merges * embed_dim

    def forward(self, stream: Merged, keys: Tensor) -> Merged:
        """Returns the stream after merging.

        Args:
            keys: keys of the tokens (n, t, width).
        """
        x, size, source = stream
        if not self.merges:
            return stream
        first, merges = self.protected, self.merges
        if self.drop:
            return Merged(x[:, :first], size[:, :first], source)  # `source` of dropped tokens is never read
        keys = F.normalize(keys[:, first:].float(), dim=-1)
        best, into = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(-1)  # the first of equal ones
        first_wins = TIE * torch.arange(best.shape[1], device=x.device, dtype=torch.float64)
        order = (best - first_wins).argsort(1, descending=True)  # float64 breaks ties, since ONNX has no stable sort
        A, B = _rows(x, first + 2 * order), x[:, first + 1 :: 2]
        count, own = size[:, first::2].gather(1, order), size[:, first + 1 :: 2]
        joining = _members(into.gather(1, order[:, :merges]), B.shape[1], x.dtype) * count[:, None, :merges]
        total = own + joining.sum(-1)
        B = torch.baddbmm(B * own[..., None], joining, A[:, :merges]) / total[..., None]
        if source is not None:
            rank, behind = order.argsort(1), first + order.shape[1] - merges
            of_a = torch.where(rank < merges, behind + into, first + rank - merges)
            kept, of_b = (torch.arange(n, device=x.device).expand(x.shape[0], -1) for n in (first, B.shape[1]))
            source = torch.cat([kept, _alternate(of_a, behind + of_b)], dim=1).gather(1, source)
        x = torch.cat([x[:, :first], A[:, merges:], B], dim=1)
        return Merged(x, torch.cat([size[:, :first], count[:, merges:], total], dim=1), source)


def pairs(tokens: int) -> int:
    """Returns the number of pairs that are compared among `tokens` tokens."""
    return (tokens + 1) // 2 * (tokens // 2)


def _members(group: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Returns the indicator matrix (n, groups, T) with 1 where token t is in group g, given the groups (n, T)."""
    return (group[:, None] == torch.arange(groups, device=group.device)[:, None]).to(dtype)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Returns the tokens `index` (n, k) of x (n, t, d). Copies whole rows, where `gather` copies single numbers."""
    starts = x.shape[1] * torch.arange(x.shape[0], device=x.device)
    return F.embedding(index + starts[:, None], x.flatten(0, 1))


def _alternate(a: Tensor, b: Tensor) -> Tensor:
    """Returns a_0, b_0, a_1, b_1, … (n, A + B); b has as many columns as a, or one fewer."""
    both = torch.stack([a[:, : b.shape[1]], b], dim=-1).flatten(1)
    return torch.cat([both, a[:, b.shape[1] :]], dim=1)


class Keys(nn.Module):
    """Takes the place of an attention's `k_norm`, and keeps the first keys it gets until its block has read them.

    Only the first, because a pruned copy of the attention shares this module, and compensation calls both.
    """

    seen: Tensor | None = None

    def forward(self, k: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = k
        return k

    def take(self) -> Tensor | None:
        """Returns the keys (n, tokens, heads · dims), or None if there are none, and forgets them."""
        k, self.seen = self.seen, None
        return None if k is None else k.transpose(1, 2).flatten(2)


class MergingBlock(Block):
    """A block of a ViT that merges tokens or follows one that does. It has the same modules under the same names.

    Attributes:
        last: whether it is the last block. If tokens are traced, it returns one token per original token again.
        traced: whether to track where tokens go.
    """

    def __init__(self, block: Block, merge: Merge, last: bool, traced: bool) -> None:
        nn.Module.__init__(self)
        for name, module in block.named_children():
            self.add_module(name, module)
        self.merge, self.last, self.traced, self.training = merge, last, traced, block.training
        if merge.merges and not merge.drop:
            self.attn.k_norm = Keys()

    def forward(self, stream: Tensor | Merged) -> Tensor | Merged:
        return self.feed(self.attend(stream))

    def attend(self, stream: Tensor | Merged) -> Merged:
        """Returns the stream after attention and merging."""
        x, size, source = stream if isinstance(stream, Merged) else Merged.of(stream, self.traced)
        normed, recorder = self.norm1(x), getattr(self.attn, "k_norm", None)
        if isinstance(recorder, Keys):
            recorder.take()  # discards keys of earlier calls of the attention alone
        mask = size.log()[:, None, None, :] if isinstance(stream, Merged) else None
        x = x + self.drop_path1(self.ls1(self.attn(normed, attn_mask=mask)))
        keys = recorder.take() if isinstance(recorder, Keys) else None  # None: no merges, or the attention was pruned
        after: Merged = self.merge(Merged(x, size, source), normed if keys is None else keys)
        return after

    def feed(self, merged: Merged) -> Tensor | Merged:
        """Returns the stream after the FFN."""
        x, size, source = merged
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if not self.last:
            return Merged(x, size, source)
        return x if source is None else _rows(x, source)


def merging(model: nn.Module, schedule: Schedule, traced: bool = False) -> nn.Module:
    """Makes the blocks of `model` merge tokens by a schedule, in place, and returns the model.

    An empty schedule, or one of zeros, changes nothing.

    Args:
        traced: track where tokens go, even if the head reads only class tokens and does not need it.

    Raises:
        ModelError: if it is not a ViT or DeiT of timm's plain blocks, or the schedule does not fit it.
    """
    if not any(schedule):
        return model
    stream = Tokens.of(model)
    if len(schedule) != stream.blocks:
        raise ModelError(f"tokens: a schedule of {len(schedule)} blocks for a backbone of {stream.blocks}")
    left, last, drops = stream.free, stream.blocks - 1, stream.drops(schedule)
    for i, merges in enumerate(schedule):
        drop = drops and i == last
        if not (0 <= merges <= left // 2 or drop):
            raise ModelError(f"tokens.{i}: {merges} merges of {left} tokens; accepted: 0 to {left // 2}")
        if any(schedule[: i + 1]):
            block: Any = model.get_submodule(f"blocks.{i}")
            merge = Merge(merges, stream.protected, drop)
            put(model, f"blocks.{i}", MergingBlock(block, merge, i == last, traced or not stream.class_only))
        left -= merges
    return model


def passing(model: nn.Module, schedule: Schedule) -> nn.Module:
    """Returns a copy of `model` that merges by a schedule but drops no tokens, to collect statistics of all tokens.

    If the schedule has no merges, it returns `model` itself.

    Raises:
        ModelError: as for `merging`.
    """
    if not any(schedule):
        return model
    return merging(copy.deepcopy(model), Tokens.of(model).without_drop(schedule), traced=True)


@dataclass(frozen=True)
class Tokens:
    """The tokens of an image in a ViT.

    Attributes:
        free: number of tokens that may merge.
        protected: number of tokens that may not: class, distillation and register tokens.
        blocks: number of blocks.
        class_only: whether the head reads only protected tokens.
    """

    free: int
    protected: int
    blocks: int
    class_only: bool

    @classmethod
    def of(cls, model: Any) -> Tokens:
        """Returns the tokens of `model`. Raises ModelError unless it is a ViT or DeiT of timm's plain blocks."""
        if not isinstance(model, VisionTransformer):
            raise ModelError(f"{type(model).__name__} cannot merge tokens (only ViT and DeiT can)")
        if odd := [i for i, block in enumerate(model.blocks) if type(block) not in (Block, MergingBlock)]:
            raise ModelError(f"blocks.{odd[0]}: a {type(model.blocks[odd[0]]).__name__} cannot merge tokens")
        with torch.no_grad():
            patches = model.patch_embed(example_input(model))  # `num_patches` lacks those that are partly padding
        free = math.prod(patches.shape[1:-1])
        return cls(free, int(model.num_prefix_tokens), len(model.blocks), tokens_read(model) is not None)

    def drops(self, schedule: Schedule) -> bool:
        """Returns whether the last block of a schedule drops all tokens that the head does not read."""
        return self.class_only and bool(schedule[-1]) and sum(schedule) == self.free

    def without_drop(self, schedule: Schedule) -> Schedule:
        """Returns the schedule with the drop in the last block, if there is one, left out."""
        return (*schedule[:-1], 0) if schedule and self.drops(schedule) else schedule


def tokens_seen(layers: Sequence[PrunableLayer], schedule: Schedule) -> list[int]:
    """Returns the number of tokens that each layer sees under a schedule. Blocks merge between attention and FFN."""
    gone = [0, *accumulate(schedule)]
    blocks = {name: i for i, name in enumerate(dict.fromkeys(layer.block for layer in layers))}
    return [n.tokens - (gone[blocks[n.block] + (n.kind == "ffn")] if schedule else 0) for n in layers]


def merged_layers(layers: Sequence[PrunableLayer], schedule: Schedule, stream: Tokens) -> tuple[PrunableLayer, ...]:
    """Returns the layers of a ViT with the numbers of tokens and of compared pairs that they have under a schedule."""
    merges = dict(zip(dict.fromkeys(n.block for n in layers), stream.without_drop(schedule), strict=True))
    merged = []
    for layer, tokens in zip(layers, tokens_seen(layers, schedule), strict=True):
        attention = layer.kind == "attention"
        compared = pairs(tokens - stream.protected) if attention and merges[layer.block] else 0
        merged.append(replace(layer, tokens=tokens, span=tokens if attention else 0, pairs=compared))
    return tuple(merged)
