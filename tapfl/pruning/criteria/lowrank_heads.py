"""Low-rank heads (ours): attentions are cut in the canonical basis of their heads, FFNs by the norm of what they write.

In the basis of `tapfl.pruning.basis` the dims of a head are ordered by what they carry, so the first ones stay. A model
that is not in that basis yet is brought there on the metric set; where several devices share adapters, the server does
it once on the public pool, for all.
"""

from __future__ import annotations

from dataclasses import replace

from tapfl.pruning.basis import canonical_basis, carried_energy
from tapfl.pruning.criteria.ranking import by_layer
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.pruning.criteria.wanda import output_norms


def lowrank_heads(task: PruningTask) -> Selection:
    """Needs no labels and no gradients. The selection brings the turned model, unless the task's is one already."""
    model = task.model
    if carried_energy(model) is None:
        model = canonical_basis(model, task.layers, task.inputs, task.batch)
    turned = replace(task, model=model)
    ffns = tuple(layer for layer in task.layers if layer.kind == "ffn")
    scores = output_norms(replace(turned, layers=ffns)) | (carried_energy(model) or {})
    selection = by_layer(turned, scores)
    return replace(selection, model=None if model is task.model else model)
