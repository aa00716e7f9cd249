"""Unit shape: the shapes that a layer can be cut to, and the units that a shape keeps.

    head-dims   removes equally many dims from every head; all heads stay
    heads       removes whole heads
    both        heads × dims: among the shapes of equal size, the one that keeps the largest sum of scores

An FFN counts as one head, and loses single units under all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tapfl.config import PruningOptions
from tapfl.models.units import PrunableLayer, Shape

SMALL_HEAD = 32  # dims


@dataclass(frozen=True, eq=False)
class Candidates:
    """The shapes that a layer may take, in order of size.

    Attributes:
        name: name of the layer.
        shapes: R shapes, from no unit to all units.
        units: number of units that each shape keeps (R,), increasing.
        costs: cost of each shape by limit (M, R), non-decreasing.
    """

    name: str
    shapes: tuple[Shape, ...]
    units: np.ndarray
    costs: np.ndarray

    @property
    def full(self) -> float:
        return float(self.units[-1])

    def least(self, floor: float) -> int:
        """Returns the position of the smallest shape that keeps a share `floor` of the units (if > 0, at least one)."""
        return int(np.searchsorted(self.units, max(floor * self.full - 1e-9, 1.0 if floor > 0 else 0.0)))

    def below(self, units: float) -> int:
        """Returns the position of the largest shape with at most `units` units, up to rounding."""
        return int(np.searchsorted(self.units, units + 1e-9 * self.full, side="right")) - 1


def aligned(options: PruningOptions, layers: Sequence[PrunableLayer]) -> PruningOptions:
    """Returns the options with ``align = 0`` replaced by 8, which suits kernels, or by 4 if heads are small."""
    if options.align:
        return options
    small = any(layer.units_per_head < SMALL_HEAD for layer in layers if layer.kind == "attention")
    return options.model_copy(update={"align": 4 if small else 8})


def candidates(
    layer: PrunableLayer, table: np.ndarray, unit_shape: str, align: int, scores: Tensor | None = None
) -> Candidates:
    """Returns the shapes of a layer whose dims per head (units, in an FFN) are a multiple of `align`, or all of them.

    Args:
        table: cost of every shape (M, heads + 1, dims + 1).
        scores: of the units (units,). Only ``both`` uses them; without scores it treats all units alike.
    """
    heads, full = layer.full
    dims = [*range(0, full, align), full]
    if unit_shape == "heads" and layer.kind == "attention":
        shapes = [Shape(h, full) for h in range(heads + 1)]
    elif unit_shape == "both" and layer.kind == "attention":
        shapes = _best_of_each_size(layer, dims, scores)
    else:
        shapes = [Shape(heads, d) for d in dims]
    costs = np.stack([table[:, shape.heads, shape.dims] for shape in shapes], axis=1)
    # drop shapes that cost more than a larger one (with more heads and fewer dims)
    worth = (costs <= np.minimum.accumulate(costs[:, ::-1], axis=1)[:, ::-1]).all(axis=0)
    chosen = np.flatnonzero(worth)
    units = np.array([shapes[i].units for i in chosen], dtype=np.float64)
    return Candidates(layer.name, tuple(shapes[i] for i in chosen), units, costs[:, chosen])


def keep_best(layer: PrunableLayer, scores: Tensor, shape: Shape) -> Tensor:
    """Returns the sorted positions of the units that stay in a layer of this shape.

    Each head keeps its dims of largest score; the heads with the largest sum of these scores stay. Ties go to the lower
    position, so the choice depends only on the scores.
    """
    by_head = scores.view(layer.heads, layer.units_per_head)
    order = by_head.argsort(dim=1, descending=True, stable=True)[:, : shape.dims]
    worth = by_head.double().gather(1, order).sum(1)
    stay = worth.argsort(descending=True, stable=True)[: shape.heads].sort().values
    return (order[stay].sort(dim=1).values + stay[:, None] * layer.units_per_head).flatten()


def slices(layer: PrunableLayer, unit_shape: str, scores: Tensor) -> list[tuple[float, float]]:
    """Returns (mean score, number of units) of the slices by which a layer grows, best first.

    With ``head-dims`` the slices are the best dim of every head, then the second best of every head, and so on. With
    ``heads`` they are the best head, the second best, and so on. With ``both`` they are the steps between the shapes
    that keep the largest scores for their size (their concave hull).
    """
    ranked = scores.view(layer.heads, layer.units_per_head).sort(dim=1, descending=True).values.double()
    if unit_shape == "heads" and layer.kind == "attention":
        return [(value, float(layer.units_per_head)) for value in ranked.mean(1).sort(descending=True).values.tolist()]
    if unit_shape != "both" or layer.kind == "ffn":
        return [(value, float(layer.heads)) for value in ranked.mean(0).tolist()]
    shapes = _best_of_each_size(layer, list(range(layer.units_per_head + 1)), scores)
    sums = _kept_sums(layer, scores)
    hull: list[tuple[float, float]] = []  # (sum of scores, units) of each step
    for small, large in pairwise(shapes):
        step = (float(sums[large] - sums[small]), float(large.units - small.units))
        while hull and step[0] * hull[-1][1] > hull[-1][0] * step[1]:
            last = hull.pop()
            step = (step[0] + last[0], step[1] + last[1])
        hull.append(step)
    return [(score / units, units) for score, units in hull]


def _kept_sums(layer: PrunableLayer, scores: Tensor) -> np.ndarray:
    """Returns the sum of scores that `keep_best` keeps, by number of heads and dims, float64 (heads + 1, dims + 1)."""
    ranked = scores.double().view(layer.heads, layer.units_per_head).sort(dim=1, descending=True).values
    sums = ranked.cumsum(1).sort(dim=0, descending=True).values.cumsum(0)
    return torch.nn.functional.pad(sums, (1, 0, 1, 0)).numpy()


def _best_of_each_size(layer: PrunableLayer, dims: list[int], scores: Tensor | None) -> list[Shape]:
    sums = _kept_sums(layer, torch.ones(layer.units) if scores is None else scores)
    best: dict[int, Shape] = {0: Shape(0, 0)}
    for heads in range(1, layer.heads + 1):
        for d in dims[1:]:
            shape = Shape(heads, d)
            held = best.setdefault(shape.units, shape)
            if sums[heads, d] > sums[held.heads, held.dims]:
                best[shape.units] = shape
    return [best[units] for units in sorted(best)]
