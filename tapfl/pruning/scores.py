"""Composite neuron importance (TAP-ViTs, arXiv 2601.02437), the exact vectorised form.

For a channel c of a layer with activations X (images B, tokens N, channels C), X_c ∈ R^{B×N}, P = softmax(logits):

    K(Z)_ij = (1/5) Σ_{σ∈{1,2,4,8,16}} exp(-|z_i - z_j|² / 2σ²),   H = I - 11ᵀ/B
    rel_c = tr(H K(X_c) H · H P Pᵀ H)                     relevance to the prediction
    red_c = tr(H K(X_c) H · H K(m) H)                     redundancy with the layer's mean over channels m (FFN), or
            the mean over the other heads g of the same with head g's mean m_g (attention)
    act_c = Σ_{b,n} |X_bnc|                               activeness

Since tr(HKH·HRH) = Σ_ij K_ij (HRH)_ij, only the references R are centred, and all channels against all references are
one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapfl.errors import ModelError
from tapfl.models.units import PrunableLayer

# (rel, 1 - red, act); constants of the authors' public code, which the paper follows
TERM_WEIGHTS = {"ffn": (0.1, 0.1, 0.8), "attention": (0.8, 0.1, 0.1)}
CHANNELS_AT_ONCE = 64


@dataclass(frozen=True)
class Terms:
    """The three terms of a layer in one batch, float32 (units,) each, as defined above."""

    rel: Tensor
    red: Tensor
    act: Tensor


def gaussian_kernel(Z: Tensor) -> Tensor:
    """Returns K(Z), (..., B, B), of rows (..., B, N): the mean of five Gaussian kernels, σ = 1, 2, 4, 8, 16.

    One exponential: with e_σ = exp(-d²/2σ²), halving σ is a fourth power. fp32 throughout, because the distances
    cancel in less; rows are centred first, which leaves distances as they are and the cancellation small.
    """
    Z = Z - Z.mean(dim=-2, keepdim=True)
    gram = Z @ Z.transpose(-1, -2)
    norms = gram.diagonal(dim1=-2, dim2=-1)
    distances = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * gram).clamp_(min=0)
    power = distances.mul_(-1 / 512).exp_()
    kernel = power.clone()
    for _ in range(4):
        power = power.square_().square_()
        kernel += power
    return kernel.div_(5)


def centre(R: Tensor) -> Tensor:
    """Returns H R H for symmetric (..., B, B)."""
    return R - R.mean(-1, keepdim=True) - R.mean(-2, keepdim=True) + R.mean((-1, -2), keepdim=True)


def terms(X: Tensor, P: Tensor, heads: int, chunk: int = CHANNELS_AT_ONCE) -> Terms:
    """Returns relevance, redundancy and activeness of every unit of a layer.

    Args:
        X: activations (B, N, C).
        P: class probabilities (B, classes).
        heads: 0 for an FFN (one reference for all channels), else the heads of an attention; channels are head-major.
            With one head there is no other head, and redundancy is 0.
        chunk: channels whose kernels are in memory at once, B² floats each.
    """
    B, _, C = X.shape
    groups = max(heads, 1)
    means = X.reshape(B, -1, groups, C // groups).mean(-1).permute(2, 0, 1)
    references = centre(torch.cat([(P @ P.T)[None], gaussian_kernel(means)])).reshape(1 + groups, B * B)
    channels = X.permute(2, 0, 1)
    traces = torch.cat(
        [gaussian_kernel(part).reshape(len(part), B * B) @ references.T for part in channels.split(chunk)]
    )
    rel, against = traces[:, 0], traces[:, 1:]
    if heads:
        own = against.gather(1, torch.arange(C).div(C // heads, rounding_mode="floor")[:, None]).squeeze(1)
        red = (against.sum(1) - own) / (heads - 1) if heads > 1 else torch.zeros(C)
    else:
        red = against[:, 0]
    return Terms(rel, red, X.abs().sum((0, 1)))


def composite(parts: Terms, weights: tuple[float, float, float]) -> Tensor:
    """Returns s_c = w_rel rel + w_red (1 - red) + w_act act, each term scaled to [0, 1] over the channels."""
    w_rel, w_red, w_act = weights
    return w_rel * _unit_range(parts.rel) + w_red * (1 - _unit_range(parts.red)) + w_act * _unit_range(parts.act)


def record_activations(
    model: nn.Module, layers: Sequence[PrunableLayer], batch: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the logits of a batch and, by layer name, the activations (images, tokens, units) of its units.

    Raises:
        ModelError: naming the layer whose activations are not finite.
    """
    seen: dict[str, Tensor] = {}

    def keep(layer: PrunableLayer) -> Callable[..., None]:
        return lambda _module, inputs: seen.__setitem__(layer.name, layer.activations(inputs[0], len(batch)))

    handles = [
        model.get_submodule(f"{layer.name}.{layer.output}").register_forward_pre_hook(keep(layer)) for layer in layers
    ]
    try:
        with torch.no_grad():
            logits = model(batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, activations in seen.items():
        if not torch.isfinite(activations).all():
            raise ModelError(f"{name}: activations are not finite")
    return logits, seen


@torch.no_grad()
def neuron_importance(
    model: nn.Module, layers: Sequence[PrunableLayer], inputs: Tensor, batch: int
) -> dict[str, Tensor]:
    """Returns the composite importance (units,) of every layer, summed over batches; no labels are used.

    Args:
        inputs: the metric set in the backbone's input format; a last incomplete batch is left out.
        batch: images a batch; the kernels are B×B.

    Raises:
        ModelError: if there is no whole batch, or activations are not finite.
    """
    if len(inputs) < batch:
        raise ModelError(f"metric set of {len(inputs)} images is smaller than one batch of {batch}")
    importance = {layer.name: torch.zeros(layer.units) for layer in layers}
    for start in range(0, len(inputs) - batch + 1, batch):
        logits, activations = record_activations(model, layers, inputs[start : start + batch])
        P = logits.softmax(-1)
        for layer in layers:
            parts = terms(activations.pop(layer.name), P, layer.heads if layer.kind == "attention" else 0)
            importance[layer.name] += composite(parts, TERM_WEIGHTS[layer.kind])
    return importance


def _unit_range(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)
