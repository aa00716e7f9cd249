"""TAP, the task-adaptive criterion as published (TAP-ViTs, arXiv 2601.02437), and TAP+, our extension.

`tap` ranks units within layers by the composite neuron importance (`tapfl.pruning.scores`), and weights layers by their
KL importance. It differs from the publication in how a budget becomes widths (`tapfl.pruning.allocate`): the published
clipping leaves part of the budget unused, and models of different methods would then differ in size.

`tap+` scores a unit by how much the prediction changes if the unit is removed and the other units compensate. One
expression, the remaining error (`elimination_order`), takes the place of the three terms of `tap`: the Fisher
information of the branch's output is the relevance (`tapfl.pruning.sensitivity`), the inverse covariance of the units
the redundancy, and the norm of a unit's contribution to the output the activeness. Attentions are cut in the canonical
basis of their heads (`tapfl.pruning.basis`), in which the first dims of a head are its best low-rank approximation. In
another basis they are scored as by `wanda`. The other parts of TAP+ are options of any criterion (`docs/pruning.md`):
the density-ratio metric set, uniform widths, and compensation layer by layer with rows weighted by Fisher sensitivity.
It needs no labels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tapfl.compute import home
from tapfl.progress import track
from tapfl.pruning.basis import carried_energy
from tapfl.pruning.criteria.criterion import Criterion, PruningTask, Scores
from tapfl.pruning.criteria.norms import output_norms
from tapfl.pruning.moments import RIDGE, unit_moments
from tapfl.pruning.scores import neuron_importance

ROUNDS = 256  # about the number of elimination rounds of a wide branch; narrower ones lose one unit per round


def composite_scores(task: PruningTask) -> Scores:
    """Returns the composite importance with the term weights of the options, (units,) by layer name."""
    weights = {"ffn": task.options.ffn_terms, "attention": task.options.attention_terms}
    return neuron_importance(task.model, task.layers, task.inputs, task.batch, weights, task.compute)


def tap_plus_scores(task: PruningTask) -> Scores:
    """Returns the scores of TAP+, (units,) by layer name. It takes one backward pass per batch.

    The score of an FFN unit is its position in the order of elimination; 0 is eliminated first. The score of an
    attention dim is its energy in the canonical basis, or its `wanda` score in another basis.
    """
    attentions = tuple(layer for layer in task.layers if layer.kind == "attention")
    return {
        **elimination_scores(task),
        **(carried_energy(task.model) or output_norms(replace(task, layers=attentions))),
    }


@torch.no_grad()
def elimination_scores(task: PruningTask) -> dict[str, Tensor]:
    """Returns the position of every FFN unit in the order of elimination, float64 (units,) by layer name."""
    layers = {layer.name: layer for layer in task.layers}
    scores = {}
    by_name = unit_moments(task.model, task.layers, task.inputs, task.batch, task.fisher)
    for name, moments in track(by_name.items(), "elimination"):
        W = layers[name].output_of(task.model).weight.double()
        order, errors = elimination_order(W, moments.covariance(), task.fisher[name].metric)
        scores[name] = torch.empty_like(errors)
        scores[name][order] = torch.arange(len(order), dtype=errors.dtype, device=errors.device)
    return scores


def elimination_order(W: Tensor, C: Tensor, M: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Returns the order in which backward elimination removes units, int64 (units,), and the error after each, float64.

    This is the optimal brain surgeon, unit by unit (Hassibi and Stork, NeurIPS 1992; for structures Kurtic et al.,
    "ZipLM", NeurIPS 2023). If unit j is removed and the others compensate, the output error grows by

        e_j = (Wᵀ M W)_jj / (H⁻¹)_jj,   H = C + λI

    and W ← W − W_:j H⁻¹_j: / H⁻¹_jj,  H⁻¹ ← H⁻¹ − H⁻¹_:j H⁻¹_j: / H⁻¹_jj. The unit with the smallest e_j is removed.
    This is repeated, so of several identical units one stays.

    Args:
        W: weights of the output linear, float64 (outputs, units).
        C: covariance of the units, float64 (units, units), positive semi-definite.
        M: metric of an output error, float64 (outputs, outputs), positive semi-definite; the identity weights all
            directions equally.
        ridge: λ relative to the mean variance of the units, >= 0.
    """
    units = len(C)
    H = C + torch.diag((ridge * C.diagonal().mean() + torch.finfo(C.dtype).tiny).expand(units))
    inverse = torch.linalg.inv(H)
    eigenvalues, directions = torch.linalg.eigh(M)
    W = eigenvalues.clamp(min=0).sqrt()[:, None] * (directions.T @ W)
    left, order, growth = torch.arange(units, device=C.device), [], []
    gone, remaining = torch.zeros(units, dtype=torch.uint8, device=C.device), units
    while remaining:
        e = (W.square().sum(0) / inverse.diagonal()).masked_fill(gone > 0, torch.inf)
        first = e.argsort(stable=True)[: min(max(1, units // ROUNDS), remaining)]
        order.append(left[first])
        growth.append(e[first])
        block = torch.linalg.solve_ex(inverse[first][:, first], inverse[first]).result
        W.addmm_(W[:, first], block, alpha=-1)
        inverse.addmm_(inverse[:, first], block, alpha=-1)
        gone[first] = 1
        remaining -= len(first)
        if 2 * remaining < len(left):  # removed units cost time in every round; cutting them out costs time once
            stay = gone.argsort(stable=True)[:remaining]  # with a mask, the CPU would wait for the GPU to count it
            W, inverse, left, gone = W[:, stay], inverse[stay][:, stay], left[stay], gone[stay]
    # on the CPU: older versions of torch have no deterministic cumsum on a GPU
    return home(torch.cat(order)), home(torch.cat(growth)).cumsum(0)


tap = Criterion(
    "Composite neuron importance within layers, KL importance across layers (TAP-ViTs, arXiv 2601.02437).",
    composite_scores,
)
tap_plus = Criterion(
    "The change of the prediction if a unit is removed and the other units compensate (ours).",
    tap_plus_scores,
    defaults={
        "ratio": "uniform",
        "basis": "canonical",
        "compensation": "sequential",
        "compensation_rows": "sensitivity",
    },
)
