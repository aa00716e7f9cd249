"""The cost of every shape of every prunable layer, in the quantities of a budget.

MACs and parameters are computed; latency is measured. Each quantity becomes a fixed part and one table per layer, so
that the code that spends a budget need not know whether a cost is linear in the width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tapfl.errors import BudgetError
from tapfl.models.cost import Cost, Timings
from tapfl.models.units import PrunableLayer, Shape
from tapfl.pruning.budget import Budget, Limit

TOLERANCE = 0.005  # relative; the cost that binds may be at most this far below its limit
ROUNDING = 1e-12  # relative; a limit that equals the cost of a model up to rounding is met


@dataclass(frozen=True, eq=False)
class CostTable:
    """The limits of a budget and the costs of a backbone in their quantities.

    Attributes:
        limits: M limits, which must all hold.
        dense: cost of the dense model, by limit (M,).
        fixed: cost outside the prunable branches, by limit (M,).
        branches: by layer name, the cost for every number of heads and of dims per head (M, heads + 1, dims + 1).
    """

    limits: tuple[Limit, ...]
    dense: np.ndarray
    fixed: np.ndarray
    branches: Mapping[str, np.ndarray]

    @cached_property
    def allowed(self) -> np.ndarray:
        """The largest allowed cost of the whole model (M,), in the units of the limits."""
        return np.array([limit.allowed(dense) for limit, dense in zip(self.limits, self.dense, strict=True)])

    @property
    def measured(self) -> bool:
        """Whether latency is among the limits."""
        return any(limit.quantity == "latency" for limit in self.limits)

    @cached_property
    def slopes(self) -> dict[str, np.ndarray]:
        """Average cost of a unit (M,) by layer name: the cost of all units divided by their number."""
        return {
            name: (table[:, -1, -1] - table[:, 0, 0]) / ((table.shape[1] - 1) * (table.shape[2] - 1))
            for name, table in self.branches.items()
        }

    @cached_property
    def prunable(self) -> np.ndarray:
        """The cost of all units of all layers (M,)."""
        return self._sum(table[:, -1, -1] - table[:, 0, 0] for table in self.branches.values())

    @cached_property
    def spendable(self) -> np.ndarray:
        """What may be spent on units (M,), at most their cost; negative if a model without units exceeds the limit."""
        least = self.fixed + self._sum(table[:, 0, 0] for table in self.branches.values())
        return np.minimum(self.allowed - least, self.prunable)

    @property
    def shares(self) -> np.ndarray:
        """The fraction of the units' cost that each limit leaves, in [0, 1] (M,)."""
        return np.clip(self.spendable / self.prunable, 0, 1)

    @property
    def tightest(self) -> int:
        """The position of the limit that leaves the smallest fraction of the units' cost."""
        return int(self.shares.argmin())

    def price(self, name: str) -> float:
        """Returns the cost of a unit of a layer as one number.

        With one limit it is in that limit's quantity. With several it is the sum of the costs, each relative to what
        its limit allows for units.
        """
        slope = self.slopes[name]
        return float(slope[0] if len(slope) == 1 else (slope / np.maximum(self.spendable, ROUNDING)).sum())

    def total(self, shapes: Mapping[str, Shape]) -> np.ndarray:
        """Returns the cost of the whole model (M,) with layers of these shapes."""
        return self.fixed + self._sum(
            table[:, shapes[name].heads, shapes[name].dims] for name, table in self.branches.items()
        )

    def within(self, cost: np.ndarray) -> bool:
        """Returns whether a cost of the whole model (M,) is within every limit, up to rounding."""
        return bool((cost <= self.allowed * (1 + ROUNDING)).all())

    def reached(self, cost: np.ndarray) -> bool:
        """Returns whether the cost reaches at least one limit to within 0.5 %."""
        return bool((cost >= self.allowed * (1 - TOLERANCE)).any())

    def require_reachable(self, least: np.ndarray, words: str, options: str = "") -> None:
        """Raises BudgetError if the smallest model, of cost `least` (M,), is over a limit.

        Args:
            words: stand before the smallest possible cost in the message.
            options: stands after it.
        """
        if not self.within(least):
            i = int((least / self.allowed).argmax())
            can = self.limits[i].express(least[i], self.dense[i])
            raise BudgetError(f"budget {self.limits[i].words} cannot be met: {words} {can}{options}")

    def settled(self, shapes: Mapping[str, Shape]) -> CostTable:
        """Returns the table with the layers in `shapes` fixed at these shapes, so that only the others are left."""
        rest = {name: table for name, table in self.branches.items() if name not in shapes}
        return replace(
            self,
            fixed=self.fixed + self._sum(self.branches[name][:, s.heads, s.dims] for name, s in shapes.items()),
            branches=rest,
        )

    def _sum(self, costs: Iterable[np.ndarray]) -> np.ndarray:
        return sum(costs, np.zeros(len(self.limits)))


def cost_table(
    layers: Sequence[PrunableLayer], dense: Cost, budget: Budget, timings: Timings | None = None
) -> CostTable:
    """Returns the table of a backbone for a budget.

    Args:
        layers: all its prunable layers.
        dense: its cost.
        timings: needed if the budget limits latency. The fixed part is then the model's time less that of its branches.
    """
    by_quantity = {limit.quantity: _branches(layers, limit.quantity, timings) for limit in budget.limits}
    whole = {"macs": float(dense.macs), "params": float(dense.params), "latency": timings.dense if timings else 0.0}
    pruned = {q: sum(float(table[-1, -1]) for table in tables) for q, tables in by_quantity.items()}
    fixed = np.array([max(whole.get(q, pruned[q]) - pruned[q], 0.0) for q in by_quantity])
    branches = {layer.name: np.stack([tables[i] for tables in by_quantity.values()]) for i, layer in enumerate(layers)}
    return CostTable(budget.limits, fixed + np.array(list(pruned.values())), fixed, branches)


def _branches(layers: Sequence[PrunableLayer], quantity: str, timings: Timings | None) -> list[np.ndarray]:
    if quantity == "latency":
        assert timings is not None, "a budget that names latency needs timings"
        return [timings.branches[layer.name] for layer in layers]
    cost = PrunableLayer.params if quantity == "params" else PrunableLayer.macs
    sizes = [(layer, *layer.full) for layer in layers]
    return [
        np.array([[cost(layer, Shape(h, d)) for d in range(dims + 1)] for h in range(heads + 1)], dtype=np.float64)
        for layer, heads, dims in sizes
    ]
