"""Turns layer importance and a budget into layer widths: water-filling, then integer shapes within 0.5 % of the budget.

The published rule is keep_l = clip(L · k · w_l, 0, 1), and the budget that is clipped off stays unused. Our rule finds
the largest c for which

    cost(clip(c · w_l, floor, 1) of every layer l) is within every limit of the budget

by bisection. It uses the real costs of the layers (`tapfl.pruning.cost_table`), which need not be linear in the width.

These ideal widths are fractional. With one limit, integer shapes near them are found greedily: round the ideal widths
down, spend the rest step by step on the layer that is furthest below its ideal, then take one step away from one layer
and refill if that comes nearer to the budget. With several limits, or if the steps are too coarse for the greedy
method, the shapes are the solution of an integer program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from tapfl.config import PruningOptions
from tapfl.errors import BudgetError
from tapfl.models.units import PrunableLayer, Shape
from tapfl.pruning.cost_table import TOLERANCE, CostTable
from tapfl.pruning.unit_shape import Candidates

LEAST_WEIGHT = 1e-12  # relative to the largest weight, since a softmax may underflow to 0; bisection takes 200 steps
WIDTHS = 96  # candidate widths of a layer in the integer program, evenly spread
MIP_GAP, NODES = 0.01, 300  # HiGHS stops at this relative gap or number of nodes; both are deterministic, time is not
HIGHS_ERROR = 2e-6  # HiGHS may violate a constraint by this much


def softmax_weights(kl: np.ndarray, tau: float) -> np.ndarray:
    """Returns w = softmax(KL/τ), float64 (L,), sum 1."""
    shifted = np.exp((kl - kl.max()) / tau)
    return shifted / shifted.sum()


def water_fill(
    weights: np.ndarray, cost: Callable[[np.ndarray], np.ndarray], spendable: np.ndarray, floor: float
) -> tuple[float, np.ndarray]:
    """Returns (c, keep): the largest c for which the cost of keep = clip(c · w, floor, 1) is within `spendable`.

    Args:
        weights: positive (L,).
        cost: maps the kept shares (L,) of the layers to their cost by limit (M,); non-decreasing in every share.
        spendable: what may be spent on these layers, by limit (M,), at least the cost of the floor.
        floor: smallest share of a layer that is kept.
    """
    weights = np.maximum(weights, LEAST_WEIGHT * weights.max())

    def keep(c: float) -> np.ndarray:
        return np.clip(c * weights, floor, 1)

    def affordable(c: float) -> bool:
        return bool((cost(keep(c)) <= spendable * (1 + 1e-12)).all())

    low, high = 0.0, 1.0 / float(weights.min())
    if affordable(high):
        return high, keep(high)
    for _ in range(200):
        if (middle := (low + high) / 2) in (low, high):  # no float lies between them
            break
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return low, keep(low)


def layer_weights(layers: Sequence[PrunableLayer], kl: Mapping[str, float], options: PruningOptions) -> np.ndarray:
    """Returns softmax(KL/τ) by layer (L,), scaled to mean 1 over the FFNs and, separately, over the attentions."""
    weights = np.ones(len(layers))
    for kind in {layer.kind for layer in layers}:
        members = [i for i, layer in enumerate(layers) if layer.kind == kind]
        values = np.array([kl[layers[i].name] for i in members])
        weights[members] = softmax_weights(values, options.tau) * len(members)
    return weights


def allocate(
    layers: Sequence[Candidates], weights: np.ndarray, costs: CostTable, options: PruningOptions
) -> dict[str, Shape]:
    """Returns the shape of each layer, by name: water-filling by `weights`, then `fit_widths`.

    Raises:
        BudgetError: as for `fit_widths`.
    """
    full = np.array([layer.full for layer in layers])

    def spent(keep: np.ndarray) -> np.ndarray:
        return np.array(
            [
                sum(np.interp(u, layer.units, layer.costs[m]) for u, layer in zip(keep * full, layers, strict=True))
                for m in range(len(costs.limits))
            ]
        )

    spendable = np.maximum(costs.allowed - costs.fixed, spent(np.full(len(layers), options.floor)))
    _, keep = water_fill(weights, spent, spendable, options.floor)
    return fit_widths(layers, keep * full, costs, options)


def fit_widths(
    layers: Sequence[Candidates], ideal: np.ndarray, costs: CostTable, options: PruningOptions
) -> dict[str, Shape]:
    """Returns the shape of each layer, by name, close to `ideal` units.

    Every limit holds, and at least one is used to 99.5 % or more. If no limit binds, no layer is cut.

    Raises:
        BudgetError: if there are no such shapes. The error names the limit and the nearest values that are possible.
    """
    fit = Fit(tuple(layers), costs, np.array([layer.least(options.floor) for layer in layers]))
    steps = f" (pruning.floor = {options.floor:g}, pruning.align = {options.align})"
    costs.require_reachable(fit.total(fit.least), "this backbone can go down to", steps)
    ideal = np.maximum(ideal, [layer.units[low] for layer, low in zip(fit.layers, fit.least, strict=True)])
    chosen = fit.top
    if not fit.affordable(chosen):
        if len(costs.limits) == 1:
            chosen = _exchange(fit, _fill(fit, _round_down(fit, ideal), ideal), ideal)
        if not fit.met(chosen):
            chosen = _optimum(fit, ideal, options)
    return {layer.name: layer.shapes[i] for layer, i in zip(layers, chosen, strict=True)}


@dataclass(frozen=True)
class Fit:
    """The candidate shapes of L layers, the budget, and the smallest candidate that each layer may take, int (L,).

    A choice assigns to each layer the position of one of its candidates, int (L,).
    """

    layers: tuple[Candidates, ...]
    costs: CostTable
    least: np.ndarray

    @property
    def top(self) -> np.ndarray:
        return np.array([len(layer.units) - 1 for layer in self.layers])

    def total(self, chosen: np.ndarray) -> np.ndarray:
        """Returns the cost of the whole model by limit (M,)."""
        return self.costs.fixed + sum(layer.costs[:, i] for layer, i in zip(self.layers, chosen, strict=True))

    def affordable(self, chosen: np.ndarray) -> bool:
        return self.costs.within(self.total(chosen))

    def met(self, chosen: np.ndarray) -> bool:
        return self.affordable(chosen) and self.costs.reached(self.total(chosen))

    def used(self, chosen: np.ndarray) -> float:
        """Returns how much of its limit is used, as a fraction, for the limit that is closest to binding."""
        return float((self.total(chosen) / self.costs.allowed).max())

    def lack(self, chosen: np.ndarray, ideal: np.ndarray) -> np.ndarray:
        """Returns how far each layer is below its ideal, as a fraction of its full width (L,)."""
        units = np.array([layer.units[i] for layer, i in zip(self.layers, chosen, strict=True)])
        return (ideal - units) / np.array([layer.full for layer in self.layers])


# ---------------------------------------------------------------- greedy, under one limit


def _round_down(fit: Fit, ideal: np.ndarray) -> np.ndarray:
    chosen = np.array([layer.below(units) for layer, units in zip(fit.layers, ideal, strict=True)])
    chosen = np.maximum(chosen, fit.least)
    while not fit.affordable(chosen):  # layers at their minimum may cost more than their ideal widths do
        lack = np.where(chosen > fit.least, fit.lack(chosen, ideal), np.inf)
        chosen[int(lack.argmin())] -= 1
    return chosen


def _fill(fit: Fit, chosen: np.ndarray, ideal: np.ndarray, top: np.ndarray | None = None) -> np.ndarray:
    """Spends the remaining budget, one step at a time, on the layer that is furthest below its ideal."""
    chosen, top = chosen.copy(), fit.top if top is None else top
    total = fit.total(chosen)
    while True:
        lack = fit.lack(chosen, ideal)
        steps = {
            i: layer.costs[:, chosen[i] + 1] - layer.costs[:, chosen[i]]
            for i, layer in enumerate(fit.layers)
            if chosen[i] < top[i]
        }
        steps = {i: cost for i, cost in steps.items() if fit.costs.within(total + cost)}
        if not steps:
            return chosen
        i = max(steps, key=lambda i: lack[i])
        chosen[i] += 1
        total = total + steps[i]


def _exchange(fit: Fit, chosen: np.ndarray, ideal: np.ndarray) -> np.ndarray:
    """Tries to shrink each layer by one step and refill the others; returns the choice that uses most of the budget."""
    best = chosen
    for i in np.flatnonzero(chosen > fit.least):
        trial, top = chosen.copy(), fit.top
        trial[i] = top[i] = chosen[i] - 1
        trial = _fill(fit, trial, ideal, top)
        if fit.used(trial) > fit.used(best):
            best = trial
    return best


# ---------------------------------------------------------------- integer program, under several limits


class Program:
    """The choice of one candidate for each layer under all limits, as an integer program over N candidates.

    Costs are relative to the limits. The limits are sorted, so that their order in the budget does not matter.
    """

    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        self.choices = [
            np.unique(np.linspace(low, top, WIDTHS).round().astype(int))
            for low, top in zip(fit.least, fit.top, strict=True)
        ]
        self.sizes = [len(choice) for choice in self.choices]
        self.limits = np.argsort([limit.quantity for limit in fit.costs.limits])
        parts = [layer.costs[:, choice] for layer, choice in zip(fit.layers, self.choices, strict=True)]
        allowed = fit.costs.allowed
        self.cost = (np.concatenate(parts, axis=1) / allowed[:, None])[self.limits]  # (M, N)
        self.fixed, self.most = (fit.costs.fixed / allowed)[self.limits], float((fit.total(fit.top) / allowed).max())

    def nearest(self, ideal: np.ndarray) -> np.ndarray | None:
        """Returns the choice that meets the budget with the smallest squared deviation from `ideal`, or None."""
        deviation = np.concatenate(
            [
                ((layer.units[choice] - wanted) / layer.full) ** 2
                for layer, choice, wanted in zip(self.fit.layers, self.choices, ideal, strict=True)
            ]
        )
        M = len(self.cost)
        reach = np.hstack([self.cost, -np.diag(1 - TOLERANCE - self.fixed)])  # binary j: limit j is reached
        one = np.concatenate([np.zeros(self.cost.shape[1]), np.ones(M)])[None]
        rows = [LinearConstraint(reach, 0, np.inf), LinearConstraint(one, 1, np.inf)]
        return self._solve(np.concatenate([deviation, np.zeros(M)]), np.ones(M), rows, self.fit.met)

    def extreme(self, aim: int, above: bool) -> np.ndarray | None:
        """Returns the choice whose cost is nearest below (or above) limit `aim` with all other limits met, or None."""
        row = int(np.flatnonzero(self.limits == aim)[0])
        upper = np.ones(len(self.cost))
        if not above:
            return self._solve(-self.cost[row], upper, [], self.fit.affordable)
        upper[row] = self.most + 1
        over = LinearConstraint(self.cost[row][None], 1 - self.fixed[row] + HIGHS_ERROR, np.inf)
        return self._solve(self.cost[row], upper, [over], lambda chosen: True)

    def _solve(
        self,
        objective: np.ndarray,
        upper: np.ndarray,
        rows: Sequence[LinearConstraint],
        good: Callable[[np.ndarray], bool],
    ) -> np.ndarray | None:
        """Returns the best choice with cost ≤ upper, or None.

        If HiGHS slightly violates a limit, the program is solved once more with tighter limits.
        """
        N, extra = self.cost.shape[1], len(objective) - self.cost.shape[1]
        members = np.repeat(np.arange(len(self.sizes)), self.sizes)
        one_each = csr_array((np.ones(N), (members, np.arange(N))), shape=(len(self.sizes), N + extra))
        cost = np.hstack([self.cost, np.zeros((len(self.cost), extra))])
        for slack in (0.0, HIGHS_ERROR):
            limits = LinearConstraint(cost, -np.inf, upper - self.fixed - slack)
            solution = milp(
                objective,
                integrality=np.ones(N + extra),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(one_each, 1, 1), limits, *rows],
                options={"mip_rel_gap": MIP_GAP, "node_limit": NODES},
            )
            if solution.x is None:
                return None
            parts = np.split(solution.x[:N], np.cumsum(self.sizes)[:-1])
            chosen = np.array([c[int(part.argmax())] for c, part in zip(self.choices, parts, strict=True)])
            if good(chosen):
                return chosen
        return None


def _optimum(fit: Fit, ideal: np.ndarray, options: PruningOptions) -> np.ndarray:
    """Returns the choice closest to `ideal` that meets the budget. Raises BudgetError if there is none."""
    program = Program(fit)
    chosen = program.nearest(ideal)
    if chosen is not None:
        return chosen
    allowed = fit.costs.allowed
    aim = int((fit.total(fit.top) / allowed).argmax())
    limit, dense = fit.costs.limits[aim], fit.costs.dense[aim]
    near = {side: program.extreme(aim, above=side == "above") for side in ("below", "above")}
    named = " and ".join(
        f"{side} is {limit.express(fit.total(choice)[aim], dense)}"
        for side, choice in near.items()
        if choice is not None
    )
    finer = f"a smaller pruning.align than {options.align} comes nearer"
    accepted = finer if options.align > 1 else "accepted: a budget of that size"
    raise BudgetError(f"budget {limit.words} cannot be met within 0.5 %: the nearest {named}; {accepted}")
