"""Taylor: first-order estimate of what the loss of an image changes when a unit goes (Molchanov et al., ICLR 2017).

    s = E_b |∂L_b/∂g|,  a gate g = 1 on the unit, L_b the cross-entropy of image b

Differs from the publication in that tokens are summed before the absolute value is taken (a gate is one number an
image), and in that `taylor-global` ranks by score per cost where the publication subtracts a FLOPs regulariser.
"""

from __future__ import annotations

import torch

from tapfl.pruning.criteria.gates import mean_over_images
from tapfl.pruning.criteria.ranking import across_layers, by_layer
from tapfl.pruning.criteria.task import PruningTask, Ranked, Scores


def taylor_scores(task: PruningTask) -> Scores:
    """Returns the formula above for every unit, float64 (units,) by layer name."""
    return mean_over_images(task, torch.abs)


taylor = Ranked(taylor_scores, by_layer)
taylor_global = Ranked(taylor_scores, across_layers)  # all units together, by score per cost in the budget's own terms
