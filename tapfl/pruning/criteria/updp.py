"""UPDP (Liu et al., "UPDP: a unified progressive depth pruner for CNN and vision transformer", AAAI 2024): depth only.

Whole residual branches (an attention or an FFN) are dropped. A beam search finds which ones; it minimises

    mean over the metric set of KL(P_dense ‖ P_subnet)

on 64 images of the metric set, and the finalists are compared on all of it. Each level of the search has many drop
sets. They are screened on 16 images, and only the best are measured on the 64, so a search takes about a minute for
DeiT-T instead of ten. A drop set is a solution if the model without its branches is within the budget, and no branch of
it could stay. With whole branches, the cost can end below the budget by up to the cost of one branch, so report the
achieved cost (`PruningPlan.cost`). The options `floor`, `align`, `ratio` and `unit-shape` have no effect.

The publication has no public code, and this implementation differs from it. The search uses the KL without training,
where the paper trains a supernet first. A dropped block becomes the identity (plus the constant bias of the branch's
output linear, which surgery keeps), where the paper puts a re-parameterised block. In the paper's progressive training
a dropped branch fades out, x + λ f(x) with λ from 1 to 0 over the first 30 % of the steps; here recovery does that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from tapfl.models.units import Shape
from tapfl.progress import stage
from tapfl.pruning.criteria.criterion import Criterion, PruningTask, Selection
from tapfl.pruning.layer_importance import divergences

BEAM = 4  # beam width; also the number of finalists
IMAGES = 64  # evenly spaced images of the metric set that the search uses
SCREEN_IMAGES = 16  # images on which the drop sets of a level are screened
SCREENED = 16  # drop sets per level that pass the screening and are measured on IMAGES images

DropSet = frozenset[str]


def select(task: PruningTask) -> Selection:
    """Returns the branches that stay; `importance` is the KL of dropping each branch alone.

    It needs no labels and no gradients.

    Raises:
        BudgetError: if the budget is below the cost of the model without any branch.
    """
    everything = frozenset(layer.name for layer in task.layers)
    least = task.costs.total(_shapes(task, everything))
    task.costs.require_reachable(least, "without any branch this backbone costs")
    solutions, importance = search(_thinned(task, IMAGES), BEAM)
    drop = solutions[0]
    if len(task.inputs) > IMAGES:
        finalists = solutions[:BEAM]
        drop = min(zip(divergence(task, finalists), range(len(finalists)), finalists, strict=True))[2]
    kept = {layer.name: torch.arange(0 if layer.name in drop else layer.units) for layer in task.layers}
    return Selection(kept, importance, fades=True)


def search(task: PruningTask, beam: int) -> tuple[list[DropSet], dict[str, float]]:
    """Returns the solutions of a beam search, and the divergence of dropping each branch alone.

    The solutions are sorted by increasing divergence. Level n of the search keeps the `beam` best drop sets of n
    branches with which the model is still over the budget.
    """
    names = [layer.name for layer in task.layers]
    alone: dict[str, float] = {}
    solutions: dict[DropSet, float] = {}
    level: list[DropSet] = [frozenset()]
    if _fits(task, level[0]):
        return level, {}
    with stage("search") as advance:
        while level:
            depth = len(level[0]) + 1
            advance(depth - 1, 0, f"{depth} branches dropped")
            children = dict.fromkeys(parent | {name} for parent in level for name in names if name not in parent)
            # a child that could keep a branch is replaced by its minimal subset, which the beam might miss
            fitting = [_minimal(task, child) for child in children if _fits(task, child)]
            open_sets = _screened(task, [child for child in children if not _fits(task, child)])
            fresh = list(dict.fromkeys([*open_sets, *(drop for drop in fitting if drop not in solutions)]))
            kl = dict(zip(fresh, divergence(task, fresh), strict=True))
            solutions |= {drop: kl[drop] for drop in fitting if drop in kl}
            alone |= {name: kl[frozenset({name})] for name in names if frozenset({name}) in kl}
            level = sorted(open_sets, key=lambda drop: (kl[drop], sorted(drop)))[:beam]
    return sorted(solutions, key=lambda drop: (solutions[drop], sorted(drop))), alone


def _screened(task: PruningTask, drops: list[DropSet]) -> list[DropSet]:
    """Returns the `SCREENED` drop sets that are best on a few images, or all if they are few or of the first level."""
    if len(task.inputs) <= SCREEN_IMAGES or len(drops) <= SCREENED or len(drops[0]) == 1:
        return drops
    rough = dict(zip(drops, divergence(_thinned(task, SCREEN_IMAGES), drops), strict=True))
    return sorted(drops, key=lambda drop: (rough[drop], sorted(drop)))[:SCREENED]


def divergence(task: PruningTask, drops: Sequence[DropSet]) -> list[float]:
    """Returns the mean KL of every drop set, in nats."""
    layers = {layer.name: layer for layer in task.layers}
    nothing = torch.arange(0)
    constant = {
        name: layers[name].shrink(task.model.get_submodule(name), nothing).requires_grad_(False)
        for name in set().union(*drops)
    }
    variants = [{name: constant[name] for name in drop} for drop in drops]
    kl = divergences(task.model, task.layers, variants, task.inputs, task.batch, task.compute)
    return kl.mean(1).tolist()


def _thinned(task: PruningTask, images: int) -> PruningTask:
    """Returns the task with at most `images` evenly spaced images of its metric set."""
    count = min(images, len(task.inputs))
    chosen = torch.arange(count) * len(task.inputs) // count
    return replace(task, inputs=task.inputs[chosen], labels=None)


def _shapes(task: PruningTask, drop: Iterable[str]) -> dict[str, Shape]:
    gone = set(drop)
    return {layer.name: Shape(0, 0) if layer.name in gone else layer.full for layer in task.layers}


def _fits(task: PruningTask, drop: Iterable[str]) -> bool:
    return task.costs.within(task.costs.total(_shapes(task, drop)))


def _minimal(task: PruningTask, drop: DropSet) -> DropSet:
    """Returns `drop` without the branches that can stay; the most expensive of them is kept first."""
    cost = {layer.name: layer.units * task.costs.price(layer.name) for layer in task.layers}
    while free := [name for name in sorted(drop) if _fits(task, drop - {name})]:
        drop -= {max(free, key=lambda name: cost[name])}
    return drop


updp = Criterion("Whole branches, found by beam search over KL (UPDP, AAAI 2024): depth only.", search=select)
