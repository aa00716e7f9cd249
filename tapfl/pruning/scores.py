"""Composite neuron importance (TAP-ViTs, arXiv 2601.02437), the exact vectorised form.

For a channel c of a layer with activations X (images B, tokens N, channels C), X_c ∈ R^{B×N}, P = softmax(logits):

    K(Z)_ij = (1/5) Σ_{σ∈{1,2,4,8,16}} exp(-|z_i - z_j|² / 2σ²),   H = I - 11ᵀ/B
    rel_c = tr(H K(X_c) H · H P Pᵀ H)                     relevance to the prediction
    red_c = tr(H K(X_c) H · H K(m) H)                     redundancy with the layer's mean over channels m (FFN), or
            the mean over the other heads g of the same with head g's mean m_g (attention)
    act_c = Σ_{b,n} |X_bnc|                               activeness

Since tr(HKH·HRH) = Σ_ij K_ij (HRH)_ij, only the references R are centred, and all channels against all references are
one matrix product. A constant added to K changes nothing, so K - 1 is computed.
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
from tapfl.models.units import PrunableLayer
from tapfl.progress import track

# (rel, 1 - red, act); constants of the authors' public code, which the paper follows
TERM_WEIGHTS = {"ffn": (0.1, 0.1, 0.8), "attention": (0.8, 0.1, 0.1)}
ROUNDING = 1e-5  # relative; passes of single images in float32 differ by about a tenth of that


@dataclass(frozen=True)
class Terms:
    """The three terms of a layer in one batch, float32 (units,) each, as defined above."""

    rel: Tensor
    red: Tensor
    act: Tensor


def exponents(Z: Tensor, strips: Sequence[slice]) -> Iterator[Tensor]:
    """Yields -|z_i - z_j|² / 512 by strips of rows i, (C, rows, B - start), for Z (C, B, N); j from the start on.

    It is exactly 0 for i = j, and may be a little more than 0 for the others.

    Z should be centred over its images: the distances stay as they are, and the cancellation in them is small.
    """
    half = torch.linalg.vector_norm(Z, dim=-1).square() / 512
    for rows in strips:
        sums = half[:, rows, None] + half[:, None, rows.start :]
        sums.baddbmm_(Z[:, rows], Z[:, rows.start :].transpose(1, 2), beta=-1, alpha=2 / 512)
        sums.diagonal(dim1=1, dim2=2).zero_()  # by cancellation it would be anything up to 1e-7 |z_i|²
        yield sums


def five_kernels(exponents: Tensor) -> Tensor:
    """Returns Σ_σ (exp(-d²/2σ²) - 1) over σ = 1, 2, 4, 8, 16, given x = -d²/512. Overwrites its argument.

    All in u = exp(x) - 1, because centring takes the 1 out anyway, and where activations hardly differ it would take
    their digits with it. Halving σ is a fourth power, two squarings (1 + u)² - 1 = u² + 2u, each of which is one
    operation if what is kept of exp(2^k x) - 1 is b = u / 2^k: then b + 2^(k-1) b². The first of them, k = -6, is three
    terms of the series, so there is nothing to evaluate but products: exact to 1e-6, which is what float32 leaves.
    """
    x = exponents.clamp_(-20, 0)  # exp(-20) is 0 to these digits, and the series is good so far
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
    """Returns Z (C, B, N), overwritten, less its mean over the B images; and where only rounding is left, bool (C,)."""
    mean = Z.mean(1, keepdim=True)
    Z -= mean
    size, limit = (torch.linalg.vector_norm(each, dim=(1, 2)) for each in (Z, mean))
    return Z, size <= ROUNDING * math.sqrt(Z.shape[1]) * limit


def centre(R: Tensor) -> Tensor:
    """Returns H R H for symmetric (..., B, B)."""
    return R - R.mean(-1, keepdim=True) - R.mean(-2, keepdim=True) + R.mean((-1, -2), keepdim=True)


def terms(X: Tensor, P: Tensor, heads: int, at_once: AtOnce = OF_CPU) -> Terms:
    """Returns relevance, redundancy and activeness of every unit of a layer.

    Args:
        X: activations (B, N, C).
        P: class probabilities (B, classes).
        heads: 0 for an FFN (one reference for all channels), else the heads of an attention; channels are head-major.
            With one head there is no other head, and redundancy is 0.
        at_once: channels and rows of their kernels in memory at once, in `scratch_bytes`; it changes rounding alone.
    """
    B, N, C = X.shape
    groups = max(heads, 1)
    means, still = centre_images(X.reshape(B, N, groups, C // groups).mean(-1).permute(2, 0, 1))
    kernels = five_kernels(next(exponents(means, [slice(0, B)]))).masked_fill_(still[:, None, None], 0) / 5
    (deviation,), still = centre_images(P[None].clone())  # HP; its Gram matrix is H P Pᵀ H
    deviation = deviation.masked_fill_(still, 0)
    references = torch.cat([(deviation @ deviation.T)[None], centre(kernels)]) / 5
    # K and R are symmetric: strips of rows from the diagonal on are enough, if what lies right of a strip's square
    # counts twice
    strips = [slice(start, min(start + at_once.strip, B)) for start in range(0, B, at_once.strip)]
    weights = [_strip(references, rows) for rows in strips]
    traces, activeness = [], []
    channel_major = X.new_empty(min(at_once.channels, C), B * N)
    for part in X.reshape(B * N, C).split(at_once.channels, dim=1):
        Z = channel_major[: part.shape[1]]
        Z.copy_(part.contiguous().T)  # contiguous first: torch is fast at the transposition of a whole matrix
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
    """Returns the memory that the tensors of `terms` take at most, besides its arguments.

    A chunk of channels and one copy of it, three strips of its kernels, and the references with what they are made of.
    """
    groups = max(heads, 1)
    channels = at_once.channels * batch * (2 * tokens + 3 * at_once.strip)
    return 4 * (channels + 2 * groups * batch * tokens + 4 * (1 + groups) * batch * batch)


def _strip(references: Tensor, rows: slice) -> Tensor:
    """Returns rows of (R, B, B) from their own diagonal on, flat, with what lies right of their square doubled."""
    strip = references[:, rows, rows.start :].clone()
    strip[:, :, rows.stop - rows.start :] *= 2
    return strip.reshape(len(references), -1)


def composite(parts: Terms, weights: tuple[float, float, float]) -> Tensor:
    """Returns s_c = w_rel rel + w_red (1 - red) + w_act act, each term scaled to [0, 1] over the channels.

    A term that is constant but for rounding scales to 0.
    """
    w_rel, w_red, w_act = weights
    return w_rel * _unit_range(parts.rel) + w_red * (1 - _unit_range(parts.red)) + w_act * _unit_range(parts.act)


def record_activations(
    model: nn.Module, layers: Sequence[PrunableLayer], batch: Tensor, number: int = 0, compute: Compute = HERE
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the logits of a batch and, by layer name, the activations (images, tokens, units) of its units.

    Args:
        number: of the batch, for the error.
        compute: how precisely.

    Raises:
        ModelError: naming the layer whose activations are not finite, and the batch.
    """
    seen: dict[str, Tensor] = {}

    def keep(layer: PrunableLayer) -> Callable[..., None]:
        return lambda _module, inputs: seen.__setitem__(layer.name, full(layer.activations(inputs[0], len(batch))))

    hooks = (layer.output_of(model).register_forward_pre_hook(keep(layer)) for layer in layers)
    with hooked(hooks), torch.no_grad(), compute.forward():
        logits = full(model(batch))
    refuse_not_finite(seen, number)
    return logits, seen


def refuse_not_finite(values: Mapping[str, Tensor], number: int) -> None:
    """Raises ModelError, naming the first such layer and the batch, unless all values are finite."""
    # one pass where all is well, since a sum is finite only if all its terms are; and a device is waited for once
    if not values or bool(torch.stack([each.sum() for each in values.values()]).isfinite().all()):
        return
    for name, each in values.items():
        if not each.isfinite().all():
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
        inputs: the metric set in the backbone's input format; a last incomplete batch is left out.
        batch: images a batch; the kernels are B×B.
        weights: of rel, 1 - red and act, by kind of layer.
        compute: how precise the passes are, not the kernels, and how much is computed together.

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
    """Returns (values - min) / (max - min); 0 where they are the same but for rounding, which would fill the range."""
    low, high = values.min(), values.max()
    constant = high - low <= ROUNDING * torch.maximum(low.abs(), high.abs())
    return torch.where(constant, 0.0, (values - low) / (high - low))
