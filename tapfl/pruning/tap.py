"""Task-adaptive pruning: scores and layer importance on a metric set, widths under a budget, the plan."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from tapfl.config import PruningOptions, Scalar
from tapfl.models.backbone import BackboneSpec
from tapfl.models.cost import measure_cost
from tapfl.models.units import prunable_layers
from tapfl.pruning.allocate import allocate, layer_weights
from tapfl.pruning.layer_importance import layer_importance
from tapfl.pruning.plan import LayerPlan, PruningPlan
from tapfl.pruning.scores import neuron_importance
from tapfl.pruning.select import keep_best
from tapfl.pruning.surgery import shrink


def plan_pruning(
    model: nn.Module,
    spec: BackboneSpec,
    inputs: Tensor,
    budget: float,
    options: PruningOptions | None = None,
    batch: int = 64,
    provenance: dict[str, Scalar] | None = None,
) -> PruningPlan:
    """Returns the plan that keeps `budget` of the MACs of `model`, as its answers on `inputs` ask for.

    Args:
        model: the dense backbone, as `spec` builds it.
        inputs: the metric set in the backbone's input format (n, channels, height, width), n >= batch.
        budget: share of the whole model's MACs, in (0, 1].

    Raises:
        BudgetError: if the budget cannot be met.
    """
    options = options or PruningOptions()
    layers = prunable_layers(model)
    dense = measure_cost(model)
    scores = neuron_importance(model, layers, inputs, batch)
    uniform = allocate(layers, np.ones(len(layers)), dense.macs, budget, options)
    kl: dict[str, float] = {}
    widths = uniform
    if options.ratio == "adaptive":  # each layer is probed at the width that an even cut would give it
        probe = {layer.name: keep_best(layer, scores[layer.name], uniform[layer.name]) for layer in layers}
        kl = layer_importance(model, layers, probe, inputs, batch)
        widths = allocate(layers, layer_weights(layers, kl, options), dense.macs, budget, options)
    kept = {layer.name: keep_best(layer, scores[layer.name], widths[layer.name]) for layer in layers}
    parts = tuple(
        LayerPlan(
            name=layer.name,
            kind=layer.kind,
            units=layer.units,
            kept=tuple(kept[layer.name].tolist()),
            importance=kl.get(layer.name),
        )
        for layer in layers
    )
    plan = PruningPlan(backbone=spec, layers=parts, dense=dense, cost=dense, provenance=provenance or {})
    return plan.model_copy(update={"cost": measure_cost(shrink(model, plan))})
