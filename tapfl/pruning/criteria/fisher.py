"""Fisher: the diagonal of the empirical Fisher information of the gates (Theis et al., "Faster gaze prediction with
dense networks and Fisher pruning", 2018; for gates on units, Kwon et al., NeurIPS 2022).

    s = E_b (∂L_b/∂g)²,  a gate g = 1 on the unit, L_b the cross-entropy of image b

Differs from the publications in that there is no search over rearranged masks and no greedy removal: one shot.
"""

from __future__ import annotations

import torch

from tapfl.pruning.criteria.gates import mean_over_images
from tapfl.pruning.criteria.ranking import across_layers, by_layer
from tapfl.pruning.criteria.task import PruningTask, Ranked, Scores


def fisher_scores(task: PruningTask) -> Scores:
    """Returns the formula above for every unit, float64 (units,) by layer name."""
    return mean_over_images(task, torch.square)


fisher = Ranked(fisher_scores, by_layer)
fisher_global = Ranked(fisher_scores, across_layers)  # all units together, by score per cost in the budget's own terms
