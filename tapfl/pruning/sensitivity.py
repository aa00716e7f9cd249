"""Fisher sensitivity (ours): how the prediction depends on what a branch writes, by row and by direction.

With g = ∂L/∂y the gradient of an image's cross-entropy at the output y of a branch, for a label drawn from the model's
own prediction, E[g gᵀ] is the Fisher information of y: a change δ of the output changes the prediction by about
½ E[(gᵀδ)²] nats. No labels are needed. Two quantities follow:

    rows      s = |g|², one number a row (a token of an image): the weight of the row in a regression
    metric    M = E[g gᵀ]: the weight of a direction of the output

Rows are heavy-tailed, so their weights are ρ s/E[s] + (1 − ρ), ρ = 0.7: mean 1, and every row counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.models.forward import hooked
from tapfl.models.units import PrunableLayer
from tapfl.progress import track

TRUST = 0.7  # ρ; 0: all rows alike


@dataclass(frozen=True)
class Sensitivity:
    """Fisher sensitivity of one branch on one set of images.

    Attributes:
        rows: weights by batch, float32 (rows,), in the order of the rows at the branch's output linear; mean 1.
        metric: M, float64 (outputs, outputs).
    """

    rows: tuple[Tensor, ...]
    metric: Tensor


Sensitivities = Mapping[str, Sensitivity]


def sensitivities(
    model: nn.Module, layers: Sequence[PrunableLayer], inputs: Tensor, batch: int, generator: torch.Generator
) -> dict[str, Sensitivity]:
    """Returns the sensitivity of every branch, by layer name.

    Args:
        model: the dense backbone, frozen and in evaluation mode.
        inputs: the metric set in the backbone's input format (n, channels, height, width).
        batch: images a pass; `Sensitivity.rows` has one entry a batch.
        generator: draws the labels.
    """
    squares: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    products: dict[str, Tensor] = {}
    for images in track(inputs.split(batch), "sensitivity"):
        for name, gradient in _output_gradients(model, layers, images, generator).items():
            g = gradient.flatten(0, -2).double()  # in float32 the squares of a sure model's gradients are 0
            squares[name].append(g.square().sum(1))
            products[name] = products.get(name, 0) + g.T @ g
    found = {}
    for name, parts in squares.items():
        count = sum(len(part) for part in parts)
        mean = sum(torch.stack([part.sum() for part in parts]).tolist()) / count
        rows = tuple(
            (TRUST * part / mean + (1 - TRUST) if mean > 0 else torch.ones_like(part)).float() for part in parts
        )
        found[name] = Sensitivity(rows, products[name] / count)
    return found


def _output_gradients(
    model: nn.Module, layers: Sequence[PrunableLayer], images: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name]

        return hook

    with (
        hooked(layer.output_of(model).register_forward_hook(keep(layer.name)) for layer in layers),
        torch.enable_grad(),
    ):
        logits = model(images)
        P = logits.detach().softmax(-1).cpu()  # the generator's device, so that labels are the same wherever this runs
        labels = torch.multinomial(P, 1, generator=generator)[:, 0].to(logits.device)
        loss = F.cross_entropy(logits, labels, reduction="sum")
    return dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
