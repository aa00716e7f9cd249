"""Criteria by the gradient of the loss with respect to a gate on each unit.

A gate is a factor of 1 on the activation of a unit, where it enters its branch's output linear
(`PrunableLayer.output`). Gates are inputs of the pass, not parameters, so the model stays frozen. With separate gates
for each image, one backward pass gives the gradient of every image, because images do not depend on each other.

    taylor   s = E_b |∂L_b/∂g|,   L_b the cross-entropy of image b      (Molchanov et al., ICLR 2017)
    fisher   s = E_b (∂L_b/∂g)²                                          (Theis et al., 2018; Kwon et al., NeurIPS 2022)

Taylor differs from the publication in two ways: tokens are summed before the absolute value is taken (a gate is one
number per image), and `taylor-global` ranks by score per cost where the publication subtracts a FLOPs regulariser.
Fisher differs from the publications in that no search rearranges the masks and units are not removed one by one.
Isomorphic pruning (Fang et al., ECCV 2024) ranks Taylor scores only among units of the same type, because scores of
different substructures have different distributions. Each type loses the same share. The types are attention dims and
FFN units of any size: the stages of a Swin are ranked together, as in the public code. The publication differs: it sums
weight times gradient over coupled weights and also prunes the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.models.forward import hooked
from tapfl.models.units import PrunableLayer
from tapfl.progress import track
from tapfl.pruning.criteria.criterion import Criterion, OverImages, PruningTask, Scores, Selection, across_layers
from tapfl.training import predict

Gates = dict[str, Tensor]


def targets(task: PruningTask) -> Tensor:
    """Returns the labels of the metric set, int64 (n,): the task's, or else the dense model's predictions."""
    return task.labels if task.labels is not None else predict(task.model, task.inputs, task.batch).argmax(1)


def labelled_batches(task: PruningTask) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields (images, labels) of the metric set, batch by batch; None stands for the dense model's predictions."""
    images = task.inputs.split(task.batch)
    labels = [None] * len(images) if task.labels is None else task.labels.split(task.batch)
    yield from track(list(zip(images, labels, strict=True)), "gradients")


def summed_loss(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Returns the cross-entropy of a batch, summed over its images.

    Args:
        logits: of the dense model with gates or masks of 1, which do not change them.
        labels: None stands for the dense model's predictions. They are taken from the logits, so that images pass once.
    """
    return F.cross_entropy(logits, logits.detach().argmax(1) if labels is None else labels, reduction="sum")


def open_gates(layers: Sequence[PrunableLayer], like: Tensor, images: int | None = None) -> Gates:
    """Returns gates of 1 by layer name, (units,) or, with separate gates per image, (images, units).

    Args:
        like: sets dtype and device.
    """
    shape = () if images is None else (images,)
    return {layer.name: like.new_ones(*shape, layer.units).requires_grad_() for layer in layers}


def gated(
    model: nn.Module, layers: Sequence[PrunableLayer], gates: Mapping[str, Tensor]
) -> AbstractContextManager[None]:
    """Multiplies the units' activations by their gates, (units,) or (images, units), while the context is active."""

    def hook(layer: PrunableLayer) -> Callable[..., tuple[Tensor]]:
        gate = gates[layer.name]

        def multiply(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            if gate.ndim == 1:
                return (inputs[0] * gate,)
            return ((layer.activations(inputs[0], len(gate)) * gate[:, None]).reshape(inputs[0].shape),)

        return multiply

    return hooked(layer.output_of(model).register_forward_pre_hook(hook(layer)) for layer in layers)


def image_gradients(task: PruningTask) -> Iterator[Gates]:
    """Yields the gate gradients of each image's own cross-entropy (images, units) by layer name, batch by batch."""
    for images, labels in labelled_batches(task):
        gates = open_gates(task.layers, images, len(images))
        with torch.enable_grad(), gated(task.model, task.layers, gates):
            loss = summed_loss(task.model(images), labels)
        yield dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))


def sizes(task: PruningTask, of: Callable[[Tensor], Tensor]) -> Iterator[Gates]:
    """Yields the function `of`, elementwise, of each image's gate gradients, float64 (images, units) by layer name."""
    for gradients in image_gradients(task):
        yield {name: of(gradient.double()) for name, gradient in gradients.items()}


def mean(task: PruningTask, sums: Mapping[str, Tensor]) -> Scores:
    return {name: values / len(task.inputs) for name, values in sums.items()}


taylor_scores = OverImages(partial(sizes, of=torch.abs), mean)  # E_b |∂L_b/∂g|
fisher_scores = OverImages(partial(sizes, of=torch.square), mean)  # E_b (∂L_b/∂g)²


def within_types(task: PruningTask, scores: Scores) -> Selection:
    """Returns the best units when each type (attention or FFN) is ranked together; types share the budget evenly."""
    return across_layers(task, scores, group_of=lambda layer: layer.kind, per_cost=False)


_TAYLOR = "First-order estimate of the change of an image's loss if a unit is removed (Molchanov et al., ICLR 2017)"
_FISHER = "Diagonal of the empirical Fisher information of gates on the units (Theis et al., 2018)"
taylor = Criterion(f"{_TAYLOR}; ranked within layers.", taylor_scores)
taylor_global = Criterion(f"{_TAYLOR}; ranked across layers by score per cost.", taylor_scores, across_layers)
fisher = Criterion(f"{_FISHER}; ranked within layers.", fisher_scores)
fisher_global = Criterion(f"{_FISHER}; ranked across layers by score per cost.", fisher_scores, across_layers)
isomorphic = Criterion(
    "Taylor scores ranked across layers among units of the same type only (Fang et al., ECCV 2024).",
    taylor_scores,
    within_types,
)
