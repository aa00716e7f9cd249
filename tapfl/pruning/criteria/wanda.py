"""Wanda (Sun et al., "A simple and effective pruning approach for large language models", ICLR 2024), for units.

    FFN unit j: ‖x_j‖₂ · ‖W2_:j‖₂,   attention dim c: ‖o_c‖₂ · ‖Wo_:c‖₂

with the norms of the activations over all images and tokens of the metric set. Differs from the publication, which
scores single weights |W_ij| · ‖x_j‖₂ and compares them within a row; a unit is a column, and its score is the L2 norm
of the column's. Ranked within layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tapfl.pruning.criteria.ranking import by_layer
from tapfl.pruning.criteria.task import PruningTask, Ranked
from tapfl.pruning.scores import record_activations


@torch.no_grad()
def output_norms(task: PruningTask) -> dict[str, Tensor]:
    """Returns the formula above for every unit, float64 (units,) by layer name; no labels, no gradients."""
    squares = {layer.name: torch.zeros(layer.units, dtype=torch.float64) for layer in task.layers}
    for number, images in enumerate(task.inputs.split(task.batch)):
        _, activations = record_activations(task.model, task.layers, images, number)
        for name, x in activations.items():
            squares[name] += x.double().square().sum((0, 1))
    scores = {}
    for layer in task.layers:
        weight = task.model.get_parameter(f"{layer.name}.{layer.output}.weight").double()
        scores[layer.name] = squares[layer.name].sqrt() * weight.norm(dim=0)
    return scores


wanda = Ranked(output_norms, by_layer)
