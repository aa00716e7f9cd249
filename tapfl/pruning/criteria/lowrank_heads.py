"""Low-rank heads (ours): attentions are cut in the canonical basis of their heads, FFNs by the norm of what they write.

In the basis of `tapfl.pruning.basis` the dims of a head are ordered by what they carry, so the first ones stay.
"""

from __future__ import annotations

from dataclasses import replace

from tapfl.errors import ConfigError
from tapfl.pruning.basis import carried_energy
from tapfl.pruning.criteria.ranking import by_layer
from tapfl.pruning.criteria.registry import recipe
from tapfl.pruning.criteria.task import PruningTask, Ranked, Scores
from tapfl.pruning.criteria.wanda import output_norms


def lowrank_scores(task: PruningTask) -> Scores:
    """Returns what dims carry and what FFN units write, (units,) by layer name; no labels, no gradients.

    Raises:
        ConfigError: if the task's model is not in the canonical basis.
    """
    carried = carried_energy(task.model)
    if carried is None:
        raise ConfigError("pruning.basis = 'none': criterion lowrank-heads cuts in the canonical basis; accepted: auto")
    ffns = tuple(layer for layer in task.layers if layer.kind == "ffn")
    return output_norms(replace(task, layers=ffns)) | carried


lowrank_heads = recipe(basis="canonical", needs=("basis",))(Ranked(lowrank_scores, by_layer))
