"""Planning: a criterion's choice on a metric set, under a budget, as a plan."""

from __future__ import annotations

from torch import Tensor, nn

from tapfl.config import PruningOptions, Scalar
from tapfl.errors import ConfigError, ModelError
from tapfl.models.backbone import BackboneSpec, example_input
from tapfl.models.cost import measure_cost
from tapfl.models.latency import Timings, measure_timings
from tapfl.models.units import prunable_layers
from tapfl.pruning.budget import Budget
from tapfl.pruning.cost_table import cost_table
from tapfl.pruning.criteria.registry import criterion_of
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.pruning.plan import LayerPlan, PruningPlan
from tapfl.pruning.surgery import shrink
from tapfl.seeds import torch_generator


def pruning_task(
    model: nn.Module,
    inputs: Tensor,
    budget: Budget | float | str,
    options: PruningOptions | None = None,
    batch: int = 64,
    labels: Tensor | None = None,
    seed: int = 0,
    timings: Timings | None = None,
) -> PruningTask:
    """Returns the problem that a criterion solves.

    Args:
        timings: of the model, for a budget that names latency; measured here and now where they are not given.

    Raises:
        ConfigError: if the budget is none.
        ModelError: if the metric set is empty, smaller than one batch, or not of the backbone's input format.
    """
    check_metric_set(model, inputs, batch)
    limits, options = Budget.parse(budget), options or PruningOptions()
    layers, dense = tuple(prunable_layers(model)), measure_cost(model)
    if limits.measured and timings is None:
        timings = measure_timings(model, layers, options.align)
    return PruningTask(
        model=model,
        layers=layers,
        dense=dense,
        inputs=inputs,
        labels=labels,
        budget=limits,
        costs=cost_table(layers, dense, limits, timings),
        options=options,
        batch=batch,
        generator=torch_generator(seed, "criterion"),
    )


def check_metric_set(model: nn.Module, inputs: Tensor, batch: int) -> None:
    """Raises ModelError if `inputs` is empty, smaller than one batch, or not of the input format of `model`."""
    if not len(inputs):
        raise ModelError("metric set is empty; it takes at least one batch of images")
    if len(inputs) < batch:
        raise ModelError(f"metric set of {len(inputs)} images is smaller than one batch of {batch}")
    wanted, given = tuple(example_input(model).shape[1:]), tuple(inputs.shape[1:])
    if given != wanted:
        raise ModelError(
            f"metric set of images {_sizes(given)} does not fit the backbone, which takes {_sizes(wanted)} "
            f"(channels×height×width)"
        )


def _sizes(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "without sizes"


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
    budget: Budget | float | str,
    options: PruningOptions | None = None,
    batch: int = 64,
    provenance: dict[str, Scalar] | None = None,
    seed: int = 0,
) -> PruningPlan:
    """Returns the plan that keeps `model` within `budget`, as the criterion chooses on `inputs`.

    Args:
        model: the dense backbone, as `spec` builds it.
        inputs: the metric set in the backbone's input format (n, channels, height, width), n >= batch.
        budget: a share of the whole model's MACs in (0, 1], or limits as `Budget.parse` takes them.

    Raises:
        BudgetError: if the budget cannot be met.
        ConfigError: if the budget is none, or the criterion changes weights (`Selection.model`).
    """
    task = pruning_task(model, inputs, budget, options, batch, seed=seed)
    return plan_of(task, selection_of(task), spec, provenance)


def selection_of(task: PruningTask) -> Selection:
    """Returns what the criterion of the task's options selects, for a plan.

    Raises:
        BudgetError: if the budget cannot be met.
        ConfigError: if the criterion changes weights (`Selection.model`).
    """
    name = task.options.criterion
    selection = criterion_of(name)(task)
    if selection.model is not None:
        raise ConfigError(f"pruning.criterion = {name!r}: changes the weights, which a plan alone does not carry")
    return selection
