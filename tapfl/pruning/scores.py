"""Composite neuron importance (TAP-ViTs, arXiv 2601.02437), exact and vectorised.

For a channel c of a layer with activations X (images B, tokens N, channels C), X_c ∈ R^{B×N}, P = softmax(logits):

    K(Z)_ij = (1/5) Σ_{σ∈{1,2,4,8,16}} exp(-|z_i - z_j|² / 2σ²),   H = I - 11ᵀ/B
    rel_c = tr(H K(X_c) H · H P Pᵀ H)                     relevance to the prediction
    red_c = tr(H K(X_c) H · H K(m) H)                     redundancy; m is the layer's mean over channels (FFN). In an
            attention, it is the mean of this trace over the other heads g, with their means m_g in place of m
    act_c = Σ_{b,n} |X_bnc|                               activeness

Since tr(HKH·HRH) = Σ_ij K_ij (HRH)_ij, only the references R need to be centred, and one matrix product compares all
channels with all references. A constant added to K does not change the result, so K - 1 is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapfl.compute import HERE, OF_CPU, AtOnce, Compute
from tapfl.errors import ModelError
from tapfl.models.forward import full, hooked
from tapfl.models.residual import real_tokens
from tapfl.models.units import PrunableLayer
from tapfl.progress import track

# (rel, 1 - red, act); constants of the authors' public code, which the paper follows
TERM_WEIGHTS = {"ffn": (0.1, 0.1, 0.8), "attention": (0.8, 0.1, 0.1)}
ROUNDING = 1e-5  # relative; float32 passes of the same image in other batches differ by about a tenth of that


@dataclass(frozen=True)
class Terms:
    """The three terms of a layer in one batch, as defined above, each float32 (units,)."""

    rel: Tensor
    red: Tensor
    act: Tensor


def exponents(Z: Tensor, strips: Sequence[slice]) -> Iterator[Tensor]:
    """Yields -|z_i - z_j|² / 512 for Z (C, B, N), one strip of rows i after the other, (C, rows, B - start).

    In a strip that begins at row `start`, j runs from `start` to B - 1. Values are exactly 0 for i = j; others may be
    slightly above 0 by rounding.

    Z should be centred over its images. That leaves the distances unchanged and reduces cancellation.
    """
    half = torch.linalg.vector_norm(Z, dim=-1).square() / 512
    for rows in strips:
        sums = half[:, rows, None] + half[:, None, rows.start :]
        sums.baddbmm_(Z[:, rows], Z[:, rows.start :].transpose(1, 2), beta=-1, alpha=2 / 512)
        sums.diagonal(dim1=1, dim2=2).zero_()  # cancellation would leave up to 1e-7 |z_i|²
        yield sums


def five_kernels(exponents: Tensor) -> Tensor:
    """Returns Σ_σ (exp(-d²/2σ²) - 1) over σ = 1, 2, 4, 8, 16, given x = -d²/512. Overwrites its argument.

    It works with u = exp(x) - 1. Centring removes the 1 anyway, and where activations hardly differ, adding the 1 would
    cost their digits. Halving σ raises exp(x) to the fourth power, which is two squarings (1 + u)² - 1 = u² + 2u. With
    b = u / 2^k in place of u = exp(2^k x) - 1, a squaring is one operation: b + 2^(k-1) b². The first b, for k = -6, is
    three terms of the series, so only products are evaluated. The result is accurate to 1e-6, the limit of float32.
    """
    x = exponents.clamp_(-20, 0)  # exp(-20) is 0 at this accuracy, and the series is accurate down to there
    other = torch.add(x.new_ones(()), x, alpha=1 / 192).mul_(x)
    scaled = torch.addcmul(x, x, other, value=1 / 128)  # x + x²/(2·64) + x³/(6·64²)
    total = x
    for k in range(-6, 8):
        if k == 0:
            total.copy_(scaled)
        torch.addcmul(scaled, scaled, scaled, value=2.0 ** (k - 1), out=other)
        scaled, other = other, scaled
        if k in (1, 3, 5, 7):
            total.add_(scaled, alpha=2.0 ** (k + 1))
    return total


def centre_images(Z: Tensor) -> tuple[Tensor, Tensor]:
    """Subtracts from Z (C, B, N), in place, its mean over the B images.

    Returns:
        Z, and a mask of the channels that do not vary beyond rounding, bool (C,).
    """
    mean = Z.mean(1, keepdim=True)
    Z -= mean
    size, limit = (torch.linalg.vector_norm(part, dim=(1, 2)) for part in (Z, mean))
    return Z, size <= ROUNDING * math.sqrt(Z.shape[1]) * limit


def centre(R: Tensor) -> Tensor:
    """Returns H R H for symmetric (..., B, B)."""
    return R - R.mean(-1, keepdim=True) - R.mean(-2, keepdim=True) + R.mean((-1, -2), keepdim=True)


def terms(X: Tensor, P: Tensor, heads: int, at_once: AtOnce = OF_CPU) -> Terms:
    """Returns relevance, redundancy and activeness of every unit of a layer.

    Args:
        X: activations (B, N, C).
        P: class probabilities (B, classes).
        heads: 0 for an FFN (one reference for all channels), otherwise the number of heads of an attention, whose
            channels are head-major. With a single head, redundancy is 0.
        at_once: how many channels, and rows of their kernels, are in memory at once (see `scratch_bytes`). It affects
            only rounding.
    """
    B, N, C = X.shape
    groups = max(heads, 1)
    means, still = centre_images(X.reshape(B, N, groups, C // groups).mean(-1).permute(2, 0, 1))
    kernels = five_kernels(next(exponents(means, [slice(0, B)]))).masked_fill_(still[:, None, None], 0) / 5
    (deviation,), still = centre_images(P[None].clone())  # HP; its Gram matrix is H P Pᵀ H
    deviation = deviation.masked_fill_(still, 0)
    references = torch.cat([(deviation @ deviation.T)[None], centre(kernels)]) / 5
    # K and R are symmetric: strips of rows from the diagonal onwards are enough if the part to the right of a strip's
    # diagonal square counts twice
    strips = [slice(start, min(start + at_once.strip, B)) for start in range(0, B, at_once.strip)]
    weights = [_strip(references, rows) for rows in strips]
    traces, activeness = [], []
    channel_major = X.new_empty(min(at_once.channels, C), B * N)
    for part in X.reshape(B * N, C).split(at_once.channels, dim=1):
        Z = channel_major[: part.shape[1]]
        Z.copy_(part.contiguous().T)  # torch transposes a contiguous matrix faster
        activeness.append(Z.abs().sum(1))
        Z, still = centre_images(Z.view(-1, B, N))
        against = X.new_zeros(1 + groups, len(Z))
        for weight, strip in zip(weights, exponents(Z, strips), strict=True):
            against += weight @ five_kernels(strip).reshape(len(Z), -1).T
        traces.append(against.masked_fill_(still, 0))
    rel, *by_head = torch.cat(traces, dim=1)
    red = by_head[0]
    if heads:
        stacked = torch.stack(by_head)
        own = stacked.gather(0, torch.arange(C, device=X.device).div(C // heads, rounding_mode="floor")[None])[0]
        red = (stacked.sum(0) - own) / (heads - 1) if heads > 1 else torch.zeros_like(rel)
    return Terms(rel, red, torch.cat(activeness))


def scratch_bytes(batch: int, tokens: int, heads: int, at_once: AtOnce) -> int:
    """Returns the peak memory of the tensors in `terms`, in bytes, without its arguments.

    These are a chunk of channels and one copy of it, three strips of its kernels, and the references with their inputs.
    """
    groups = max(heads, 1)
    channels = at_once.channels * batch * (2 * tokens + 3 * at_once.strip)
    return 4 * (channels + 2 * groups * batch * tokens + 4 * (1 + groups) * batch * batch)


def _strip(references: Tensor, rows: slice) -> Tensor:
    """Returns `rows` of references (R, B, B) from the diagonal onwards, flattened to (R, rows · columns).

    The part to the right of the diagonal square is doubled.
    """
    strip = references[:, rows, rows.start :].clone()
    strip[:, :, rows.stop - rows.start :] *= 2
    return strip.reshape(len(references), -1)


def composite(parts: Terms, weights: tuple[float, float, float]) -> Tensor:
    """Returns s_c = w_rel rel + w_red (1 - red) + w_act act, each term scaled to [0, 1] over the channels.

    A term that is constant up to rounding scales to 0.
    """
    w_rel, w_red, w_act = weights
    return w_rel * _unit_range(parts.rel) + w_red * (1 - _unit_range(parts.red)) + w_act * _unit_range(parts.act)


def record_activations(
    model: nn.Module, layers: Sequence[PrunableLayer], batch: Tensor, number: int = 0, compute: Compute = HERE
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the logits of a batch and the activations of the units (images, tokens, units) by layer name.

    Tokens that only pad a Swin's windows are left out.

    Args:
        number: number of the batch, for the error message.
        compute: sets the precision of the forward pass.

    Raises:
        ModelError: if activations are not finite. It names the layer and the batch.
    """
    seen: dict[str, Tensor] = {}

    def keep(layer: PrunableLayer) -> Callable[..., None]:
        real = real_tokens(model, layer)

        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            X = full(layer.activations(inputs[0], len(batch)))
            seen[layer.name] = X if real is None else X[:, real]

        return hook

    hooks = (layer.output_of(model).register_forward_pre_hook(keep(layer)) for layer in layers)
    with hooked(hooks), torch.no_grad(), compute.forward():
        logits = full(model(batch))
    refuse_not_finite(seen, number)
    return logits, seen


def refuse_not_finite(values: Mapping[str, Tensor], number: int) -> None:
    """Raises ModelError if a value is not finite. It names the first such layer and the batch."""
    # a sum is finite only if all its terms are, so that one pass and one wait for the GPU suffice if all is well
    if not values or bool(torch.stack([tensor.sum() for tensor in values.values()]).isfinite().all()):
        return
    for name, tensor in values.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{name}: activations are not finite in batch {number} (counted from 0)")


@torch.no_grad()
def neuron_importance(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    inputs: Tensor,
    batch: int,
    weights: Mapping[str, tuple[float, float, float]] = TERM_WEIGHTS,
    compute: Compute = HERE,
) -> dict[str, Tensor]:
    """Returns the composite importance (units,) of every layer, summed over batches; no labels are used.

    Args:
        inputs: the metric set in the backbone's input format; an incomplete last batch is left out.
        batch: batch size B; the kernels are B×B.
        weights: weights of rel, 1 - red and act, by kind of layer.
        compute: sets the precision of the forward passes (not of the kernels) and how much is computed at once.

    Raises:
        ModelError: if activations are not finite.
    """
    importance = {layer.name: inputs.new_zeros(layer.units) for layer in layers}
    for number in track(range(len(inputs) // batch), "scores"):
        part = inputs[number * batch : (number + 1) * batch]
        logits, activations = record_activations(model, layers, part, number, compute)
        P = logits.softmax(-1)
        for layer in layers:
            heads = layer.heads if layer.kind == "attention" else 0
            parts = terms(activations.pop(layer.name), P, heads, compute.at_once)
            importance[layer.name] += composite(parts, weights[layer.kind])
    return importance


def _unit_range(values: Tensor) -> Tensor:
    """Returns (values - min) / (max - min); 0 if all are equal up to rounding, which would otherwise fill [0, 1]."""
    low, high = values.min(), values.max()
    constant = high - low <= ROUNDING * torch.maximum(low.abs(), high.abs())
    return torch.where(constant, 0.0, (values - low) / (high - low))
