"""Fisher sensitivity (ours): how much the prediction depends on the output of a branch, by row and by direction.

Let g = ∂L/∂y be the gradient of an image's cross-entropy with respect to the output y of a branch, for a label drawn
from the model's own prediction. Then E[g gᵀ] is the Fisher information of y: a change δ of the output changes the
prediction by about ½ E[(gᵀδ)²] nats. No labels are needed. Two quantities follow:

    rows      s = |g|², one number per row (a token of an image): the weight of the row in a regression
    metric    M = E[g gᵀ]: the weight of a direction of the output

The distribution of s is heavy-tailed, so the weights of the rows are ρ s/E[s] + (1 − ρ) with ρ = 0.7. Their mean is 1,
and every row counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.models.forward import hooked, require_finite
from tapfl.models.residual import real_tokens
from tapfl.models.units import PrunableLayer
from tapfl.progress import track

TRUST = 0.7  # ρ; 0 gives all rows equal weight


@dataclass(frozen=True)
class Sensitivity:
    """Fisher sensitivity of one branch on one set of images.

    Attributes:
        rows: weights of the rows, float32 (rows,) per batch, in the order of the rows at the branch's output linear;
            their mean over rows that are not padding is 1.
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
        batch: images per pass; `Sensitivity.rows` has one entry per batch.
        generator: draws the labels.

    Raises:
        ModelError: if a prediction is not finite.
    """
    squares: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    products: dict[str, Tensor] = {}
    for images in track(inputs.split(batch), "sensitivity"):
        for name, gradient in _output_gradients(model, layers, images, generator).items():
            g = gradient.flatten(0, -2).double()  # in float32, squared gradients of a confident model underflow to 0
            squares[name].append(g.square().sum(1))
            products[name] = products.get(name, 0) + g.T @ g
    result = {}
    for layer in layers:
        name, real = layer.name, real_tokens(model, layer)
        parts = squares[name]
        count = sum(len(part) for part in parts)
        if real is not None:  # gradients at the padding are 0
            count = count * int(real.sum()) // len(real)
        mean = sum(torch.stack([part.sum() for part in parts]).tolist()) / count
        rows = tuple(
            (TRUST * part / mean + (1 - TRUST) if mean > 0 else torch.ones_like(part)).float() for part in parts
        )
        result[name] = Sensitivity(rows, products[name] / count)
    return result


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
        require_finite(logits, "sensitivity")
        P = logits.detach().softmax(-1).cpu()  # drawing on the CPU gives the same labels on any device
        labels = torch.multinomial(P, 1, generator=generator)[:, 0].to(logits.device)
        loss = F.cross_entropy(logits, labels, reduction="sum")
    return dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
