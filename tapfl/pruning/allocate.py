"""From layer importance and a budget to widths: water-filling, then whole shapes within 0.5 % below the budget.

As published, keep_l = clip(L · k · w_l, 0, 1), which loses whatever is clipped. Ours: the largest c for which

    cost(clip(c · w_l, floor, 1) of every layer l) is within every limit of the budget

found by bisection, with what the layers really cost (`tapfl.pruning.cost_table`), be that linear in the width or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tapfl.config import PruningOptions
from tapfl.errors import BudgetError
from tapfl.models.units import PrunableLayer, Shape
from tapfl.pruning.cost_table import CostTable
from tapfl.pruning.fit import fit_widths
from tapfl.pruning.unit_shape import Ladder

LEAST_WEIGHT = 1e-12  # of the largest: a softmax may underflow to 0, and c is found by halving 200 times


def softmax_weights(kl: np.ndarray, tau: float) -> np.ndarray:
    """Returns w = softmax(KL/τ), float64 (L,), sum 1."""
    shifted = np.exp((kl - kl.max()) / tau)
    return shifted / shifted.sum()


def water_fill(
    weights: np.ndarray, cost: Callable[[np.ndarray], np.ndarray], spendable: np.ndarray, floor: float
) -> tuple[float, np.ndarray]:
    """Returns (c, keep): the largest c for which no cost of keep = clip(c · w, floor, 1) is over what may be spent.

    Args:
        weights: positive (L,).
        cost: what kept shares (L,) of the layers cost, by limit (M,); it never falls with a share.
        spendable: what may be spent on these layers, by limit (M,).
        floor: least share of a layer.

    Raises:
        BudgetError: if the floor alone costs more, naming what can be had.
    """
    weights = np.maximum(weights, LEAST_WEIGHT * weights.max())

    def keep(c: float) -> np.ndarray:
        return np.clip(c * weights, floor, 1)

    def affordable(c: float) -> bool:
        return bool((cost(keep(c)) <= spendable * (1 + 1e-12)).all())

    low, high = 0.0, 1.0 / float(weights.min())
    if not affordable(low):
        least, most, given = (
            " and ".join(f"{v:.6g}" for v in vs) for vs in (cost(keep(low)), cost(keep(high)), spendable)
        )
        raise BudgetError(f"budget {given} cannot be met: between {least} and {most} can")
    if affordable(high):
        return high, keep(high)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return low, keep(low)


def layer_weights(layers: Sequence[PrunableLayer], kl: Mapping[str, float], options: PruningOptions) -> np.ndarray:
    """Returns the weight of each layer, mean 1 over the FFNs and, separately, over the attentions.

    adaptive    softmax(KL/τ), as published
    power       KL^γ (ours): knows no scale, where the softmax is nearly even for small KLs
    uniform     1 for all
    """
    weights = np.ones(len(layers))
    if options.ratio == "uniform":
        return weights
    for kind in {layer.kind for layer in layers}:
        members = [i for i, layer in enumerate(layers) if layer.kind == kind]
        values = np.array([kl[layers[i].name] for i in members])
        if options.ratio == "adaptive":
            weights[members] = softmax_weights(values, options.tau) * len(members)
        elif values.any():
            weights[members] = values**options.gamma / (values**options.gamma).mean()
    return weights


def allocate(
    ladders: Sequence[Ladder], weights: np.ndarray, costs: CostTable, options: PruningOptions
) -> dict[str, Shape]:
    """Returns the shape of each layer, by name: water-filling by `weights`, then `fit_widths`.

    Raises:
        BudgetError: as `fit_widths`.
    """
    full = np.array([ladder.full for ladder in ladders])

    def spent(keep: np.ndarray) -> np.ndarray:
        return np.array(
            [
                sum(np.interp(u, step.units, step.costs[m]) for u, step in zip(keep * full, ladders, strict=True))
                for m in range(len(costs.limits))
            ]
        )

    spendable = np.maximum(costs.allowed - costs.fixed, spent(np.full(len(ladders), options.floor)))
    _, keep = water_fill(weights, spent, spendable, options.floor)
    return fit_widths(ladders, keep * full, costs, options)
