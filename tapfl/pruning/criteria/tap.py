"""TAP and TAP+: the task-adaptive criterion as published (TAP-ViTs, arXiv 2601.02437), and ours.

`tap` takes the composite neuron importance within layers (`tapfl.pruning.scores`) and KL importance between them. It
differs from the publication in how a budget becomes widths (`tapfl.pruning.allocate`): clipping loses budget, and
methods would then differ in size.

`tap+` scores a unit by how much the prediction changes when it goes and the other units compensate. The three terms of
`tap` are one expression here, the error that is left (`elimination_order`): the Fisher information of the branch's
output for the relevance (`tapfl.pruning.sensitivity`), the inverse covariance of the units for the redundancy, the norm
of what a unit writes for the activeness. Attentions are cut in the canonical basis of their heads
(`tapfl.pruning.basis`), in which the first dims of a head are the best low-rank head; in another basis as `wanda` does.
Its other parts are options of any criterion (`docs/pruning.md`): the density-ratio metric set, even widths, and
compensation layer by layer with rows weighted by Fisher sensitivity. It needs no labels.
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

ROUNDS = 256  # in which a branch loses its units: one unit a round up to that width, a few a round beyond


def composite_scores(task: PruningTask) -> Scores:
    """Returns the composite importance with the term weights of the options, (units,) by layer name."""
    weights = {"ffn": task.options.ffn_terms, "attention": task.options.attention_terms}
    return neuron_importance(task.model, task.layers, task.inputs, task.batch, weights, task.compute)


def tap_plus_scores(task: PruningTask) -> Scores:
    """Returns the scores of TAP+, (units,) by layer name; needs one gradient a batch.

    FFN units score their place in the order of elimination, 0 for the first to go. Attention dims score their energy in
    the canonical basis, or as in `wanda` in another basis.
    """
    attentions = tuple(layer for layer in task.layers if layer.kind == "attention")
    return {
        **elimination_scores(task),
        **(carried_energy(task.model) or output_norms(replace(task, layers=attentions))),
    }


@torch.no_grad()
def elimination_scores(task: PruningTask) -> dict[str, Tensor]:
    """Returns the place of every FFN unit in the order of elimination, float64 (units,) by name: 0 goes first."""
    layers = {layer.name: layer for layer in task.layers}
    scores = {}
    found = unit_moments(task.model, task.layers, task.inputs, task.batch, task.fisher)
    for name, moments in track(found.items(), "elimination"):
        W = layers[name].output_of(task.model).weight.double()
        order, errors = elimination_order(W, moments.covariance(), task.fisher[name].metric)
        scores[name] = torch.empty_like(errors)
        scores[name][order] = torch.arange(len(order), dtype=errors.dtype, device=errors.device)
    return scores


def elimination_order(W: Tensor, C: Tensor, M: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Returns the order in which backward elimination removes units, int64 (units,), and the error after each, float64.

    The optimal brain surgeon, unit by unit (Hassibi and Stork, NeurIPS 1992; for structures Kurtic et al., "ZipLM",
    NeurIPS 2023). If unit j goes and the others compensate, the error of the output grows by

        e_j = (Wᵀ M W)_jj / (H⁻¹)_jj,   H = C + λI

    and W ← W − W_:j H⁻¹_j: / H⁻¹_jj,  H⁻¹ ← H⁻¹ − H⁻¹_:j H⁻¹_j: / H⁻¹_jj. The unit of the smallest e_j goes, again and
    again, so one of several equal units stays.

    Args:
        W: the output linear, float64 (outputs, units).
        C: covariance of the units, float64 (units, units), positive semi-definite.
        M: weight of an output error, float64 (outputs, outputs), positive semi-definite; identity: all errors alike.
        ridge: λ as a share of the mean variance of the units, >= 0.
    """
    units = len(C)
    H = C + torch.diag((ridge * C.diagonal().mean() + torch.finfo(C.dtype).tiny).expand(units))
    inverse = torch.linalg.inv(H)
    worth, directions = torch.linalg.eigh(M)
    W = worth.clamp(min=0).sqrt()[:, None] * (directions.T @ W)
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
        if 2 * remaining < len(left):  # what is gone costs time in every round until it is cut out, and that costs some
            stay = gone.argsort(stable=True)[:remaining]  # positions and not a mask, whose size a GPU had to tell first
            W, inverse, left, gone = W[:, stay], inverse[stay][:, stay], left[stay], gone[stay]
    # at home: older versions of torch have no deterministic cumsum on a GPU
    return home(torch.cat(order)), home(torch.cat(growth)).cumsum(0)


tap = Criterion(
    "Composite neuron importance within layers, KL importance between them (TAP-ViTs, arXiv 2601.02437).",
    composite_scores,
)
tap_plus = Criterion(
    "The change of the prediction when a unit goes and the other units compensate (ours).",
    tap_plus_scores,
    defaults={
        "ratio": "uniform",
        "basis": "canonical",
        "compensation": "sequential",
        "compensation_rows": "sensitivity",
    },
)
