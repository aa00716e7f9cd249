"""From layer importance and a budget to widths: water-filling, then whole aligned widths within 0.5 % below it.

As published, keep_l = clip(L · k · w_l, 0, 1), which loses whatever is clipped. Ours: the c with
Σ_l cost_l · clip(c · w_l, floor, 1) = budget, found by bisection, with the true costs of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tapfl.config import PruningOptions
from tapfl.errors import BudgetError
from tapfl.models.units import PrunableLayer

TOLERANCE = 0.005
LEAST_WEIGHT = 1e-12  # of the largest: a softmax may underflow to 0, and c is found by halving 200 times


def softmax_weights(kl: np.ndarray, tau: float) -> np.ndarray:
    """Returns w = softmax(KL/τ), float64 (L,), sum 1."""
    shifted = np.exp((kl - kl.max()) / tau)
    return shifted / shifted.sum()


def water_fill(weights: np.ndarray, cost: np.ndarray, budget: float, floor: float) -> tuple[float, np.ndarray]:
    """Returns (c, keep) with Σ_l cost_l · clip(c · w_l, floor, 1) = budget.

    Args:
        weights: positive (L,).
        cost: cost of each layer when whole (L,).
        budget: to be spent on these layers, in the unit of `cost`.
        floor: least share of a layer.

    Raises:
        BudgetError: if the budget is under Σ cost · floor or over Σ cost, naming both.
    """
    least, most = floor * cost.sum(), cost.sum()
    if not least <= budget <= most * (1 + 1e-12):
        raise BudgetError(f"budget {budget:.6g} cannot be met: between {least:.6g} and {most:.6g} can")

    weights = np.maximum(weights, LEAST_WEIGHT * weights.max())

    def keep(c: float) -> np.ndarray:
        return np.clip(c * weights, floor, 1)

    low, high = 0.0, 1.0 / float(weights.min())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost @ keep(middle) < budget else (low, middle)
    return high, keep(high)


def layer_weights(layers: Sequence[PrunableLayer], kl: Mapping[str, float], options: PruningOptions) -> np.ndarray:
    """Returns the weight of each layer: softmax(KL/τ) over the FFNs and, separately, over the attentions, mean 1 each.

    ``ratio = uniform`` gives 1 to all.
    """
    weights = np.ones(len(layers))
    if options.ratio == "adaptive":
        for kind in {layer.kind for layer in layers}:
            members = [i for i, layer in enumerate(layers) if layer.kind == kind]
            values = np.array([kl[layers[i].name] for i in members])
            weights[members] = softmax_weights(values, options.tau) * len(members)
    return weights


def allocate(
    layers: Sequence[PrunableLayer], weights: np.ndarray, dense_macs: int, share: float, options: PruningOptions
) -> dict[str, int]:
    """Returns the width (units kept) of each layer, by name: water-filling by `weights`, then `fit_widths`.

    Raises:
        BudgetError: as `fit_widths`.
    """
    unit, full = slice_costs(layers)
    most = float(unit @ full)
    spendable = min(max(share * dense_macs - (dense_macs - most), options.floor * most), most)
    _, keep = water_fill(weights, unit * full, spendable, options.floor)
    return fit_widths(layers, keep * full, dense_macs, share, options)


def fit_widths(
    layers: Sequence[PrunableLayer], ideal: np.ndarray, dense_macs: int, share: float, options: PruningOptions
) -> dict[str, int]:
    """Returns the width (units kept) of each layer, by name, near `ideal` units a head.

    Widths are multiples of `align` (dims a head for an attention), so that the whole model costs at most
    ``share * dense_macs`` and at least 99.5 % of that.

    Raises:
        BudgetError: if no such widths exist, naming the nearest share that can be had.
    """
    unit, full = slice_costs(layers)
    budget = math.floor(share * dense_macs * (1 + 1e-12))  # costs are whole; a share that was a quotient is met exactly
    fixed = dense_macs - float(unit @ full)
    least = np.minimum(
        np.maximum(np.ceil(options.floor * full / options.align), options.floor > 0) * options.align, full
    )
    minimum = fixed + float(unit @ least)
    if budget < minimum:
        raise BudgetError(
            f"budget {share:g} of the MACs cannot be met: this backbone can go down to "
            f"{math.ceil(minimum / dense_macs * 1e4) / 1e4:g} "
            f"(pruning.floor = {options.floor:g}, pruning.align = {options.align})"
        )
    ideal = np.maximum(ideal, least)
    widths = np.maximum(_round_down(ideal, full, options.align), least)
    while fixed + unit @ widths > budget:  # the least widths may cost more than their layers' shares
        excess = np.where(widths > least, widths - ideal, -np.inf)
        i = int(excess.argmax())
        widths[i] = max(_step(widths[i], full[i], options.align, -1), least[i])
    widths = _fill(widths, ideal, unit, full, budget - fixed, options.align)
    widths = _exchange(widths, ideal, unit, full, least, budget - fixed, options.align)
    achieved = (fixed + float(unit @ widths)) / dense_macs
    if achieved < share * (1 - TOLERANCE):
        raise BudgetError(
            f"budget {share:g} of the MACs cannot be met within 0.5 %: the nearest below is {achieved:.4f}; "
            f"a smaller pruning.align than {options.align} comes nearer"
        )
    return {layer.name: int(width) * layer.heads for layer, width in zip(layers, widths, strict=True)}


def slice_costs(layers: Sequence[PrunableLayer]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the MACs of one unit in every head, and the units a head when dense, for each layer."""
    unit = np.array([layer.macs_per_unit * layer.heads for layer in layers], dtype=np.float64)
    return unit, np.array([layer.units_per_head for layer in layers])


def _round_down(widths: np.ndarray, full: np.ndarray, align: int) -> np.ndarray:
    return np.where(widths >= full, full, np.floor(widths / align + 1e-9) * align)


def _step(width: float, full: float, align: int, direction: int) -> float:
    """The next width up or down among the multiples of `align` and the full width."""
    if direction > 0:
        return min((width // align + 1) * align, full)
    return (np.ceil(width / align) - 1) * align


def _fill(
    widths: np.ndarray, ideal: np.ndarray, unit: np.ndarray, full: np.ndarray, spendable: float, align: int
) -> np.ndarray:
    """Spends what is left, one aligned step at a time, on the layer that is furthest below its ideal."""
    widths = widths.astype(np.float64).copy()
    while True:
        steps = np.array([_step(w, f, align, 1) for w, f in zip(widths, full, strict=True)]) - widths
        affordable = (steps > 0) & (unit @ widths + unit * steps <= spendable)
        if not affordable.any():
            return widths
        lack = np.where(affordable, (ideal - widths) / np.maximum(full, 1), -np.inf)
        i = int(lack.argmax())
        widths[i] += steps[i]


def _exchange(
    widths: np.ndarray,
    ideal: np.ndarray,
    unit: np.ndarray,
    full: np.ndarray,
    least: np.ndarray,
    spendable: float,
    align: int,
) -> np.ndarray:
    """Takes one step from a layer and fills up again, if that comes nearer to the budget; the nearest wins."""
    best, spent = widths, float(unit @ widths)
    for i in range(len(widths)):
        lower = _step(widths[i], full[i], align, -1)
        if lower < least[i]:
            continue
        trial = widths.copy()
        trial[i] = lower
        blocked = np.where(np.arange(len(widths)) == i, lower, full)
        trial = _fill(trial, ideal, unit, blocked, spendable, align)
        if float(unit @ trial) > spent:
            best, spent = trial, float(unit @ trial)
    return best
