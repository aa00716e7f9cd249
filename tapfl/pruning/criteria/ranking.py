"""From scores to units: the ways in which criteria spend a budget over the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from tapfl.models.units import PrunableLayer
from tapfl.pruning.allocate import allocate, fit_widths, layer_weights, slice_costs
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.pruning.layer_importance import layer_importance

Scores = Mapping[str, Tensor]


def keep_best(layer: PrunableLayer, scores: Tensor, width: int) -> Tensor:
    """Returns the sorted positions of the `width` best units; of an attention, equally many in each head.

    Ties go to the lower position, so the choice depends on nothing but the scores.
    """
    per_head = width // layer.heads
    order = scores.view(layer.heads, layer.units_per_head).argsort(dim=1, descending=True, stable=True)[:, :per_head]
    first = torch.arange(layer.heads)[:, None] * layer.units_per_head
    return (order.sort(dim=1).values + first).flatten()


def by_layer(task: PruningTask, scores: Scores) -> Selection:
    """Ranks within each layer; the layers' widths are even, or follow their importance (``ratio = adaptive``)."""
    ones = np.ones(len(task.layers))
    widths = allocate(task.layers, ones, task.dense.macs, task.budget, task.options)
    importance: dict[str, float] = {}
    if task.options.ratio == "adaptive":  # each layer is probed at the width that an even cut would give it
        probe = _keep(task, scores, widths)
        importance = layer_importance(task.model, task.layers, probe, task.inputs, task.batch)
        weights = layer_weights(task.layers, importance, task.options)
        widths = allocate(task.layers, weights, task.dense.macs, task.budget, task.options)
    return Selection(_keep(task, scores, widths), importance)


def across_layers(
    task: PruningTask, scores: Scores, group_of: Callable[[PrunableLayer], str] = lambda layer: "all"
) -> Selection:
    """Ranks all units of a group of layers together, by score a MAC; groups share the budget evenly.

    An attention's heads stay equally large, so what is ranked there are slices: the best dim of every head, the second
    best of every head, and so on, scored by their sum.
    """
    slices = {layer.name: _slices(layer, scores[layer.name]) / layer.macs_per_unit for layer in task.layers}
    groups: dict[str, list[int]] = {}
    for i, layer in enumerate(task.layers):
        groups.setdefault(group_of(layer), []).append(i)
    unit, full = slice_costs(task.layers)
    fixed = task.dense.macs - float(unit @ full)
    share = min(max((task.budget * task.dense.macs - fixed) / float(unit @ full), 0.0), 1.0)
    ideal = np.zeros(len(task.layers))
    for members in groups.values():
        ranked = sorted(
            ((float(value), -i, -k) for i in members for k, value in enumerate(slices[task.layers[i].name])),
            reverse=True,
        )
        left = share * float(unit[members] @ full[members])
        for _, i, _ in ranked:
            if left < unit[-i]:
                break
            ideal[-i] += 1
            left -= unit[-i]
    widths = fit_widths(task.layers, ideal, task.dense.macs, task.budget, task.options)
    return Selection(_keep(task, scores, widths))


def _slices(layer: PrunableLayer, scores: Tensor) -> Tensor:
    ranked = scores.view(layer.heads, layer.units_per_head).sort(dim=1, descending=True).values
    return ranked.double().mean(0)


def _keep(task: PruningTask, scores: Scores, widths: Mapping[str, int]) -> dict[str, Tensor]:
    return {layer.name: keep_best(layer, scores[layer.name], widths[layer.name]) for layer in task.layers}
