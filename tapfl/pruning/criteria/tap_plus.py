"""TAP+ (ours): task-adaptive pruning by what a cut changes in the prediction once the other units have compensated.

`tap` scores a unit by relevance to the prediction, redundancy with others and activeness, each a number of its own, in
a weighted sum. Here the same three stand in one expression, the error that is left (`tapfl.pruning.elimination`): the
Fisher information of the branch's output for the relevance (`tapfl.pruning.sensitivity`), the inverse covariance of the
units for the redundancy, the norm of what a unit writes for the activeness. Attentions are cut in the canonical basis
of their heads (`tapfl.pruning.basis`), where the first dims of a head are the best low-rank head; in another basis, by
the norm of what a dim writes, as `wanda` does.

What goes with it, each an option with its ablation (`docs/tap-plus.md`): the density-ratio metric set, compensation
layer by layer with rows weighted by sensitivity, and widths by KL^γ, which knows no scale. No labels are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tapfl.progress import track
from tapfl.pruning.basis import carried_energy
from tapfl.pruning.criteria.ranking import by_layer
from tapfl.pruning.criteria.registry import recipe
from tapfl.pruning.criteria.task import PruningTask, Ranked, Scores
from tapfl.pruning.criteria.wanda import output_norms
from tapfl.pruning.elimination import elimination_order
from tapfl.pruning.lost_output import unit_moments
from tapfl.pruning.sensitivity import Sensitivity, sensitivities


def tap_plus_scores(task: PruningTask) -> Scores:
    """Returns when each unit would go, 0 first, (units,) by layer name; no labels, one gradient a batch, no training.

    Of attentions in the canonical basis it is what each dim carries, in another what it writes.
    """
    felt = sensitivities(task.model, task.layers, task.inputs, task.batch, task.generator)
    attentions = tuple(layer for layer in task.layers if layer.kind == "attention")
    carried = carried_energy(task.model) or output_norms(replace(task, layers=attentions))
    return elimination_scores(task, felt) | carried


@torch.no_grad()
def elimination_scores(task: PruningTask, felt: Mapping[str, Sensitivity]) -> dict[str, Tensor]:
    """Returns, for every FFN by name, when each unit would go, float64 (units,): 0 is the first."""
    outputs = {layer.name: f"{layer.name}.{layer.output}.weight" for layer in task.layers}
    scores = {}
    found = unit_moments(task.model, task.layers, task.inputs, task.batch, felt)
    for name, moments in track(found.items(), "elimination"):
        W = task.model.get_parameter(outputs[name]).double()
        order, _ = elimination_order(W, moments.covariance(), felt[name].metric)
        scores[name] = torch.empty(len(order), dtype=torch.float64)
        scores[name][order] = torch.arange(len(order), dtype=torch.float64)
    return scores


tap_plus = recipe(ratio="power", basis="canonical", compensation="sequential", compensation_rows="sensitivity")(
    Ranked(tap_plus_scores, by_layer)
)
