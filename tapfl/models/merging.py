"""Token merging: between attention and FFN of a block, tokens are averaged with the tokens most like them.

Bipartite soft matching (ToMe, Bolya et al., ICLR 2023, arXiv 2210.09461). The tokens are divided alternately into A and
B. Each of A is matched with the most similar of B, by the cosine of their keys, and the `merges` pairs that are most
alike become one token each: the mean of all tokens it stands for. A token that stands for s counts s times in later
attentions, by log s added to its logits. Class, distillation and register tokens stay as they are. Ties go to the token
that comes first.

A *schedule* is the number of merges of each block. In the last block of a model whose head reads class tokens alone all
others may go, which changes nothing. Everything is a function of the images, so models are exported as any other.
"""

from __future__ import annotations

import copy
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
from tapfl.models.forward import tokens_read
from tapfl.models.units import PrunableLayer, put

Schedule = tuple[int, ...]
TIE = 1e-12  # less than cosines of float32 differ by


class Merged(NamedTuple):
    """A residual stream whose tokens stand for one or several of the image's.

    Attributes:
        x: the tokens (n, t, d).
        size: for how many each stands (n, t).
        source: where each of the image's T tokens is now, int64 (n, T); None: nobody asks.
    """

    x: Tensor
    size: Tensor
    source: Tensor | None

    @classmethod
    def of(cls, x: Tensor, traced: bool = True) -> Merged:
        """Returns the stream before anything is merged.

        Args:
            traced: whether to note where tokens go.
        """
        source = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if traced else None
        return cls(x, x.new_ones(()).expand(x.shape[:2]), source)


def group_sums(values: Tensor, source: Tensor, tokens: int) -> Tensor:
    """Returns the sums (n, tokens, d) of what the image's tokens have (n, T, d), over those that became one."""
    return _members(source, tokens, values.dtype) @ values  # as a sum by index has no fixed order on a GPU


def group_means(values: Tensor, source: Tensor, tokens: int) -> Tensor:
    """Returns the means (n, tokens, d) of what the image's tokens have (n, T, d), over those that became one."""
    return group_sums(values, source, tokens) / group_sums(torch.ones_like(values[..., :1]), source, tokens)


class Merge(nn.Module):
    """Merges `merges` pairs of the tokens behind the first `protected`; or drops them all, where `drop` says so."""

    def __init__(self, merges: int, protected: int, drop: bool) -> None:
        super().__init__()
        self.merges, self.protected, self.drop = merges, protected, drop

    def macs(self, tokens: int, embed_dim: int, key_dims: int) -> int:
        """Returns the MACs an image: similarities, and sums as a product with zeros and ones."""
        if not self.merges or self.drop:
            return 0
        return pairs(tokens - self.protected) * key_dims + (tokens - self.protected) // 2 * self.merges * embed_dim

    def forward(self, stream: Merged, keys: Tensor) -> Merged:
        """Returns the stream after merging.

        Args:
            keys: of its tokens (n, t, width).
        """
        x, size, source = stream
        if not self.merges:
            return stream
        first, merges = self.protected, self.merges
        if self.drop:
            return Merged(x[:, :first], size[:, :first], source)  # none of what is dropped is asked for any more
        keys = F.normalize(keys[:, first:].float(), dim=-1)
        best, into = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(-1)  # of equals the first
        first_wins = TIE * torch.arange(best.shape[1], device=x.device, dtype=torch.float64)
        order = (best - first_wins).argsort(1, descending=True)  # in float64, as ONNX has no stable sort
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
    """Returns how many pairs of so many tokens are compared."""
    return (tokens + 1) // 2 * (tokens // 2)


def _members(group: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Returns (n, groups, T) with 1 where token t is in group g, from the group (n, T) of each."""
    return (group[:, None] == torch.arange(groups, device=group.device)[:, None]).to(dtype)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Returns tokens `index` (n, k) of x (n, t, d) by whole rows, which `gather` takes number by number."""
    starts = x.shape[1] * torch.arange(x.shape[0], device=x.device)
    return F.embedding(index + starts[:, None], x.flatten(0, 1))


def _alternate(a: Tensor, b: Tensor) -> Tensor:
    """Returns a_0, b_0, a_1, b_1, … (n, A + B), for as many of b as of a or one fewer."""
    both = torch.stack([a[:, : b.shape[1]], b], dim=-1).flatten(1)
    return torch.cat([both, a[:, b.shape[1] :]], dim=1)


class Keys(nn.Module):
    """Takes the place of an attention's `k_norm`, and holds the first keys it gets until its block has read them.

    A cut copy of the attention shares it, and compensation calls that copy beside the attention itself.
    """

    seen: Tensor | None = None

    def forward(self, k: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = k
        return k

    def take(self) -> Tensor | None:
        """Returns the keys (n, tokens, heads · dims), and forgets them."""
        k, self.seen = self.seen, None
        return None if k is None else k.transpose(1, 2).flatten(2)


class MergingBlock(Block):
    """A block of a ViT that merges tokens, or that comes behind one: the same modules under the same names.

    Attributes:
        last: whether no block follows: tokens are then all of the image's again if they are traced.
        traced: whether to note where tokens go.
    """

    def __init__(self, block: Block, merge: Merge, last: bool, traced: bool) -> None:
        nn.Module.__init__(self)
        for name, module in block.named_children():
            self.add_module(name, module)
        self.merge, self.last, self.traced, self.training = merge, last, traced, block.training
        if merge.merges and not merge.drop:
            self.attn.k_norm = Keys()

    def forward(self, given: Tensor | Merged) -> Tensor | Merged:
        return self.feed(self.attend(given))

    def attend(self, given: Tensor | Merged) -> Merged:
        """Returns the stream behind the attention, and merged."""
        merged = isinstance(given, Merged)
        x, size, source = given if isinstance(given, Merged) else Merged.of(given, self.traced)
        normed, held = self.norm1(x), getattr(self.attn, "k_norm", None)
        if isinstance(held, Keys):
            held.take()  # of calls of the attention alone
        mask = size.log()[:, None, None, :] if merged else None
        x = x + self.drop_path1(self.ls1(self.attn(normed, attn_mask=mask)))
        keys = held.take() if isinstance(held, Keys) else None  # None: nothing merges, or no attention is left
        found: Merged = self.merge(Merged(x, size, source), normed if keys is None else keys)
        return found

    def feed(self, merged: Merged) -> Tensor | Merged:
        """Returns the stream behind the FFN."""
        x, size, source = merged
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if not self.last:
            return Merged(x, size, source)
        return x if source is None else _rows(x, source)


def merging(model: nn.Module, schedule: Schedule, traced: bool = False) -> nn.Module:
    """Makes the blocks of `model` merge by a schedule, in place, and returns it. An empty schedule, or one of zeros,
    changes nothing.

    Args:
        traced: note where tokens go, which a head that reads class tokens alone need not know.

    Raises:
        ModelError: if it is no ViT or DeiT of timm's plain blocks, or the schedule does not fit it.
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
    """Returns a copy of `model` that merges by a schedule but drops nothing, for statistics; with no merges, itself.

    Raises:
        ModelError: as `merging`.
    """
    if not any(schedule):
        return model
    return merging(copy.deepcopy(model), Tokens.of(model).without_drop(schedule), traced=True)


@dataclass(frozen=True)
class Tokens:
    """The tokens of an image in a ViT.

    Attributes:
        free: how many may merge.
        protected: how many may not: those of class, distillation and registers.
        blocks: blocks that they pass.
        class_only: whether the head reads protected tokens alone.
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
        class_only = tokens_read(model) is not None
        return cls(int(model.patch_embed.num_patches), int(model.num_prefix_tokens), len(model.blocks), class_only)

    def drops(self, schedule: Schedule) -> bool:
        """Returns whether the last block of a schedule drops all tokens that the head does not read."""
        return self.class_only and bool(schedule[-1]) and sum(schedule) == self.free

    def without_drop(self, schedule: Schedule) -> Schedule:
        """Returns a schedule in which the last block keeps the tokens that it drops in `schedule`."""
        return (*schedule[:-1], 0) if schedule and self.drops(schedule) else schedule


def tokens_seen(layers: Sequence[PrunableLayer], schedule: Schedule) -> list[int]:
    """Returns how many tokens of an image each layer sees under a schedule; in a block the merge is before the FFN."""
    gone = [0, *accumulate(schedule)]
    blocks = {name: i for i, name in enumerate(dict.fromkeys(layer.block for layer in layers))}
    return [n.tokens - (gone[blocks[n.block] + (n.kind == "ffn")] if schedule else 0) for n in layers]


def merged_layers(layers: Sequence[PrunableLayer], schedule: Schedule, stream: Tokens) -> tuple[PrunableLayer, ...]:
    """Returns the layers of a ViT with the tokens that they see under a schedule, and the pairs that are compared."""
    compares = dict(zip(dict.fromkeys(n.block for n in layers), stream.without_drop(schedule), strict=True))
    found = []
    for layer, tokens in zip(layers, tokens_seen(layers, schedule), strict=True):
        attention = layer.kind == "attention"
        compared = pairs(tokens - stream.protected) if attention and compares[layer.block] else 0
        found.append(replace(layer, tokens=tokens, span=tokens if attention else 0, pairs=compared))
    return tuple(found)
