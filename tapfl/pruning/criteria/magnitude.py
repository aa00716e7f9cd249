"""Magnitude: the squared L2 norm of all weights that go with a unit (Li et al., "Pruning filters for efficient
ConvNets", ICLR 2017, for coupled structures as in DepGraph, CVPR 2023).

    FFN unit j        ‖W1_j‖² + b1_j² + ‖W2_:j‖²
    attention dim c   ‖Wq_c‖² + ‖Wk_c‖² + ‖Wv_c‖² + ‖Wo_:c‖²

Differs from the publication, which sums absolute weights of single filters and ranks them within a layer alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tapfl.models.units import PrunableLayer
from tapfl.pruning.criteria.ranking import by_layer
from tapfl.pruning.criteria.task import PruningTask, Ranked, Scores


def coupled_norms(task: PruningTask) -> Scores:
    """Returns the formula above for every unit, float64 (units,) by layer name; no images."""
    return {layer.name: coupled_norm(layer, task.model.get_submodule(layer.name)) for layer in task.layers}


@torch.no_grad()
def coupled_norm(layer: PrunableLayer, module: nn.Module) -> Tensor:
    """Returns the same of one branch, float64 (units,)."""
    total = torch.zeros(layer.units, dtype=torch.float64)
    for cut in layer.cuts(torch.arange(layer.units)):
        linear = module.get_submodule(cut.linear)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.double()
        if cut.side == "columns":
            total += weight.square().sum(0)[cut.index]
            continue
        rows = weight.square().sum(1)
        if layer.kind == "ffn" and linear.bias is not None:
            rows = rows + linear.bias.double().square()
        total += rows[cut.index].view(-1, layer.units).sum(0)  # an attention's unit has a row in each of q, k and v
    return total


magnitude = Ranked(coupled_norms, by_layer)
