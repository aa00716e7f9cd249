"""UPop (Shi et al., "UPop: unified and progressive pruning for compressing vision-language transformers", ICML 2023).

Masks m = 1 multiply the hidden units of an FFN before the activation, and q, k and v of an attention. The masks of an
attention are shared by all heads of the layer, so every head keeps the same dims. Units are removed in descending order
of

    z = ∂L/∂m, standardised over all masks of its type (attention or FFN)

z is signed: if it is positive, L falls when the mask falls. Both types are in one ranking, by z itself and not by z per
MAC, and units are removed until their real costs add up to what is over the budget. L is the mean cross-entropy with
the task's labels or the dense model's predictions.

`upop-oneshot` does this once, with the gradients of the whole metric set at masks of 1. `upop` adds the progressive
search over T steps of training. With p the share of the units' cost to remove in the end (in MACs, or in the quantity
of the budget's tightest limit),

    p_t = p · sqrt((1 − cos(πt/T)) / 2)

Every T/20 steps the units of largest z, up to a cost of p_t, are selected anew. As in the public code, the masks'
gradients accumulate from the first step. (If they were cleared at each selection, the gradient of a fading unit would
change sign and the unit would come back; hardly any unit would be selected twice.) Masks of selected units fall to
1 − p_t/p and all others return to 1, while the weights keep training. In the end the masks of the selected units are 0,
and these units are removed.

This differs from the publication: T is 100 steps on the metric set instead of 60 epochs of ImageNet, without
augmentation or distillation, at a constant learning rate. Costs are MACs of this backbone (the public code has a
constant for DeiT). L1 regularisation of the masks is left out: its gradient is the same for all masks of a type, so z
does not depend on it. Widths are aligned afterwards (`tapfl.pruning.allocate`). Removal equals masking for activations
with f(0) = 0, such as GELU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.compute import home
from tapfl.models.forward import hooked
from tapfl.models.units import PrunableLayer
from tapfl.progress import track
from tapfl.pruning.criteria.criterion import Criterion, PruningTask, Scores, Selection, across_layers
from tapfl.pruning.criteria.gradients import labelled_batches, summed_loss, targets

STEPS = 100  # T; 100 to 300 is a short form of the method
SELECTIONS = 20  # number of selections over the search, as published
LEARNING_RATE = 1e-4  # of AdamW; the same as recovery's in our comparisons
WEIGHT_DECAY = 0.05  # as published
ROUNDING = 1e-6  # relative to the largest gradient; a smaller spread counts as 0

Masks = dict[str, Tensor]


def open_masks(layers: Sequence[PrunableLayer], like: Tensor) -> Masks:
    """Returns masks of 1, (units per head,) by layer name, shared by the heads; `like` sets dtype and device."""
    return {layer.name: like.new_ones(layer.units_per_head).requires_grad_() for layer in layers}


def masked(
    model: nn.Module, layers: Sequence[PrunableLayer], masks: Mapping[str, Tensor]
) -> AbstractContextManager[None]:
    """Multiplies the outputs of the branches' first linears (fc1; q, k and v) by their masks within the context."""

    def hook(layer: PrunableLayer) -> Callable[..., Tensor]:
        def multiply(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            mask = masks[layer.name]  # outputs are ordered by part (q, k, v), head and dim
            return output * mask.repeat(layer.parts * layer.heads)

        return multiply

    inner = ((layer, model.get_submodule(f"{layer.name}.{layer.inner}")) for layer in layers)
    return hooked(linear.register_forward_hook(hook(layer)) for layer, linear in inner)


def standardise(layers: Sequence[PrunableLayer], gradients: Mapping[str, Tensor]) -> Masks:
    """Returns z by layer name: mean 0 and standard deviation 1 over all masks of a type, or 0 if all are equal."""
    z: Masks = {}
    for kind in {layer.kind for layer in layers}:
        names = [layer.name for layer in layers if layer.kind == kind]
        values = torch.cat([gradients[name] for name in names]).double()
        mean, spread = values.mean(), values.std()
        scale = 1 / spread if spread > ROUNDING * values.abs().max() else 0.0
        for name in names:
            z[name] = (gradients[name].double() - mean) * scale
    return z


def worth(layers: Sequence[PrunableLayer], z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns -z as the score of every unit, (units,) by layer name, because the units of the largest z are removed."""
    return {layer.name: -z[layer.name].repeat(layer.heads) for layer in layers}


def first_gradients(task: PruningTask) -> Scores:
    """Returns -z of every unit, from the gradients of the whole metric set at masks of 1, (units,) by layer name."""
    masks = open_masks(task.layers, task.inputs)
    totals = {name: torch.zeros_like(mask).detach() for name, mask in masks.items()}
    for images, labels in labelled_batches(task):
        with torch.enable_grad(), masked(task.model, task.layers, masks):
            loss = summed_loss(task.model(images), labels) / len(task.inputs)
        for total, gradient in zip(totals.values(), torch.autograd.grad(loss, list(masks.values())), strict=True):
            total += gradient
    return worth(task.layers, standardise(task.layers, totals))


def unified(task: PruningTask, scores: Scores) -> Selection:
    """Returns the units that stay if those of lowest score over all layers are removed until the budget is met."""
    return across_layers(task, scores, per_cost=False, unit_shape="head-dims")


def search(task: PruningTask) -> Selection:
    """Returns the units that stay, with the trained backbone to cut in `model` and T in `steps`."""
    model = copy.deepcopy(task.model).eval().requires_grad_(True)
    labels = targets(task)
    masks = open_masks(task.layers, task.inputs)
    final = share_to_go(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    interval = max(1, STEPS // SELECTIONS)
    with torch.enable_grad(), masked(model, task.layers, masks):
        for step, chosen in enumerate(track(islice(_batches(task), STEPS), "search", STEPS), start=1):
            optimizer.zero_grad()  # the masks' gradients add up from the first step on
            F.cross_entropy(model(task.inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
            if step % interval == 0 or step == STEPS:
                gradients = {name: mask.grad for name, mask in masks.items() if mask.grad is not None}
                z = home(standardise(task.layers, gradients))
                now = schedule(step, STEPS, final)
                for name, values in faded(task, z, now, final).items():
                    masks[name].data.copy_(values)
    optimizer.zero_grad(set_to_none=True)
    return replace(unified(task, worth(task.layers, z)), model=model.requires_grad_(False), steps=STEPS)


def schedule(t: int, T: int, p: float) -> float:
    """Returns p_t: 0 at the start, p at t = T."""
    return p * math.sqrt((1 - math.cos(math.pi * t / T)) / 2)


def share_to_go(task: PruningTask) -> float:
    """Returns p, the share of the units' cost that exceeds the budget's tightest limit."""
    return 1 - float(task.costs.shares.min())


def faded(task: PruningTask, z: Mapping[str, Tensor], now: float, final: float) -> dict[str, Tensor]:
    """Returns the masks at p_t = `now`, p = `final`: 1 − p_t/p for the units of largest z up to a cost of p_t, else 1.

    A layer never loses all units: the mask of its unit of smallest z stays at 1, as in the public code.
    """
    limit = task.costs.tightest
    unit = [layer.heads * float(task.costs.slopes[layer.name][limit]) for layer in task.layers]
    values = {layer.name: torch.ones_like(z[layer.name]) for layer in task.layers}
    ranked = sorted(
        (-score, i, k) for i, layer in enumerate(task.layers) for k, score in enumerate(z[layer.name].tolist())
    )
    last = [int(z[layer.name].argmin()) for layer in task.layers]
    left = now * float(task.costs.prunable[limit]) * (1 + 1e-12)
    for _, i, k in ranked:
        if k == last[i]:
            continue
        if left < unit[i]:
            break
        left -= unit[i]
        values[task.layers[i].name][k] = 1 - now / final
    return values


def _batches(task: PruningTask) -> Iterator[Tensor]:
    """Yields positions of batches of the metric set without end; each epoch has a new order."""
    while True:
        yield from torch.randperm(len(task.inputs), generator=task.generator).split(task.batch)


_SOURCE = "signed gradients of masks, standardised by type, in one ranking (UPop, ICML 2023)"
upop_oneshot = Criterion(f"One shot: {_SOURCE}.", first_gradients, unified)
upop = Criterion(f"Progressive search while the weights train: {_SOURCE}.", search=search)
