"""UPop's ranking (Shi et al., "UPop: unified and progressive pruning for compressing vision-language transformers",
ICML 2023) without its progressive search: unified, one shot. `tapfl.pruning.criteria.upop` is the whole method.

Masks m = 1 multiply the FFN's hidden units before the activation, and q, k and v; an attention's dims are *shared by
all heads of a layer*, so every head keeps the same dims. A unit goes the sooner, the larger

    z = standardised over all masks of its type (attention or FFN):  ∂L/∂m    signed: L falls when such a mask falls

in one ranking of both types, that is cut where the real costs of the units sum up to what has to go. `z` itself is
ranked, not z a MAC. L is the mean cross-entropy over the metric set, with the task's labels or the dense predictions.

Differs from the publication: the costs are MACs of this backbone (the public code has a constant for DeiT), L1
regularisation of the masks is left out (its gradient is the same for all masks of a type, and z does not see it), and
widths are aligned afterwards (`tapfl.pruning.allocate`). Exact for activations with f(0) = 0, such as GELU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.models.units import PrunableLayer
from tapfl.progress import track
from tapfl.pruning.criteria.gates import targets
from tapfl.pruning.criteria.ranking import across_layers
from tapfl.pruning.criteria.task import PruningTask, Ranked, Scores, Selection

Masks = dict[str, Tensor]


def first_gradients(task: PruningTask) -> Scores:
    """Returns -z of every unit by the gradients of the whole metric set at masks of 1, (units,) by layer name."""
    masks = open_masks(task.layers, task.inputs)
    totals = {name: torch.zeros_like(mask).detach() for name, mask in masks.items()}
    parts = list(zip(task.inputs.split(task.batch), targets(task).split(task.batch), strict=True))
    for images, labels in track(parts, "gradients"):
        with torch.enable_grad(), masked(task.model, task.layers, masks):
            loss = F.cross_entropy(task.model(images), labels, reduction="sum") / len(task.inputs)
        for total, gradient in zip(totals.values(), torch.autograd.grad(loss, list(masks.values())), strict=True):
            total += gradient
    return worth(task.layers, standardise(task.layers, totals))


def open_masks(layers: Sequence[PrunableLayer], like: Tensor) -> Masks:
    """Returns masks of 1, (units a head,) by layer name, of the dtype of `like`; an attention's heads share theirs."""
    return {layer.name: like.new_ones(layer.units_per_head).requires_grad_() for layer in layers}


@contextmanager
def masked(model: nn.Module, layers: Sequence[PrunableLayer], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiplies the outputs of the branches' first linears (fc1; q, k and v) by their masks."""

    def hook(layer: PrunableLayer) -> Callable[..., Tensor]:
        def multiply(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            return output * masks[layer.name].repeat(output.shape[-1] // layer.units_per_head)

        return multiply

    handles = []
    for layer in layers:
        for cut in layer.cuts(torch.arange(layer.units)):
            if cut.side == "rows":  # rows go part by part (q, k, v), head by head, dim by dim
                linear = model.get_submodule(f"{layer.name}.{cut.linear}")
                handles.append(linear.register_forward_hook(hook(layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def standardise(layers: Sequence[PrunableLayer], gradients: Mapping[str, Tensor]) -> Masks:
    """Returns z by layer name: mean 0 and standard deviation 1 over all masks of a type."""
    z: Masks = {}
    for kind in {layer.kind for layer in layers}:
        names = [layer.name for layer in layers if layer.kind == kind]
        values = torch.cat([gradients[name] for name in names]).double()
        spread = values.std()
        for name in names:
            z[name] = (gradients[name].double() - values.mean()) / (spread if spread > 0 else 1)
    return z


def worth(layers: Sequence[PrunableLayer], z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns -z of every unit (units,) by layer name: those of the largest z go."""
    return {layer.name: -z[layer.name].repeat(layer.heads) for layer in layers}


def unified(task: PruningTask, scores: Scores) -> Selection:
    """Returns what stays when units of all layers go by rising score until the rest is within the budget."""
    return across_layers(task, scores, per_cost=False, unit_shape="head-dims")


upop_oneshot = Ranked(first_gradients, unified)
