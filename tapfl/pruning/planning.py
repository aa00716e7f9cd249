"""Planning: a criterion's choice on a metric set, under a budget, as a plan."""

from __future__ import annotations

from torch import Tensor, nn

from tapfl.config import PruningOptions, Scalar
from tapfl.errors import ConfigError, ModelError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.cost import measure_cost
from tapfl.models.units import prunable_layers
from tapfl.pruning.criteria.registry import criterion_of
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.pruning.plan import LayerPlan, PruningPlan
from tapfl.pruning.surgery import shrink
from tapfl.seeds import torch_generator


def pruning_task(
    model: nn.Module,
    inputs: Tensor,
    budget: float,
    options: PruningOptions | None = None,
    batch: int = 64,
    labels: Tensor | None = None,
    seed: int = 0,
) -> PruningTask:
    """Returns the problem that a criterion solves.

    Raises:
        ModelError: if the metric set is smaller than one batch.
    """
    if len(inputs) < batch:
        raise ModelError(f"metric set of {len(inputs)} images is smaller than one batch of {batch}")
    return PruningTask(
        model=model,
        layers=tuple(prunable_layers(model)),
        dense=measure_cost(model),
        inputs=inputs,
        labels=labels,
        budget=budget,
        options=options or PruningOptions(),
        batch=batch,
        generator=torch_generator(seed, "criterion"),
    )


def plan_of(
    task: PruningTask, selection: Selection, spec: BackboneSpec, provenance: dict[str, Scalar] | None = None
) -> PruningPlan:
    """Returns a criterion's selection as a plan, with its cost measured on the shrunk model."""
    parts = tuple(
        LayerPlan(
            name=layer.name,
            kind=layer.kind,
            units=layer.units,
            kept=tuple(selection.kept[layer.name].tolist()),
            importance=selection.importance.get(layer.name),
        )
        for layer in task.layers
    )
    plan = PruningPlan(backbone=spec, layers=parts, dense=task.dense, cost=task.dense, provenance=provenance or {})
    return plan.model_copy(update={"cost": measure_cost(shrink(task.model, plan))})


def plan_pruning(
    model: nn.Module,
    spec: BackboneSpec,
    inputs: Tensor,
    budget: float,
    options: PruningOptions | None = None,
    batch: int = 64,
    provenance: dict[str, Scalar] | None = None,
    seed: int = 0,
) -> PruningPlan:
    """Returns the plan that keeps `budget` of the MACs of `model`, as the criterion chooses on `inputs`.

    Args:
        model: the dense backbone, as `spec` builds it.
        inputs: the metric set in the backbone's input format (n, channels, height, width), n >= batch.
        budget: share of the whole model's MACs, in (0, 1].

    Raises:
        BudgetError: if the budget cannot be met.
        ConfigError: if the criterion changes weights (`Selection.model`).
    """
    task = pruning_task(model, inputs, budget, options, batch, seed=seed)
    name = task.options.criterion
    selection = criterion_of(name)(task)
    if selection.model is not None:
        raise ConfigError(f"pruning.criterion = {name!r}: changes the weights, which a plan alone does not carry")
    return plan_of(task, selection, spec, provenance)
