"""What every criterion is given, and what it gives back: the same for all, so that they can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tapfl.config import PruningOptions
from tapfl.models.cost import Cost
from tapfl.models.units import PrunableLayer, Shape
from tapfl.pruning.budget import Budget
from tapfl.pruning.cost_table import CostTable


@dataclass(frozen=True)
class PruningTask:
    """A pruning problem.

    Attributes:
        model: the dense backbone, frozen and in evaluation mode. A criterion leaves it as it is.
        layers: its prunable layers, in the order of the forward pass.
        dense: its cost.
        inputs: the metric set in the backbone's input format (n, channels, height, width).
        labels: int64 (n,), or None: criteria that need labels then take the dense model's own predictions.
        budget: what may be kept.
        costs: what every shape of every layer costs, in the quantities of the budget.
        options: ratio, temperature, alignment, floor, shape of units.
        batch: images a batch; n is at least one batch.
        generator: the only source of chance.
        pool_probe: layer importance (KL by layer name) of layers cut to given shapes, as the public pool tells it; None
            where there is no pool, or it is not asked for (``pruning.probe``).
    """

    model: nn.Module
    layers: tuple[PrunableLayer, ...]
    dense: Cost
    inputs: Tensor
    labels: Tensor | None
    budget: Budget
    costs: CostTable
    options: PruningOptions
    batch: int
    generator: torch.Generator
    pool_probe: Callable[[Mapping[str, Shape]], dict[str, float]] | None = None


@dataclass(frozen=True)
class Selection:
    """A criterion's answer.

    Attributes:
        kept: the units that stay (sorted, int64), by layer name; all limits of the budget hold, and one is reached to
            99.5 %.
        importance: one number a layer where the criterion has one.
        model: the backbone with the weights that the criterion's own search left, if it trained; else None.
        steps: gradient steps that the search spent; a fair comparison deducts them from recovery.
        fades: the branches that are dropped as a whole are to fade during recovery, not to be gone at once.
    """

    kept: dict[str, Tensor]
    importance: dict[str, float] = field(default_factory=dict)
    model: nn.Module | None = None
    steps: int = 0
    fades: bool = False


Criterion = Callable[[PruningTask], Selection]
Scores = Mapping[str, Tensor]  # of all units of every layer (units,), by layer name; the largest stay


@dataclass
class Ranked:
    """A criterion in two steps: units are scored without a thought of the budget, which is then spent by the scores.

    What compares many budgets scores once, and what compares metric sets compares scores.

    Attributes:
        scores: uses neither the task's budget and costs, nor those of its options that say how a budget is spent.
        spend: says what stays.
    """

    scores: Callable[[PruningTask], Scores]
    spend: Callable[[PruningTask, Scores], Selection]

    def __call__(self, task: PruningTask) -> Selection:
        return self.spend(task, self.scores(task))
