"""Random units: the control that every criterion has to beat."""

from __future__ import annotations

import torch

from tapfl.pruning.criteria.ranking import by_layer
from tapfl.pruning.criteria.task import PruningTask, Ranked, Scores


def random_scores(task: PruningTask) -> Scores:
    """Returns U(0, 1) for every unit, from the task's generator."""
    return {layer.name: torch.rand(layer.units, generator=task.generator) for layer in task.layers}


random_units = Ranked(random_scores, by_layer)
