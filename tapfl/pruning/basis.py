"""The canonical basis of attention heads (ours): the same function, with the dims of each head ordered by energy.

Attention does not change under a change of basis inside a head,

    W_q ← B_qᵀ W_q,  W_k ← B_kᵀ W_k,  B_q B_kᵀ = I        W_v ← E W_v,  W_o ← W_o E⁻¹        (biases alike)

so the basis can be chosen freely. We take the singular vectors of what the head computes on real inputs: of its
attention logits, and of what it adds to the residual stream. Dropping the last dims in both orders then gives the best
low-rank approximation of the head (Eckart-Young), where without it arbitrary axes would go. The basis is computed once,
on the public pool, for all devices. All devices then cut in the same basis, so the server can still aggregate adapters
index by index.

Two constants are removed first. The mean key over the tokens of a span adds the same number to every logit of a query,
which does not change the softmax. The mean μ of a head's output moves to the biases, b_v -= μ, b_o += W_o μ, so that no
dim is spent on it; this is exact because attention weights sum to 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tapfl.data.images import ImageSet
from tapfl.data.transform import Batches, Transform
from tapfl.errors import ModelError
from tapfl.models.forward import hooked
from tapfl.models.prunable import prunable_layers
from tapfl.models.residual import real_tokens
from tapfl.models.units import PrunableLayer
from tapfl.progress import track
from tapfl.pruning.scores import refuse_not_finite
from tapfl.seeds import numpy_generator

RESOLUTION = 1e-9  # relative to the mean square of a head's activations; less energy than that is rounding
LEAST = 1e-6  # relative to the largest singular value; smaller ones are not used to scale
POOL_IMAGES, BATCH = 1024, 64
MARK = "tapfl_canonical"  # an attribute of the model, which copy.deepcopy preserves


class HeadMoments:
    """Float64 second moments of one attention: of queries, of keys centred within their span, and of heads' outputs.

    Args:
        real: which tokens of an image are not padding, bool (tokens,); None for all. The block drops the outputs at the
            padding, so queries and outputs there do not count. Keys there count, because all tokens attend to them.
    """

    def __init__(self, heads: int, dims: int, real: Tensor | None = None, device: torch.device | None = None) -> None:
        self.real = real
        self.total = torch.zeros(heads, dims, dtype=torch.float64, device=device)
        self.query, self.key, self.output = (self.total.new_zeros(heads, dims, dims) for _ in range(3))
        self.tokens = self.keys = 0

    def add_qkv(self, qkv: Tensor) -> None:
        """Adds the output of the qkv linear (images or windows, tokens of a span, 3 units)."""
        heads, dims = self.total.shape
        q, k, _ = qkv.double().unflatten(-1, (3, heads, dims)).unbind(2)
        self.key += _products(k - k.mean(1, keepdim=True))
        self.keys += k.shape[0] * k.shape[1]
        q = self._real(q)
        self.query += _products(q)
        self.tokens += q.shape[0] * q.shape[1]

    def add_output(self, o: Tensor) -> None:
        """Adds the input of the output linear (images or windows, tokens of a span, units)."""
        o = self._real(o.double().unflatten(-1, self.total.shape))
        self.output += _products(o)
        self.total += o.sum((0, 1))

    def _real(self, x: Tensor) -> Tensor:
        """Returns x (spans, tokens, heads, dims) without padding; if there is any, with one span per image."""
        return x if self.real is None else x.reshape(-1, len(self.real), *self.total.shape)[:, self.real]


@torch.no_grad()
def canonical_basis(
    model: nn.Module, layers: Sequence[PrunableLayer], batches: Sequence[Tensor] | Batches
) -> nn.Module:
    """Returns a copy of `model` with its heads in the canonical basis. Its outputs stay the same (fp32, 1e-5).

    Args:
        model: the dense backbone in evaluation mode; it is not changed.
        layers: its prunable layers.
        batches: images in the backbone's input format (n, channels, height, width), n >= 1, one forward pass each; on
            any device. They are read one after the other.

    Raises:
        ModelError: if there is no image, or a layer's activations are not finite. It names the layer and the batch.
    """
    if not len(batches):
        raise ModelError("the canonical basis needs at least one image")
    turned = copy.deepcopy(model)
    attentions = [layer for layer in layers if layer.kind == "attention"]
    device = next(model.parameters()).device
    moments = {n.name: HeadMoments(n.heads, n.units_per_head, real_tokens(turned, n), device) for n in attentions}
    handles = []
    for layer in attentions:
        module: Any = turned.get_submodule(layer.name)
        own = moments[layer.name]
        handles.append(module.qkv.register_forward_hook(lambda _m, _x, y, own=own: own.add_qkv(y)))
        handles.append(module.proj.register_forward_pre_hook(lambda _m, x, own=own: own.add_output(x[0])))
    with hooked(handles):
        for number, part in enumerate(track(batches, "canonical basis")):
            turned(part.to(device))
            sums = {name: torch.stack([m.query.sum(), m.key.sum(), m.output.sum()]) for name, m in moments.items()}
            refuse_not_finite(sums, number)
    energy = {n.name: _turn(turned.get_submodule(n.name), moments[n.name]).flatten() for n in attentions}
    setattr(turned, MARK, energy)
    return turned


def in_basis(model: nn.Module, basis: str, turn: Callable[[], nn.Module]) -> nn.Module:
    """Returns the model to cut under ``pruning.basis = basis``.

    This is what `turn` returns if the basis is `canonical` and `model` is not in it yet, and otherwise `model`.
    """
    return turn() if basis == "canonical" and carried_energy(model) is None else model


def turned_on_pool(model: nn.Module, images: ImageSet, transform: Transform, seed: int) -> nn.Module:
    """Returns `model` in the canonical basis of the public pool: one basis for all devices of a federation.

    It is computed on at most POOL_IMAGES images, drawn uniformly with `seed`. Their tokens are enough to estimate the
    second moments of a head's dims.
    """
    drawn = numpy_generator(seed, "basis").permutation(len(images))[:POOL_IMAGES]
    return canonical_basis(model, prunable_layers(model), transform.batches(images.subset(drawn), BATCH))


def carried_energy(model: nn.Module) -> dict[str, Tensor] | None:
    """Returns the energy of every dim, float64 (units,) by attention name, or None if the basis is not canonical.

    The energy of a dim is its share of the energy of its head, Σσ² = 1, averaged over the head's logits and its output.
    It decreases within a head and can be compared between heads and layers.
    """
    marked: dict[str, Tensor] | None = getattr(model, MARK, None)
    return marked


def _turn(module: Any, moments: HeadMoments) -> Tensor:
    """Changes the basis of one attention in place. Returns the energy of each dim (heads, dims)."""
    heads, dims = moments.total.shape
    qkv, proj = module.qkv, module.proj
    W_q, W_k, W_v = qkv.weight.double().unflatten(0, (3, heads, dims))
    W_o = proj.weight.double().unflatten(1, (heads, dims)).transpose(0, 1)  # (heads, outputs, dims)
    foldable = qkv.bias is not None and proj.bias is not None
    mu = moments.total / moments.tokens if foldable else torch.zeros_like(moments.total)

    B_q, B_k, logits = ordering(moments.query / moments.tokens, moments.key / moments.keys)
    second = moments.output / moments.tokens
    # where a head's output hardly varies, its covariance is only rounding error, which need not be positive definite
    rounding = RESOLUTION * second.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    covariance = second - mu[..., :, None] * mu[..., None, :] + torch.diag_embed(rounding.expand(heads, dims))
    E_T, E_inverse, outputs = ordering(covariance, W_o.mT @ W_o)
    E = E_T.mT
    qkv.weight.copy_(torch.stack([B_q.mT @ W_q, B_k.mT @ W_k, E @ W_v]).flatten(0, 2))
    proj.weight.copy_((W_o @ E_inverse).transpose(0, 1).flatten(1))
    if qkv.bias is not None:
        b_q, b_k, b_v = qkv.bias.double().unflatten(0, (3, heads, dims))[..., None]
        qkv.bias.copy_(torch.stack([B_q.mT @ b_q, B_k.mT @ b_k, E @ (b_v - mu[..., None])]).flatten())
    if foldable:
        proj.bias += (W_o @ mu[..., None]).sum(0).flatten().to(proj.bias.dtype)
    return (_shares(logits) + _shares(outputs)) / 2


def ordering(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (B, B', σ) with B B'ᵀ = I that order the terms of x·y = Σ_c x_c y_c by their energy.

    Under x ← Bᵀx and y ← B'ᵀy the products x·y stay the same, and both second moments become diag(σ), σ descending. The
    sum over the first k dims is the best approximation of rank k of the products of all x with all y.

    Args:
        left, right: second moments (..., dims, dims) of x and of y.
    """
    L, R = _root(left), _root(right)
    U, sigma, _ = torch.linalg.svd(L.mT @ R)
    D = sigma.clamp(min=LEAST * sigma[..., :1]).sqrt()[..., None, :]
    return torch.linalg.solve_triangular(L.mT, U * D, upper=True), L @ (U / D), sigma


def _root(G: Tensor) -> Tensor:
    """Returns the lower triangular L with L Lᵀ = G, up to RESOLUTION; G may be singular."""
    size = G.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    least = torch.where(size > 0, RESOLUTION * size, 1.0)
    return torch.linalg.cholesky(G + torch.diag_embed(least.expand(G.shape[:-1])))


def _products(x: Tensor) -> Tensor:
    """Returns Σ x xᵀ over all tokens, by head (heads, dims, dims), for x (spans, tokens, heads, dims)."""
    by_head = x.flatten(0, 1).transpose(0, 1)
    return by_head.mT @ by_head


def _shares(sigma: Tensor) -> Tensor:
    return sigma.square() / sigma.square().sum(-1, keepdim=True)
