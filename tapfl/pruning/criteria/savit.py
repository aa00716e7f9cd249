"""SAViT (Zheng et al., "SAViT: structure-aware vision transformer pruning via collaborative optimization", NeurIPS
2022): prunes heads and FFN units, and splits the budget between the two types by how they interact.

Gates g = 1 are put on whole heads and on FFN units. L is the mean cross-entropy of a minibatch.

    score         s = E[(g · ∂L/∂g)²] over minibatches; within a type, one global threshold over all layers
    interactions  S_ij = E[gᵀ H_ij g] / (n_i n_j),  H_ij = ∂²L/∂g_i∂g_j between all gates of the types i and j, by
                  Hessian-vector products; n counts units: a head counts as its dims, as in the public code
    split         the shares ρ of heads and of FFN units to remove minimise ρᵀ S ρ under Σ cost = budget

The cost is in MACs, or in the quantity of the budget's tightest limit. With two types, the equality constraint leaves
one unknown: the number of heads to remove. All numbers are tried, so the search is exact. FFN units then fill the
budget exactly, within all its limits.

The publication's code differs in three ways. (a) It also prunes the embedding, as a third type, and so needs an
evolutionary search. (b) It draws one random pair of layers per minibatch for H_ij. Here one product with the gates of a
whole type gives the sum over all pairs; S is the same in expectation for stages of equal width. (c) It may remove all
heads of a layer, which is possible here only with ``pruning.floor = 0``. If S is not positive definite, the best split
may be at an end of the possible range.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.compute import home
from tapfl.errors import BudgetError
from tapfl.models.units import PrunableLayer
from tapfl.progress import track
from tapfl.pruning.criteria.criterion import Criterion, PruningTask, Selection
from tapfl.pruning.criteria.gradients import gated, open_gates, targets, within_types

MINIBATCH = 32  # as published; the scores are squared gradients of minibatches, so they depend on this size
TYPES = ("attention", "ffn")


def select(task: PruningTask) -> Selection:
    """Returns the heads and the FFN units that stay.

    Raises:
        BudgetError: if there is no number of heads with which FFN widths can meet the budget.
    """
    scores, S = importance_and_interactions(task)
    attentions = [layer for layer in task.layers if layer.kind == "attention"]
    ffns = tuple(layer for layer in task.layers if layer.kind == "ffn")
    order = removal_order(attentions, scores, task.options.floor)
    equality, slopes = task.costs.tightest, task.costs.slopes
    costs = np.array([layer.units_per_head * slopes[layer.name][equality] for layer, _ in order])
    heads = sum(layer.heads for layer in attentions)
    ffn_cost = float(sum(layer.units * slopes[layer.name][equality] for layer in ffns))
    whole = float(task.costs.total({layer.name: layer.full for layer in task.layers})[equality])
    to_go = max(whole - float(task.costs.allowed[equality]), 0.0)
    for count in splits(S, costs, heads, ffn_cost, to_go):
        kept = {}
        gone = {(layer.name, head) for layer, head in order[:count]}
        for layer in attentions:
            stay = [head for head in range(layer.heads) if (layer.name, head) not in gone]
            kept[layer.name] = torch.arange(layer.units).view(layer.heads, -1)[stay].flatten()
        settled = task.costs.settled({layer.name: layer.shape_of(kept[layer.name]) for layer in attentions})
        try:
            kept |= within_types(replace(task, layers=ffns, costs=settled), scores).kept
        except BudgetError:  # the FFNs cannot shrink enough, or no widths are within 0.5 % of the budget
            continue
        if to_go > 0 and not settled.reached(settled.total({n.name: n.shape_of(kept[n.name]) for n in ffns})):
            continue  # too many heads are removed: the budget is not used even with all FFN units
        return Selection({layer.name: kept[layer.name] for layer in task.layers})
    limit, dense = task.costs.limits[equality], float(task.costs.dense[equality])
    least = whole - costs.sum() - (1 - task.options.floor) * ffn_cost
    raise BudgetError(
        f"budget {limit.words} cannot be met by whole heads and FFN units: they can go down to about "
        f"{limit.express(least, dense)} (pruning.floor = {task.options.floor:g}); "
        f"above that, a smaller pruning.align than {task.options.align} comes nearer"
    )


def importance_and_interactions(task: PruningTask) -> tuple[dict[str, Tensor], np.ndarray]:
    """Returns the scores and the interactions S, all float64.

    The scores are (heads,) for attentions and (units,) for FFNs, by layer name. S is symmetric (2, 2), in the order of
    `TYPES`.
    """
    model = unfused(task.model)
    size = min(MINIBATCH, task.batch)
    groups = [[layer.name for layer in task.layers if layer.kind == kind] for kind in TYPES]
    count = np.array([sum(layer.units for layer in task.layers if layer.kind == kind) for kind in TYPES])
    scores = {
        layer.name: task.inputs.new_zeros(
            layer.heads if layer.kind == "attention" else layer.units, dtype=torch.float64
        )
        for layer in task.layers
    }
    S = np.zeros((2, 2))
    labels, batches = targets(task), len(task.inputs) // size
    # an incomplete last batch is left out: its gradients would be noisier, and their squares larger
    for start in track(range(0, batches * size, size), "interactions"):
        gates = open_gates(task.layers, task.inputs)
        with torch.enable_grad(), gated(model, task.layers, gates):
            loss = F.cross_entropy(model(task.inputs[start : start + size]), labels[start : start + size])
            gradients = torch.autograd.grad(loss, list(gates.values()), create_graph=True)
        gradient = dict(zip(gates, gradients, strict=True))
        for layer in task.layers:  # the gradient of a head's gate is the sum over the gates of its units
            own = gradient[layer.name].detach().double().view(len(scores[layer.name]), -1).sum(1)
            scores[layer.name] += own.square() / batches
        for i, names in enumerate(groups):
            slope = torch.stack([gradient[name].sum() for name in names]).sum()
            product = torch.autograd.grad(slope, list(gates.values()), retain_graph=True)
            along = dict(zip(gates, torch.stack([part.double().sum() for part in product]).tolist(), strict=True))
            for j, others in enumerate(groups):
                S[i, j] += sum(along[name] for name in others) / (count[i] * count[j] * batches)
    return home(scores), (S + S.T) / 2  # removes asymmetry by rounding


def removal_order(
    attentions: list[PrunableLayer], scores: dict[str, Tensor], floor: float
) -> list[tuple[PrunableLayer, int]]:
    """Returns the heads that may be removed, as (layer, head), by increasing score.

    The best heads of each layer, a share of at least `floor`, are not among them.
    """
    ranked = []
    for i, layer in enumerate(attentions):
        safe = int(np.ceil(floor * layer.heads))
        worst_first = scores[layer.name].argsort(stable=True).tolist()
        ranked += [(float(scores[layer.name][head]), i, head) for head in worst_first[: layer.heads - safe]]
    return [(attentions[i], head) for _, i, head in sorted(ranked)]


def splits(S: np.ndarray, head_costs: np.ndarray, heads: int, ffn_cost: float, to_go: float) -> list[int]:
    """Returns the numbers of heads to remove that can satisfy the cost equality, by increasing ρᵀ S ρ (best first).

    Args:
        S: interactions of heads and FFN units (2, 2).
        head_costs: cost of each head, in the order in which heads are removed.
        heads: total number of heads.
        ffn_cost: cost of all FFN units.
        to_go: cost that heads and FFN units together must lose.
    """
    by_heads = np.concatenate([[0.0], np.cumsum(head_costs)])
    ratio = np.stack([np.arange(len(by_heads)) / heads, (to_go - by_heads) / ffn_cost])
    objective = np.einsum("ik,ij,jk->k", ratio, S, ratio)
    possible = np.flatnonzero((ratio[1] >= -1e-12) & (ratio[1] <= 1))
    return sorted((int(k) for k in possible), key=lambda k: (objective[k], k))


def unfused(model: nn.Module) -> nn.Module:
    """Returns a copy of `model` with unfused attention, because the fused kernel has no second derivative."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return copied


savit = Criterion(
    "Whole heads and FFN units by squared gate gradients; their interactions determine how many of each are removed "
    "(SAViT, NeurIPS 2022).",
    search=select,
)
