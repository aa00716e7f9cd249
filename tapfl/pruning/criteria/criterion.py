"""The interface of a criterion, from a pruning task to the units that stay, and how scores spend a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from tapfl.compute import HERE, Compute, home
from tapfl.config import PruningOptions
from tapfl.errors import ConfigError, ModelError
from tapfl.models.cost import Cost
from tapfl.models.merging import Schedule
from tapfl.models.units import PrunableLayer, Shape
from tapfl.pruning.allocate import allocate, fit_widths, layer_weights
from tapfl.pruning.cost_table import CostTable
from tapfl.pruning.layer_importance import layer_importance
from tapfl.pruning.sensitivity import Sensitivities, sensitivities
from tapfl.pruning.unit_shape import Candidates, candidates, keep_best, slices

Scores = Mapping[str, Tensor]  # scores of all units of every layer (units,), by layer name; the largest stay
Samples = Callable[["PruningTask"], Iterator[dict[str, Tensor]]]  # terms of each image (images, units), by batch


@dataclass(frozen=True)
class PruningTask:
    """A pruning problem.

    Attributes:
        model: the dense backbone, frozen and in evaluation mode. A criterion does not change it.
        layers: its prunable layers, in the order of the forward pass.
        dense: its cost.
        inputs: the metric set in the backbone's input format (n, channels, height, width).
        labels: int64 (n,). If None, criteria that need labels use the dense model's predictions.
        costs: the limits on the pruned model, and the costs of every shape of every layer in their quantities.
        options: the pruning options, none of them `auto`.
        batch: batch size; n is at least one batch.
        generator: the only source of randomness. It is on the CPU, whatever the device of the model.
        probe: returns the layer importance (KL by layer name) of layers cut to the given shapes, if it is not to be
            measured on `inputs`.
        sums: returns the sums of `OverImages` over `inputs` for the given layers, if they need not be computed.
        new_head: the backbone with the classifier that devices get, if that is not the classifier of `model`. The
            budget refers to it.
        compute: how much is computed at once, and the precision where only a ranking is used.
    """

    model: nn.Module
    layers: tuple[PrunableLayer, ...]
    dense: Cost
    inputs: Tensor
    labels: Tensor | None
    costs: CostTable
    options: PruningOptions
    batch: int
    generator: torch.Generator
    probe: Callable[[Mapping[str, Shape]], dict[str, float]] | None = None
    sums: Callable[[Samples, Sequence[PrunableLayer]], dict[str, Tensor]] | None = None
    new_head: nn.Module | None = None
    compute: Compute = HERE

    @cached_property
    def fisher(self) -> Sensitivities:
        """The sensitivities of `model`, computed when they are first needed."""
        return self.fisher_of(self.model)

    def fisher_of(self, weights: nn.Module) -> Sensitivities:
        """Returns the sensitivities of a model with the same layers. Every call draws with the same seed."""
        draws = torch.Generator().manual_seed(self.generator.initial_seed())
        return sensitivities(weights, self.layers, self.inputs, self.batch, draws)


@dataclass(frozen=True)
class OverImages:
    """Scores computed from sums over the images i of the metric set S,

        score(S) = finish(Σ_{i ∈ S} t_i)

    where t_i depends only on image i, not on other images of its batch. One pass over a pool therefore scores all
    metric sets drawn from it (`tapfl.pruning.pool`).

    Attributes:
        samples: yields t (images, units) by layer name, batch by batch.
        finish: returns the scores of a task, given the sums over its images, float64 (units,) by layer name.
    """

    samples: Samples
    finish: Callable[[PruningTask, Mapping[str, Tensor]], Scores]

    def __call__(self, task: PruningTask) -> Scores:
        sums = total(self.samples(task)) if task.sums is None else task.sums(self.samples, task.layers)
        return self.finish(task, sums)


def total(samples: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the sums over all images, float64 (units,) by layer name."""
    sums: dict[str, Tensor] = {}
    for batch in samples:
        for name, values in batch.items():
            sums[name] = sums.get(name, 0) + values.double().sum(0)
    return sums


@dataclass(frozen=True)
class Selection:
    """What a criterion returns.

    Attributes:
        kept: the units that stay (sorted, int64), by layer name. All limits of the budget hold, and at least one is
            used to 99.5 % or more.
        importance: one number per layer, if the criterion computes it.
        model: the backbone with the weights that the criterion's search has trained, or None.
        steps: gradient steps of that search. They are deducted from recovery, so that criteria compare fairly.
        fades: whether branches that are dropped entirely fade out during recovery.
        tokens: schedule by which the pruned model merges tokens (`tapfl.models.merging`); empty: it merges none.
    """

    kept: dict[str, Tensor]
    importance: dict[str, float] = field(default_factory=dict)
    model: nn.Module | None = None
    steps: int = 0
    fades: bool = False
    tokens: Schedule = ()


def by_layer(task: PruningTask, scores: Scores) -> Selection:
    """Returns the best units of each layer; all layers keep equal shares, or shares by importance (`layer_weights`).

    Raises:
        ConfigError: if the importance is to be measured on a pool and the task has none.
        ModelError: if a score is NaN. It names the layer.
    """
    refuse_nan(scores)
    options = task.options
    steps = _candidates(task, scores, options.unit_shape)
    shapes = allocate(steps, np.ones(len(task.layers)), task.costs, options)
    importance: dict[str, float] = {}
    if options.ratio != "uniform":  # each layer is probed at the width that it has with equal shares
        importance = _layer_importance(task, scores, shapes)
        shapes = allocate(steps, layer_weights(task.layers, importance, options), task.costs, options)
    return Selection(_keep(task, scores, shapes), importance)


def across_layers(
    task: PruningTask,
    scores: Scores,
    group_of: Callable[[PrunableLayer], str] = lambda layer: "all",
    per_cost: bool = True,
    unit_shape: str | None = None,
) -> Selection:
    """Returns the best units of each group of layers, ranked together; groups share the budget evenly.

    The heads of an attention stay equally large, so an attention is ranked in slices (`slices`): the best dim of every
    head, then the second best of every head; or whole heads; or with ``unit_shape = both`` the steps between the shapes
    that keep most for their size. The score of a slice is the mean over its units.

    Args:
        group_of: returns the group of a layer.
        per_cost: rank by score per cost in the budget's own quantity (`CostTable.price`) instead of by score.
        unit_shape: replaces the option of that name.

    Raises:
        ModelError: if a score is NaN. It names the layer.
    """
    refuse_nan(scores)
    unit_shape = unit_shape or task.options.unit_shape
    groups: dict[str, list[PrunableLayer]] = {}
    for layer in task.layers:
        groups.setdefault(group_of(layer), []).append(layer)
    ideal = {layer.name: 0.0 for layer in task.layers}
    for members in groups.values():
        ranked = []
        for i, layer in enumerate(members):
            price = task.costs.price(layer.name) if per_cost else 1.0
            for k, (worth, units) in enumerate(slices(layer, unit_shape, scores[layer.name])):
                ranked.append((-worth / price, i, k, units))
        left = task.costs.shares * sum(layer.units * task.costs.slopes[layer.name] for layer in members)
        for _, i, _, units in sorted(ranked):
            cost = units * task.costs.slopes[members[i].name]
            if (left < cost).any():
                break
            ideal[members[i].name] += units
            left = left - cost
    steps = _candidates(task, scores, unit_shape)
    return Selection(_keep(task, scores, fit_widths(steps, np.array(list(ideal.values())), task.costs, task.options)))


@dataclass(frozen=True)
class Criterion:
    """A way to choose the units that stay.

    Most criteria score units without using the budget (`scores`) and then spend the budget by these scores (`spend`),
    so that the scores can be reused for many budgets. The other criteria search (`search`) and have no scores.

    Attributes:
        about: what it is, in a sentence or two, with its source.
        scores: computes the scores; an `OverImages` if they have that form. They must not depend on the task's budget
            and costs, nor on the options that control how a budget is spent.
        spend: chooses the units that stay by their scores.
        search: chooses the units that stay, in place of `scores` and `spend`.
        defaults: the meaning of `auto` for the options `ratio`, `basis`, `compensation` and `compensation_rows`, by
            name, where it differs from `PUBLISHED` in the registry.
        requires: options that must have the value in `defaults`; other values are refused before anything starts.
    """

    about: str = ""
    scores: Callable[[PruningTask], Scores] | None = None
    spend: Callable[[PruningTask, Scores], Selection] = by_layer
    search: Callable[[PruningTask], Selection] | None = None
    defaults: Mapping[str, str] = field(default_factory=dict)
    requires: tuple[str, ...] = ()

    def chooser(self, task: PruningTask, scores: Scores | None = None) -> Callable[[PruningTask], Selection]:
        """Returns a function that chooses the units that stay, for `task` under any budget. Scores are computed once.

        Args:
            scores: the scores of the task, if they are already known.
        """
        if self.search is not None:
            return self.search
        assert self.scores is not None, "a criterion has either scores or a search"
        known = home(self.scores(task)) if scores is None else scores
        return lambda task: self.spend(task, known)

    def __call__(self, task: PruningTask) -> Selection:
        return self.chooser(task)(task)


def refuse_nan(scores: Scores) -> None:
    """Raises ModelError, naming the layer, if a score is NaN, which cannot be ranked."""
    for name, values in scores.items():
        if values.isnan().any():
            raise ModelError(
                f"{name}: scores of units are not numbers; its activations or gradients may be too large for float32"
            )


def _layer_importance(task: PruningTask, scores: Scores, shapes: Mapping[str, Shape]) -> dict[str, float]:
    if task.probe is not None:
        return task.probe(shapes)
    if task.options.probe == "pool":
        raise ConfigError("pruning.probe = 'pool': there is no public pool apart from the metric set; accepted: own")
    kept = _keep(task, scores, shapes)
    return layer_importance(task.model, task.layers, kept, task.inputs, task.batch, task.compute)


def _candidates(task: PruningTask, scores: Scores, unit_shape: str) -> list[Candidates]:
    return [
        candidates(layer, task.costs.branches[layer.name], unit_shape, task.options.align, scores[layer.name])
        for layer in task.layers
    ]


def _keep(task: PruningTask, scores: Scores, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    return {layer.name: keep_best(layer, scores[layer.name], shapes[layer.name]) for layer in task.layers}
