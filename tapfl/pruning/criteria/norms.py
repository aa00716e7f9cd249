"""Criteria by norms of weights and activations, and the random control. They use no labels and no gradients.

    magnitude   FFN unit j        ‖W1_j‖² + b1_j² + ‖W2_:j‖²
                attention dim c   ‖Wq_c‖² + ‖Wk_c‖² + ‖Wv_c‖² + ‖Wo_:c‖²
    wanda       FFN unit j        ‖x_j‖₂ · ‖W2_:j‖₂,     attention dim c   ‖o_c‖₂ · ‖Wo_:c‖₂

Magnitude (Li et al., ICLR 2017, for coupled structures as in DepGraph, CVPR 2023) differs from the publication, which
sums absolute weights of single filters. Wanda (Sun et al., ICLR 2024) takes the norms of the activations over all
images and tokens of the metric set. The publication scores single weights |W_ij| · ‖x_j‖₂ and compares them within a
row; here a unit is a column. Low-rank heads (ours) cuts attentions in the canonical basis (`tapfl.pruning.basis`), in
which the first dims of a head are its best low-rank approximation, and FFNs as Wanda does. All rank within layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tapfl.errors import ConfigError
from tapfl.models.units import PrunableLayer
from tapfl.progress import track
from tapfl.pruning.basis import carried_energy
from tapfl.pruning.criteria.criterion import Criterion, OverImages, PruningTask, Scores
from tapfl.pruning.scores import record_activations


def coupled_norms(task: PruningTask) -> Scores:
    """Returns the magnitude of every unit, float64 (units,) by layer name. It uses no images."""
    return {layer.name: coupled_norm(layer, task.model.get_submodule(layer.name)) for layer in task.layers}


@torch.no_grad()
def coupled_norm(layer: PrunableLayer, module: nn.Module) -> Tensor:
    """Returns the magnitude of the units of one branch, float64 (units,)."""
    inner, output = (module.get_submodule(name) for name in (layer.inner, layer.output))
    assert isinstance(inner, nn.Linear) and isinstance(output, nn.Linear)
    rows = inner.weight.double().square().sum(1)
    if layer.kind == "ffn" and inner.bias is not None:
        rows = rows + inner.bias.double().square()
    by_part = rows.view(-1, layer.units)  # an attention's unit has a row in each of q, k and v
    return by_part.sum(0) + output.weight.double().square().sum(0)


def squares(task: PruningTask) -> Iterator[dict[str, Tensor]]:
    """Yields the squared norms of each image's activations, float64 (images, units) by layer name."""
    for number, images in enumerate(track(task.inputs.split(task.batch), "scores")):
        activations = record_activations(task.model, task.layers, images, number)[1]
        yield {name: x.double().square().sum(1) for name, x in activations.items()}


@torch.no_grad()
def times_weights(task: PruningTask, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns Wanda's scores, float64 (units,) by layer name, given the squared norms of the activations as `sums`."""
    weights = {n.name: n.output_of(task.model).weight.double() for n in task.layers if n.name in sums}
    return {name: sums[name].sqrt() * weight.norm(dim=0) for name, weight in weights.items()}


def random_scores(task: PruningTask) -> Scores:
    """Returns a random score from U(0, 1) for every unit, drawn with the task's generator."""
    return {layer.name: torch.rand(layer.units, generator=task.generator) for layer in task.layers}


def ffn_squares(task: PruningTask) -> Iterator[dict[str, Tensor]]:
    return squares(replace(task, layers=tuple(n for n in task.layers if n.kind == "ffn")))


def lowrank(task: PruningTask, sums: Mapping[str, Tensor]) -> Scores:
    """Returns the energy of attention dims and Wanda's score of FFN units, (units,) by layer name.

    Raises:
        ConfigError: if the task's model is not in the canonical basis.
    """
    energy = carried_energy(task.model)
    if energy is None:
        raise ConfigError("pruning.basis = 'none': criterion lowrank-heads cuts in the canonical basis; accepted: auto")
    return times_weights(task, sums) | energy


output_norms = OverImages(squares, times_weights)
magnitude = Criterion("Squared L2 norm of all weights that belong to a unit (Li et al., ICLR 2017).", coupled_norms)
wanda = Criterion(
    "Norm of a unit's activations times the norm of its output weights (Sun et al., ICLR 2024).", output_norms
)
random_units = Criterion("Random scores: the control that every criterion has to beat.", random_scores)
lowrank_heads = Criterion(
    "Attention dims by their energy in the canonical basis of the heads, FFN units as in `wanda` (ours).",
    OverImages(ffn_squares, lowrank),
    defaults={"ratio": "uniform", "basis": "canonical", "compensation": "sequential"},
    requires=("basis",),
)
