"""Low-rank heads (ours): attentions are cut in the canonical basis of their heads, FFNs by the norm of what they write.

In the basis of `tapfl.pruning.basis` the dims of a head are ordered by what they carry, so the first ones stay.
"""

from __future__ import annotations

from dataclasses import replace

from tapfl.errors import ConfigError
from tapfl.pruning.basis import carried_energy
from tapfl.pruning.criteria.ranking import by_layer
from tapfl.pruning.criteria.registry import recipe
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.pruning.criteria.wanda import output_norms


@recipe(basis="canonical", needs=("basis",))
def lowrank_heads(task: PruningTask) -> Selection:
    """Needs no labels and no gradients.

    Raises:
        ConfigError: if the task's model is not in the canonical basis.
    """
    carried = carried_energy(task.model)
    if carried is None:
        raise ConfigError("pruning.basis = 'none': criterion lowrank-heads cuts in the canonical basis; accepted: auto")
    ffns = tuple(layer for layer in task.layers if layer.kind == "ffn")
    return by_layer(task, output_norms(replace(task, layers=ffns)) | carried)
