"""From scores to units: the ways in which criteria spend a budget over the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from tapfl.errors import ConfigError
from tapfl.models.units import PrunableLayer, Shape
from tapfl.pruning.allocate import allocate, layer_weights
from tapfl.pruning.criteria.task import PruningTask, Scores, Selection
from tapfl.pruning.fit import fit_widths
from tapfl.pruning.layer_importance import layer_importance
from tapfl.pruning.unit_shape import Ladder, keep_best, ladder, slices


def by_layer(task: PruningTask, scores: Scores) -> Selection:
    """Ranks within each layer; the layers' widths are even, or follow their importance (`layer_weights`).

    Raises:
        ConfigError: if the importance is to come from a pool that the task does not have.
    """
    ladders = _ladders(task, scores, task.options.unit_shape)
    shapes = allocate(ladders, np.ones(len(task.layers)), task.costs, task.options)
    importance: dict[str, float] = {}
    if task.options.ratio != "uniform":  # each layer is probed at the width that an even cut would give it
        importance = _layer_importance(task, scores, shapes)
        weights = layer_weights(task.layers, importance, task.options)
        shapes = allocate(ladders, weights, task.costs, task.options)
    return Selection(_keep(task, scores, shapes), importance)


def across_layers(
    task: PruningTask,
    scores: Scores,
    group_of: Callable[[PrunableLayer], str] = lambda layer: "all",
    per_cost: bool = True,
    unit_shape: str | None = None,
) -> Selection:
    """Ranks all units of a group of layers together; groups share the budget evenly.

    An attention's heads stay equally large, so what is ranked there are slices: the best dim of every head, the second
    best of every head, and so on; or whole heads. A slice scores the mean of its units. Where a layer may be cut both
    ways, its slices are the steps between those shapes that keep most for their size.

    Args:
        per_cost: ranks by score per cost in the budget's own terms (`CostTable.price`), else by score.
        unit_shape: instead of the option of that name.
    """
    unit_shape = unit_shape or task.options.unit_shape
    groups: dict[str, list[PrunableLayer]] = {}
    for layer in task.layers:
        groups.setdefault(group_of(layer), []).append(layer)
    share = task.costs.shares
    ideal = {layer.name: 0.0 for layer in task.layers}
    for members in groups.values():
        ranked = []
        for i, layer in enumerate(members):
            price = task.costs.price(layer.name) if per_cost else 1.0
            for k, (worth, units) in enumerate(slices(layer, unit_shape, scores[layer.name])):
                ranked.append((-worth / price, i, k, units))
        left = share * sum(layer.units * task.costs.slopes[layer.name] for layer in members)
        for _, i, _, units in sorted(ranked):
            cost = units * task.costs.slopes[members[i].name]
            if (left < cost).any():
                break
            ideal[members[i].name] += units
            left = left - cost
    ladders = _ladders(task, scores, unit_shape)
    shapes = fit_widths(ladders, np.array(list(ideal.values())), task.costs, task.options)
    return Selection(_keep(task, scores, shapes))


def _layer_importance(task: PruningTask, scores: Scores, shapes: Mapping[str, Shape]) -> dict[str, float]:
    if task.options.probe == "own":
        return layer_importance(task.model, task.layers, _keep(task, scores, shapes), task.inputs, task.batch)
    if task.pool_probe is None:
        raise ConfigError("pruning.probe = 'pool': there is no public pool beside the metric set here; accepted: own")
    return task.pool_probe(shapes)


def _ladders(task: PruningTask, scores: Scores, unit_shape: str) -> list[Ladder]:
    return [
        ladder(layer, task.costs.branches[layer.name], unit_shape, task.options.align, scores[layer.name])
        for layer in task.layers
    ]


def _keep(task: PruningTask, scores: Scores, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    return {layer.name: keep_best(layer, scores[layer.name], shapes[layer.name]) for layer in task.layers}
