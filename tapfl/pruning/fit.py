"""Ideal widths made whole: shapes on the layers' ladders whose cost is within 0.5 % below the budget, or a refusal.

First greedily: ideal widths rounded down, what is left spent step by step on the layer that lacks most, one step
exchanged where that comes nearer. Where the steps are too coarse for that, by a search over the sums that whole steps
can make, which is exact on small backbones and takes the shapes nearest to the ideal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tapfl.config import PruningOptions
from tapfl.errors import BudgetError
from tapfl.models.units import Shape
from tapfl.pruning.cost_table import ROUNDING, TOLERANCE, CostTable, reached, within
from tapfl.pruning.unit_shape import Ladder

STEPS = 96  # rungs of a layer that the search looks at, evenly spread
BINS = 8192  # sums that it tells apart in the quantity it aims at; of two in one bin the nearer to the ideal goes on
COARSE_BINS = 16  # and in every other quantity


def fit_widths(
    ladders: Sequence[Ladder], ideal: np.ndarray, costs: CostTable, options: PruningOptions
) -> dict[str, Shape]:
    """Returns the shape of each layer, by name, near `ideal` units.

    Every limit holds, and one at least is reached to 99.5 %; where no limit binds, all layers stay whole.

    Raises:
        BudgetError: if there are no such shapes, naming the limit and the nearest values of it that can be had.
    """
    fit = Fit(tuple(ladders), costs, np.array([ladder.least(options.floor) for ladder in ladders]))
    _refuse_below(fit, options)
    ideal = np.maximum(ideal, [ladder.units[low] for ladder, low in zip(fit.ladders, fit.least, strict=True)])
    rungs = fit.top
    if not fit.affordable(rungs):
        rungs = _exchange(fit, _fill(fit, _round_down(fit, ideal), ideal), ideal)
        if not fit.met(rungs):
            rungs = _search(fit, rungs, ideal, options)
    return {ladder.name: ladder.shapes[rung] for ladder, rung in zip(ladders, rungs, strict=True)}


@dataclass(frozen=True)
class Fit:
    """Ladders (L of them), what may be spent on them, and the lowest rung (L,) that each layer may stand on."""

    ladders: tuple[Ladder, ...]
    costs: CostTable
    least: np.ndarray

    @property
    def top(self) -> np.ndarray:
        return np.array([len(ladder.units) - 1 for ladder in self.ladders])

    def total(self, rungs: np.ndarray) -> np.ndarray:
        """Returns the cost of the whole model (M,)."""
        return self.costs.fixed + sum(step.costs[:, r] for step, r in zip(self.ladders, rungs, strict=True))

    def affordable(self, rungs: np.ndarray) -> bool:
        return within(self.total(rungs), self.costs.allowed)

    def met(self, rungs: np.ndarray) -> bool:
        return self.affordable(rungs) and reached(self.total(rungs), self.costs.allowed)

    def used(self, rungs: np.ndarray) -> float:
        """Returns how much of the limit that is nearest to binding is used."""
        return float((self.total(rungs) / self.costs.allowed).max())

    def lack(self, rungs: np.ndarray, ideal: np.ndarray) -> np.ndarray:
        """Returns by how much of its whole width each layer is below its ideal (L,)."""
        units = np.array([step.units[r] for step, r in zip(self.ladders, rungs, strict=True)])
        return (ideal - units) / np.array([step.full for step in self.ladders])


def _refuse_below(fit: Fit, options: PruningOptions) -> None:
    least, allowed = fit.total(fit.least), fit.costs.allowed
    if within(least, allowed):
        return
    i = int((least / allowed).argmax())
    limit = fit.costs.limits[i]
    raise BudgetError(
        f"budget {limit.words} cannot be met: this backbone can go down to "
        f"{limit.express(least[i], fit.costs.dense[i])} (pruning.floor = {options.floor:g}, "
        f"pruning.align = {options.align})"
    )


def _round_down(fit: Fit, ideal: np.ndarray) -> np.ndarray:
    rungs = np.array([step.below(units) for step, units in zip(fit.ladders, ideal, strict=True)])
    rungs = np.maximum(rungs, fit.least)
    while not fit.affordable(rungs):  # the least widths may cost more than their layers' shares
        lack = np.where(rungs > fit.least, fit.lack(rungs, ideal), np.inf)
        rungs[int(lack.argmin())] -= 1
    return rungs


def _fill(fit: Fit, rungs: np.ndarray, ideal: np.ndarray, top: np.ndarray | None = None) -> np.ndarray:
    """Spends what is left, one step at a time, on the layer that is furthest below its ideal."""
    rungs, top = rungs.copy(), fit.top if top is None else top
    total = fit.total(rungs)
    while True:
        lack = fit.lack(rungs, ideal)
        steps = {
            i: step.costs[:, rungs[i] + 1] - step.costs[:, rungs[i]]
            for i, step in enumerate(fit.ladders)
            if rungs[i] < top[i]
        }
        steps = {i: cost for i, cost in steps.items() if within(total + cost, fit.costs.allowed)}
        if not steps:
            return rungs
        i = max(steps, key=lambda i: lack[i])
        rungs[i] += 1
        total = total + steps[i]


def _exchange(fit: Fit, rungs: np.ndarray, ideal: np.ndarray) -> np.ndarray:
    """Takes one step from a layer and fills up again, if that comes nearer to the budget; the nearest wins."""
    best = rungs
    for i in np.flatnonzero(rungs > fit.least):
        trial, top = rungs.copy(), fit.top
        trial[i] = top[i] = rungs[i] - 1
        trial = _fill(fit, trial, ideal, top)
        if fit.used(trial) > fit.used(best):
            best = trial
    return best


def _search(fit: Fit, rungs: np.ndarray, ideal: np.ndarray, options: PruningOptions) -> np.ndarray:
    """Returns the rungs nearest to `ideal` that meet the budget, aiming at the limit nearest to binding first."""
    allowed = fit.costs.allowed
    order = np.argsort(-fit.total(rungs) / allowed, kind="stable")
    sums = [_sums(fit, int(aim), ideal) for aim in order]
    for total, deviation, found in sums:
        good = (total <= allowed * (1 + ROUNDING)).all(1) & (total >= allowed * (1 - TOLERANCE)).any(1)
        if good.any():
            return found[int(np.where(good, deviation, np.inf).argmin())]
    aim, total = int(order[0]), sums[0][0][:, order[0]]
    limit, dense = fit.costs.limits[aim], fit.costs.dense[aim]
    over = total > allowed[aim]
    near = [("below", total[~over].max())] + ([("above", total[over].min())] if over.any() else [])
    named = " and ".join(f"{side} is {limit.express(value, dense)}" for side, value in near)
    raise BudgetError(
        f"budget {limit.words} cannot be met within 0.5 %: the nearest {named}; "
        f"a smaller pruning.align than {options.align} comes nearer"
    )


def _sums(fit: Fit, aim: int, ideal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns sums that whole steps make: costs (S, M), squared deviation from the ideal (S,), rungs (S, L).

    All limits hold but that on the quantity `aim`, whose sums may lie above it.
    """
    least, most = fit.total(fit.least), fit.total(fit.top)
    bound = np.where(np.arange(len(least)) == aim, np.inf, fit.costs.allowed * (1 + ROUNDING))
    width = np.maximum(most - least, ROUNDING) / np.where(np.arange(len(least)) == aim, BINS, COARSE_BINS)
    total, deviation, rungs = least[None], np.zeros(1), np.zeros((1, 0), dtype=np.int16)
    for step, low, wanted in zip(fit.ladders, fit.least, ideal, strict=True):
        choice = np.unique(np.linspace(low, len(step.units) - 1, STEPS).round().astype(np.int16))
        more = (step.costs[:, choice] - step.costs[:, [low]]).T
        off = ((step.units[choice] - wanted) / step.full) ** 2
        total = (total[:, None] + more).reshape(-1, len(least))
        deviation = (deviation[:, None] + off).ravel()
        order = np.flatnonzero((total <= bound).all(1))
        if step is not fit.ladders[-1]:
            order = order[np.argsort(deviation[order], kind="stable")]
            _, first = np.unique(((total[order] - least) / width).astype(np.int64), axis=0, return_index=True)
            order = order[first]
        total, deviation = total[order], deviation[order]
        rungs = np.concatenate([rungs[order // len(choice)], choice[order % len(choice), None]], axis=1)
    return total, deviation, rungs
