"""Trimmed mean and median over the holders of each coordinate (Yin et al. 2018, arXiv 1803.01498).

Of the m values that the holders of a coordinate sent, k = ⌊trim · m⌋ are cut off at each end and the rest is averaged;
with k = ⌊(m - 1) / 2⌋ one or two are left, which is the median. A coordinate with one holder takes that one's value,
one with none keeps its own. Samples do not weigh: a device says its own number, and could outvote the others with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tapfl.adapters.layout import Part, positions, to_global_scale
from tapfl.adapters.rule import Combine

BLOCK = 2**21  # float64 values that lie side by side at once: 16 MiB

Cut = Callable[[int], int]  # number of holders -> values that are cut off at each end


def median_cut(holders: int) -> int:
    return (holders - 1) // 2


def trimmed_cut(trim: float) -> Cut:
    """Returns the cut of a trimmed mean; `trim` is the share at each end, in [0, 0.5)."""
    return lambda holders: int(trim * holders + 1e-9)  # 0.29 · 100 is 28.999…


def scatter_trimmed(cut: Cut) -> Combine:
    """Returns a function like `scatter_mean` that takes what is left between the cuts. Memory: `BLOCK`."""

    def combine(previous: Tensor, parts: Sequence[Part]) -> Tensor:
        width = previous[:1].numel() * len(parts)
        blocks = [
            _combine_block(previous[start:stop], [rows_of(part, start, stop) for part in parts], cut)
            for start, stop in row_blocks(len(previous), width)
        ]
        return torch.cat(blocks)

    return combine


def row_blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Yields consecutive blocks of rows, each of at most `BLOCK` values of `width` a row, but of one row at least."""
    step = max(1, BLOCK // max(1, width))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def rows_of(part: Part, start: int, stop: int) -> Part:
    """Returns what of a part lies in the global rows start..stop-1, placed from 0 on; on the global scale."""
    values, placement, weight = part
    first, last = np.searchsorted(placement.index[0].numpy(), (start, stop))
    index = (placement.index[0][first:last] - start, *placement.index[1:])
    return to_global_scale(values, placement)[first:last], replace(placement, index=index, row_scale=None), weight


def _combine_block(previous: Tensor, parts: Sequence[Part], cut: Cut) -> Tensor:
    stacked = torch.full((len(parts), previous.numel()), torch.nan, dtype=torch.float64)
    for row, (values, placement, _) in zip(stacked, parts, strict=True):
        row[positions(placement, previous.shape)] = values.reshape(-1)
    ordered = np.ascontiguousarray(stacked.numpy().T)
    ordered.sort(axis=1)  # NaN, what a device does not hold, goes to the end
    holders = len(parts) - np.isnan(ordered).sum(1)
    result = previous.double().reshape(-1).numpy().copy()
    for m in np.unique(holders[holders > 0]):
        where, k = np.flatnonzero(holders == m), cut(int(m))
        result[where] = ordered[where[:, None], np.arange(k, m - k)].mean(1)
    return torch.from_numpy(result).view(previous.shape).to(previous.dtype)
