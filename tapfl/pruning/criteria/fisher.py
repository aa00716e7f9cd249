"""Fisher: the diagonal of the empirical Fisher information of the gates (Theis et al., "Faster gaze prediction with
dense networks and Fisher pruning", 2018; for gates on units, Kwon et al., NeurIPS 2022).

    s = E_b (∂L_b/∂g)²,  a gate g = 1 on the unit, L_b the cross-entropy of image b

Differs from the publications in that there is no search over rearranged masks and no greedy removal: one shot.
"""

from __future__ import annotations

import torch

from tapfl.pruning.criteria.gates import mean_over_images
from tapfl.pruning.criteria.ranking import across_layers, by_layer
from tapfl.pruning.criteria.task import PruningTask, Selection


def fisher(task: PruningTask) -> Selection:
    """Ranks within each layer."""
    return by_layer(task, mean_over_images(task, torch.square))


def fisher_global(task: PruningTask) -> Selection:
    """Ranks all units together, by score per cost in the budget's own terms."""
    return across_layers(task, mean_over_images(task, torch.square))
