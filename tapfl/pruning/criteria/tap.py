"""TAP (TAP-ViTs, arXiv 2601.02437): composite neuron importance within layers, KL importance between them.

Differs from the publication in how a budget becomes widths: water-filling and alignment (`tapfl.pruning.allocate`),
because clipping loses budget and methods then differ in size.
"""

from __future__ import annotations

from tapfl.pruning.criteria.ranking import by_layer
from tapfl.pruning.criteria.task import PruningTask, Ranked, Scores
from tapfl.pruning.scores import neuron_importance


def composite_scores(task: PruningTask) -> Scores:
    """Returns the composite importance with the terms that the options weigh; no labels, no gradients."""
    weights = {"ffn": task.options.ffn_terms, "attention": task.options.attention_terms}
    return neuron_importance(task.model, task.layers, task.inputs, task.batch, weights)


tap = Ranked(composite_scores, by_layer)
