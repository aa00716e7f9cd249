"""UPDP (Liu et al., "UPDP: a unified progressive depth pruner for CNN and vision transformer", AAAI 2024): depth only.

What goes is whole residual branches (an attention or an FFN); which ones is *searched*, by beam, with the fitness

    mean over the metric set of KL(P_dense ‖ P_subnet)

on a part of a large metric set, and on all of it between the finalists. A drop set is a solution if it brings the model
within the budget and no branch of it could stay: a budget that is paid in whole branches is met from below, by up to
the price of one, so the achieved cost (`PruningPlan.cost`) is what has to be reported. `pruning.floor`,
`align`, `ratio` and `unit-shape` say nothing here.

Differs from the publication, which has no public code: the search is over one-shot KL, where the paper trains a
supernet first, and the re-parameterised block that the paper puts in the place of a dropped one is replaced by
identity (plus the constant bias of the branch's output linear, which surgery keeps). The paper's progressive training
is a matter of recovery: a dropped branch is to fade, x + λ f(x) with λ from 1 to 0 over the first 30 %, and only then
to go. This criterion says what goes; it does not fade.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tapfl.errors import BudgetError
from tapfl.models.forward import segments
from tapfl.models.units import Shape, replaced
from tapfl.progress import track
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.training import predict

BEAM = 4  # drop sets that are pursued; with 12 blocks about 4 x 24 half passes over the images a dropped branch
IMAGES = 64  # of the metric set, evenly spaced, on which is searched; the BEAM best solutions then meet on all of it

DropSet = frozenset[str]


def updp(task: PruningTask) -> Selection:
    """Needs no labels and no gradients. `Selection.importance` is the KL of dropping that branch alone.

    Raises:
        BudgetError: if the budget is under the cost without any branch.
    """
    everything = frozenset(layer.name for layer in task.layers)
    if not _fits(task, everything):
        least = task.costs.total(_shapes(task, everything))
        i = int((least / task.costs.allowed).argmax())
        limit = task.costs.limits[i]
        raise BudgetError(
            f"budget {limit.words} cannot be met: without any branch this backbone costs "
            f"{limit.express(least[i], task.costs.dense[i])}"
        )
    solutions, importance = search(_thinned(task, IMAGES), BEAM)
    drop = solutions[0]
    if len(task.inputs) > IMAGES:
        dense = predict(task.model, task.inputs, task.batch).log_softmax(-1)
        drop = min(solutions[:BEAM], key=lambda each: divergence_of(task, dense, each))
    kept = {layer.name: torch.arange(0 if layer.name in drop else layer.units) for layer in task.layers}
    return Selection(kept, importance, fades=True)


def search(task: PruningTask, beam: int) -> tuple[list[DropSet], dict[str, float]]:
    """Returns the solutions that a beam search finds, by rising divergence, and the divergence of each branch alone.

    Level n of the search holds the `beam` best drop sets of n branches that are still over the budget.
    """
    names = [layer.name for layer in task.layers]
    dense = predict(task.model, task.inputs, task.batch).log_softmax(-1)
    alone: dict[str, float] = {}
    solutions: dict[DropSet, float] = {}
    level: list[DropSet] = [frozenset()]
    if _fits(task, level[0]):
        return level, {}
    depth = 0
    while level:
        open_sets: dict[DropSet, float] = {}
        depth += 1
        for parent in track(level, f"search, {depth} dropped"):
            children = {parent | {name}: name for name in names if name not in parent}
            fresh = {child: name for child, name in children.items() if child not in {*open_sets, *solutions}}
            found = divergence(task, dense, parent, fresh.values())
            for child, name in fresh.items():
                if not parent:
                    alone[name] = found[name]
                if not _fits(task, child):
                    open_sets[child] = found[name]
                elif _minimal(task, child):
                    solutions[child] = found[name]
                else:  # a branch of it may stay; that smaller set may be out of the beam's reach
                    smaller = _restored(task, child)
                    if smaller not in solutions:
                        solutions[smaller] = divergence_of(task, dense, smaller)
        level = sorted(open_sets, key=lambda drop: (open_sets[drop], sorted(drop)))[:beam]
    return sorted(solutions, key=lambda drop: (solutions[drop], sorted(drop))), alone


@torch.no_grad()
def divergence(task: PruningTask, dense: Tensor, parent: DropSet, more: Iterable[str]) -> dict[str, float]:
    """Returns, for each branch of `more`, the mean KL in nats when it is dropped besides `parent`.

    A batch passes the parent's subnet once; each child resumes from the cached input of its branch's block.

    Args:
        dense: log-probabilities of the dense model (n, classes).
    """
    layers = {layer.name: layer for layer in task.layers}
    steps = segments(task.model)
    position = {name: index for index, (name, _) in enumerate(steps)}
    totals = dict.fromkeys(more, 0.0)
    with dropped(task, parent):
        for part, expected in zip(task.inputs.split(task.batch), dense.split(task.batch), strict=True):
            entering: list[Tensor] = []
            x = part
            for _, step in steps:
                entering.append(x)
                x = step(x)
            for name in track(totals, "branches"):
                start = position[layers[name].block]
                with dropped(task, [name]):
                    totals[name] += _kl(expected, _pass(steps[start:], entering[start]))
    return {name: total / len(task.inputs) for name, total in totals.items()}


def divergence_of(task: PruningTask, dense: Tensor, drop: DropSet) -> float:
    """Returns the mean KL in nats of one drop set."""
    with dropped(task, drop):
        return _kl(dense, predict(task.model, task.inputs, task.batch)) / len(task.inputs)


@contextmanager
def dropped(task: PruningTask, names: Iterable[str]) -> Iterator[None]:
    """Puts what surgery leaves of these branches in their places, for the duration of the block."""
    layers = {layer.name: layer for layer in task.layers}
    nothing = torch.arange(0)
    with ExitStack() as stack:
        for name in names:
            emptied = layers[name].shrink(task.model.get_submodule(name), nothing)
            stack.enter_context(replaced(task.model, name, emptied.requires_grad_(False)))
        yield


def _thinned(task: PruningTask, images: int) -> PruningTask:
    """The same problem on at most `images` evenly spaced images of the metric set."""
    count = min(images, len(task.inputs))
    chosen = torch.arange(count) * len(task.inputs) // count
    return replace(task, inputs=task.inputs[chosen], labels=None)


def _pass(steps: list[tuple[str, Callable[[Tensor], Tensor]]], x: Tensor) -> Tensor:
    for _, step in steps:
        x = step(x)
    return x


def _kl(dense: Tensor, logits: Tensor) -> float:
    return float(F.kl_div(logits.log_softmax(-1), dense, log_target=True, reduction="sum").double())


def _shapes(task: PruningTask, drop: Iterable[str]) -> dict[str, Shape]:
    gone = set(drop)
    return {layer.name: Shape(0, 0) if layer.name in gone else layer.full for layer in task.layers}


def _fits(task: PruningTask, drop: Iterable[str]) -> bool:
    return task.costs.satisfied(_shapes(task, drop))


def _minimal(task: PruningTask, drop: DropSet) -> bool:
    return not any(_fits(task, drop - {name}) for name in drop)


def _restored(task: PruningTask, drop: DropSet) -> DropSet:
    """Returns `drop` without the branches that can stay, the most expensive one that can first."""
    cost = {layer.name: layer.units * task.costs.price(layer.name) for layer in task.layers}
    while free := [name for name in sorted(drop) if _fits(task, drop - {name})]:
        drop -= {max(free, key=lambda name: cost[name])}
    return drop
