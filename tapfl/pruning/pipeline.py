"""From a pruning task to a pruned model: select units, cut and compensate, recover, each as the options say.

```
model ─ canonical basis ─► task ─ criterion ─► selection ─ compensation ─► smaller model ─ recovery ─► smaller model
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tapfl.compute import HERE, Compute
from tapfl.config import PruningOptions
from tapfl.errors import ModelError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.cost import measure_cost, measure_timings
from tapfl.models.forward import example_input
from tapfl.models.new_head import put_head
from tapfl.models.prunable import prunable_layers
from tapfl.options import Scalar
from tapfl.pruning.basis import canonical_basis, in_basis
from tapfl.pruning.budget import Budget
from tapfl.pruning.compensation import cut, require_compensable
from tapfl.pruning.cost_table import cost_table
from tapfl.pruning.criteria.criterion import PruningTask, Selection
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.plan import LayerPlan, PruningPlan
from tapfl.pruning.recovery import FineTuneSet, recovered
from tapfl.pruning.surgery import shrink
from tapfl.pruning.tokens import select, stream_of
from tapfl.pruning.unit_shape import aligned
from tapfl.seeds import torch_generator
from tapfl.store import pack_tensors

CHANGES = ("basis", "compensation", "recovery")  # options that change weights, unless they are `none`


@dataclass(frozen=True)
class Pruned:
    """A pruned model and its plan.

    Attributes:
        exact: whether the dense weights and the plan alone determine the model (by `shrink`). This holds if neither
            the basis, the criterion, compensation nor recovery has changed a weight.
        metric_set: positions of the metric set's images in the public pool, int64, if they are known.
    """

    model: nn.Module
    plan: PruningPlan
    exact: bool
    metric_set: np.ndarray | None = None

    def weights(self, always: bool = False) -> bytes:
        """Returns the weights to send with the plan: the model's as safetensors, or nothing if the plan is `exact`.

        `tapfl.pruning.surgery.rebuild` makes the model from the plan and the weights.

        Args:
            always: return the weights in any case, for a device that does not cut its own backbone.
        """
        return b"" if self.exact and not always else pack_tensors(self.model.state_dict())


def pruning_task(
    model: nn.Module,
    inputs: Tensor,
    budget: Budget | float | str,
    options: PruningOptions | None = None,
    batch: int = 64,
    labels: Tensor | None = None,
    seed: int = 0,
    new_head: nn.Module | None = None,
    compute: Compute = HERE,
) -> PruningTask:
    """Returns the input of a criterion.

    Options that are `auto` take the criterion's defaults. With ``basis = canonical`` the task's model is in that basis.
    The basis is computed on the metric set, unless `model` is already in it (`turned_on_pool`).

    Args:
        new_head: the same backbone with the classifier that devices get, if it is not the classifier of `model`.
        compute: see `PruningTask`.

    Raises:
        ConfigError: if the budget is not valid, or the options' merging or compensation does not work on this model.
        ModelError: as for `check_metric_set`.
    """
    check_metric_set(model, inputs, batch, labels)
    limits, options = Budget.parse(budget), resolved(options or PruningOptions())
    if options.tokens != "none":
        stream_of(model, options)  # raises before anything slow is done
    layers, deployed = tuple(prunable_layers(model)), new_head or model
    require_compensable(model, layers, options)
    dense, options = measure_cost(deployed), aligned(options, layers)
    model = in_basis(model, options.basis, lambda: canonical_basis(model, layers, inputs.split(batch)))
    timings = measure_timings(deployed, layers, options.align) if limits.measured else None
    costs, generator = cost_table(layers, dense, limits, timings), torch_generator(seed, "criterion")
    known = (model, layers, dense, inputs, labels, costs, options, batch, generator)
    return PruningTask(*known, new_head=new_head, compute=compute)


def check_metric_set(model: Any, inputs: Tensor, batch: int, labels: Tensor | None = None) -> None:
    """Raises ModelError if `inputs` or `labels` do not fit `model` or each other, or are less than one batch."""
    if batch < 1:
        raise ModelError(f"batch = {batch}: must be at least 1")
    if not len(inputs):
        raise ModelError("metric set is empty; it takes at least one batch of images")
    if len(inputs) < batch:
        raise ModelError(f"metric set of {len(inputs)} images is smaller than one batch of {batch}")
    if inputs.dtype != torch.float32:
        raise ModelError(f"metric set of {inputs.dtype}; accepted: torch.float32, as of transform_of(model)")
    if labels is not None:
        classes = model.num_classes or model.num_features
        if labels.shape != inputs.shape[:1] or labels.dtype != torch.int64:
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise ModelError(f"labels of {got}; accepted: torch.int64 ({len(inputs)},), one for each image")
        if not bool(((labels >= 0) & (labels < classes)).all()):
            raise ModelError(f"labels of {int(labels.min())} to {int(labels.max())}; accepted: 0 to {classes - 1}")
    expected, actual = ("×".join(map(str, x.shape[1:])) or "without sizes" for x in (example_input(model), inputs))
    if actual != expected:
        raise ModelError(
            f"metric set of images {actual} does not fit the backbone, which takes {expected} (channels×height×width)"
        )


def finished(task: PruningTask, small: nn.Module) -> nn.Module:
    """Returns the pruned model as a device gets it: with the new head, if there is one."""
    return small if task.new_head is None else put_head(small, task.new_head)


def prune_model(
    task: PruningTask,
    spec: BackboneSpec,
    fine_tune: FineTuneSet | None = None,
    provenance: Mapping[str, Scalar] | None = None,
    seed: int = 0,
    selection: Selection | None = None,
) -> Pruned:
    """Returns the pruned model of a task and its plan, after all steps of this module.

    Args:
        spec: of the backbone that devices get.
        selection: the selection of the task's criterion, if it is already known.

    Raises:
        BudgetError: if the budget cannot be met.
    """
    selection = selection or select(task)
    small = finished(task, recovered(task, selection, cut(task, selection), fine_tune, seed))
    parts = {name: getattr(task.options, name) for name in ("criterion", "ratio", *CHANGES)}
    on: dict[str, Scalar] = {}
    if task.costs.measured:
        on = {"latency-on": Compute(task.inputs.device).kind}
    if task.options.tokens != "none":
        on |= {"tokens": task.options.tokens}
    plan = plan_of(task, selection, spec, {**parts, **on, "seed": seed, **(provenance or {})}, small)
    changed = selection.model is not None or any(parts[name] != "none" for name in CHANGES)
    return Pruned(small, plan, exact=not changed)


def plan_of(
    task: PruningTask,
    selection: Selection,
    spec: BackboneSpec,
    provenance: Mapping[str, Scalar] | None = None,
    small: nn.Module | None = None,
) -> PruningPlan:
    """Returns a criterion's selection as a plan, with the cost of the pruned model.

    Args:
        small: the pruned model; None: it is cut here to measure its cost.
    """
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
    plan = PruningPlan(
        backbone=spec,
        layers=parts,
        dense=task.dense,
        cost=task.dense,
        tokens=selection.tokens,
        provenance=dict(provenance or {}),
    )
    return plan.model_copy(update={"cost": measure_cost(small or shrink(task.new_head or task.model, plan))})
