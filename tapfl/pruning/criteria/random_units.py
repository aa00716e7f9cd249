"""Random units: the control that every criterion has to beat."""

from __future__ import annotations

import torch

from tapfl.pruning.criteria.ranking import by_layer
from tapfl.pruning.criteria.task import PruningTask, Selection


def random_units(task: PruningTask) -> Selection:
    """Scores every unit by U(0, 1) from the task's generator."""
    return by_layer(task, {layer.name: torch.rand(layer.units, generator=task.generator) for layer in task.layers})
