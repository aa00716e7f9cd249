"""The problem that a criterion solves, and its answer as a plan."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tapfl.config import PruningOptions
from tapfl.errors import ModelError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.cost import measure_cost
from tapfl.models.forward import example_input
from tapfl.models.latency import Timings, measure_timings
from tapfl.models.prunable import prunable_layers
from tapfl.options import Scalar
from tapfl.pruning.basis import canonical_basis, carried_energy
from tapfl.pruning.budget import Budget
from tapfl.pruning.cost_table import cost_table
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.pruning.plan import LayerPlan, PruningPlan
from tapfl.pruning.surgery import shrink
from tapfl.pruning.unit_shape import aligned
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

    Options that are `auto` become what the criterion is made for. In the canonical basis the task's model is `model`
    turned, on the metric set unless `model` was turned before (`turned_on_pool`).

    Args:
        timings: of the model, for a budget that names latency; measured here and now where they are not given.

    Raises:
        ConfigError: if the budget is none.
        ModelError: if the metric set is empty, smaller than one batch, or not of the backbone's input format.
    """
    check_metric_set(model, inputs, batch)
    limits, options = Budget.parse(budget), resolved(options or PruningOptions())
    layers, dense = tuple(prunable_layers(model)), measure_cost(model)
    options = aligned(options, layers)
    if options.basis == "canonical" and carried_energy(model) is None:
        model = canonical_basis(model, layers, inputs, batch)
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
    task: PruningTask, selection: Selection, spec: BackboneSpec, provenance: Mapping[str, Scalar] | None = None
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
    said = dict(provenance or {})
    plan = PruningPlan(backbone=spec, layers=parts, dense=task.dense, cost=task.dense, provenance=said)
    return plan.model_copy(update={"cost": measure_cost(shrink(task.model, plan))})
