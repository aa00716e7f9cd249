"""Gates: factors of 1 on the activations of units, whose gradients say what a unit is worth to the loss.

The gates sit where the units' activations enter their branch's output linear (`PrunableLayer.output`). They are inputs
of the pass, not parameters, so the frozen model stays frozen. A gate an image gives every image's own gradient in one
backward pass, because images do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.models.units import PrunableLayer
from tapfl.progress import track
from tapfl.pruning.criteria.task import PruningTask
from tapfl.training import predict

Gates = dict[str, Tensor]


def targets(task: PruningTask) -> Tensor:
    """Returns the labels of the metric set, int64 (n,): the task's, or else what the dense model predicts."""
    return task.labels if task.labels is not None else predict(task.model, task.inputs, task.batch).argmax(1)


def open_gates(layers: Sequence[PrunableLayer], like: Tensor, images: int | None = None) -> Gates:
    """Returns gates of 1 by layer name, (units,), or (images, units) for a gate an image; of the dtype of `like`."""
    shape = () if images is None else (images,)
    return {layer.name: like.new_ones(*shape, layer.units).requires_grad_() for layer in layers}


@contextmanager
def gated(model: nn.Module, layers: Sequence[PrunableLayer], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiplies the units' activations by their gates, (units,) or (images, units), for the duration of the block."""

    def hook(layer: PrunableLayer) -> Callable[..., tuple[Tensor]]:
        gate = gates[layer.name]

        def multiply(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            if gate.ndim == 1:
                return (inputs[0] * gate,)
            return ((layer.activations(inputs[0], len(gate)) * gate[:, None]).reshape(inputs[0].shape),)

        return multiply

    handles = [
        model.get_submodule(f"{layer.name}.{layer.output}").register_forward_pre_hook(hook(layer)) for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def image_gradients(task: PruningTask) -> Iterator[Gates]:
    """Yields, batch by batch, each image's own gradients (images, units) of its cross-entropy, by layer name."""
    parts = list(zip(task.inputs.split(task.batch), targets(task).split(task.batch), strict=True))
    for images, labels in track(parts, "gradients"):
        gates = open_gates(task.layers, images, len(images))
        with torch.enable_grad(), gated(task.model, task.layers, gates):
            loss = F.cross_entropy(task.model(images), labels, reduction="sum")
        yield dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))


def mean_over_images(task: PruningTask, of: Callable[[Tensor], Tensor]) -> Gates:
    """Returns the mean over the metric set of `of` (elementwise) of the images' gate gradients, (units,) by name."""
    totals = {layer.name: torch.zeros(layer.units, dtype=torch.float64) for layer in task.layers}
    for gradients in image_gradients(task):
        for name, gradient in gradients.items():
            totals[name] += of(gradient.double()).sum(0)
    return {name: total / len(task.inputs) for name, total in totals.items()}
