"""Closed-form compensation (ours): the units that stay take over what they can of the signal of those that go.

Kept units R, pruned units S, with mean μ and covariance C of their activations on the metric set, W2 and b2 the linear
that reads them:

    A = C_SR (C_RR + λI)⁻¹,   W2_R += W2_S A,   b2 += W2_S (μ_S - A μ_R),   λ = 1e-3 of the mean diagonal of C_RR

This is the ridge regression, on the kept activations, of the output that is lost, r = W2_S x_S. It is computed in that
form, because r may then be any lost output: a shrunk attention also answers with other values in the dims that it kept
(its logits lack dims), and behind a shrunk prefix all inputs are others. No labels, no gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from tapfl.errors import ConfigError, ModelError
from tapfl.models.forward import segments
from tapfl.models.residual import as_branch_output, observe
from tapfl.models.units import PrunableLayer, put
from tapfl.progress import track
from tapfl.pruning.lost_output import RIDGE, Felt, Known, LostOutput, rows_of
from tapfl.pruning.scores import refuse_not_finite

COMPENSATIONS = ("none", "one-pass", "sequential")
CORRECTION = 0.25  # γ, share of the drift of the residual stream that a branch is asked to take back


@torch.no_grad()
def compensate(
    model: nn.Module,
    plan_kept: Mapping[str, Tensor],
    layers: Sequence[PrunableLayer],
    inputs: Tensor,
    batch: int,
    ridge: float = RIDGE,
    felt: Felt = None,
    known: Known = None,
) -> nn.Module:
    """Returns `model` shrunk to `plan_kept` and compensated, from the statistics of one pass of the dense model.

    Every shrunk branch answers to the dense model's own input of it: z are its units and r = f(x) - f'(x), which for an
    FFN is W2_S x_S, and for an attention also what its other logits change. Where a branch has no units left,
    b2 += W2 μ. An output linear without bias is fitted without intercept.

    Args:
        model: the dense backbone in evaluation mode; it is left as it is.
        plan_kept: the units that stay (sorted, int64) by layer name; layers that it does not name stay whole.
        layers: the prunable layers of `model`.
        inputs: the metric set in the backbone's input format (n, channels, height, width), n >= 1.
        batch: images a pass.
        ridge: λ as a share of the mean variance of a layer's kept activations, >= 0.
        felt: sensitivities on `inputs` by layer name: rows count by how much the prediction feels them; None: alike.
        known: `unit_moments` of the same model, images and `felt`; these FFNs are not looked at again.

    Raises:
        ModelError: if there is no image, or a layer's activations are not finite, naming layer and batch.
        PlanError: if `plan_kept` does not fit the layers.
    """
    _refuse_none(inputs)
    small = copy.deepcopy(model)
    pruned = _pruned(layers, plan_kept)
    lost: dict[str, LostOutput] = {}
    handles = []
    for layer in pruned:
        branch: Any = model.get_submodule(layer.name)
        read = branch.get_submodule(layer.output)
        shrunk = layer.shrink(branch, plan_kept[layer.name])
        put(small, layer.name, shrunk)
        if known and layer.name in known:
            lost[layer.name] = known[layer.name].of_cut(plan_kept[layer.name], read.weight)
            continue
        found = LostOutput(
            len(plan_kept[layer.name]), read.out_features, real_tokens(model, layer), rows_of(felt, layer)
        )
        lost[layer.name] = found
        handles.append(branch.register_forward_hook(_compare(shrunk, layer.output, found), with_kwargs=True))
    try:
        for number, part in enumerate(track(inputs.split(batch) if handles else (), "compensation")):
            model(part)
            for name, found in lost.items():
                refuse_not_finite(name, found.total, number)
    finally:
        for handle in handles:
            handle.remove()
    for layer in pruned:
        _absorb(small, layer, lost[layer.name], ridge)
    return small.eval()


@torch.no_grad()
def compensate_sequentially(
    model: nn.Module,
    plan_kept: Mapping[str, Tensor],
    layers: Sequence[PrunableLayer],
    inputs: Tensor,
    batch: int,
    ridge: float = RIDGE,
    correction: float = CORRECTION,
    felt: Felt = None,
) -> nn.Module:
    """Returns `model` shrunk and compensated layer by layer, each with the statistics of the already shrunk prefix.

    With x the residual stream of the dense model at a branch f, x' that of the shrunk prefix and f' the shrunk branch:

        r = f(x') - f'(x') + γ [(x + f(x)) - (x' + f(x'))]

    what the branch itself lost, plus a share of what the stream has drifted. Both ends are worse on held-out images
    (DeiT-Tiny, half the MACs; KL to the dense model for γ = 0, 1/4, 1/2, 1 of tap: 1.53, 1.13, 1.14, 1.50; of low-rank
    heads: 0.82, 0.66, 0.65, 0.73; in one pass: 1.78, 0.79): without the drift, the shrinkage of one regression is
    handed on to the next; all of it is more than the branch's units can know. To aim at f(x) alone is worse still
    (2.31, 1.34), because it leaves x - x' in the stream and answers a question that the branch was not asked.

    Arguments and errors are those of `compensate`; `correction` is γ in [0, 1].
    """
    _refuse_none(inputs)
    small = copy.deepcopy(model)
    pruned = _pruned(layers, plan_kept)
    dense_x = small_x = list(inputs.split(batch))
    steps = list(zip(segments(model)[:-1], segments(small)[:-1], strict=True))
    for (block, dense_step), (_, small_step) in track(steps, "compensation"):
        for layer in (layer for layer in pruned if layer.block == block):
            f = model.get_submodule(layer.name)
            put(small, layer.name, layer.shrink(small.get_submodule(layer.name), plan_kept[layer.name]))
            size = len(plan_kept[layer.name])
            lost = LostOutput(size, layer.embed_dim, real_tokens(model, layer), rows_of(felt, layer))
            for number, (x, y) in enumerate(zip(dense_x, small_x, strict=True)):
                dense, now = observe(model, layer, dense_step, x), observe(small, layer, small_step, y)
                args, kwargs = now.arguments
                own: Tensor = f(*args, **kwargs)
                drift = as_branch_output(small, layer, dense.stream - now.stream) + dense.output - own
                lost.add(now.units, own - now.output + correction * drift)
                refuse_not_finite(layer.name, lost.total, number)
            _absorb(small, layer, lost, ridge)
        dense_x, small_x = [dense_step(x) for x in dense_x], [small_step(x) for x in small_x]
    return small.eval()


def compensated(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    layers: Sequence[PrunableLayer],
    inputs: Tensor,
    batch: int,
    how: str,
    felt: Felt = None,
    known: Known = None,
) -> nn.Module:
    """Returns `model` shrunk to `kept` and compensated as `how` says: ``none``, ``one-pass`` or ``sequential``.

    Args: as `compensate`; `known` is of use for ``one-pass`` alone, since another prefix gives other activations.

    Raises:
        ConfigError: if `how` is none of these.
    """
    if how == "none":
        small = copy.deepcopy(model)
        for layer in _pruned(layers, kept):
            put(small, layer.name, layer.shrink(small.get_submodule(layer.name), kept[layer.name]))
        return small.eval()
    if how not in COMPENSATIONS:
        raise ConfigError(f"compensation = {how!r}: accepted are {', '.join(COMPENSATIONS)}")
    if how == "one-pass":
        return compensate(model, kept, layers, inputs, batch, felt=felt, known=known)
    return compensate_sequentially(model, kept, layers, inputs, batch, felt=felt)


def real_tokens(model: nn.Module, layer: PrunableLayer) -> Tensor | None:
    """Returns which tokens of an image are not padding (bool, in the order in which the branch sees them); None: all.

    Where windows overhang the grid, a Swin attention fills them up; its block drops what it answers there.
    """
    block: Any = model.get_submodule(layer.block)
    if layer.kind != "attention" or not isinstance(block, SwinTransformerBlock):
        return None
    ones = torch.ones(1, *block.input_resolution, layer.embed_dim)
    return as_branch_output(model, layer, ones)[..., 0].flatten() > 0


def _pruned(layers: Sequence[PrunableLayer], kept: Mapping[str, Tensor]) -> list[PrunableLayer]:
    return [layer for layer in layers if layer.name in kept and len(kept[layer.name]) < layer.units]


def _compare(shrunk: nn.Module, output: str, lost: LostOutput) -> Callable[..., None]:
    """A hook on a dense branch: the shrunk one answers as well, and what it lacks is added."""
    linear: Any = shrunk.get_submodule(output)

    def add(_branch: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dense: Tensor) -> None:
        seen = [dense[..., :0]]  # a branch without units has none to show
        handle = linear.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        now: Tensor = shrunk(*args, **kwargs)
        handle.remove()
        lost.add(seen[-1], dense - now)

    return add


def _absorb(small: nn.Module, layer: PrunableLayer, lost: LostOutput, ridge: float) -> None:
    """Adds to the output linear of a shrunk branch what its units know of the output that was lost."""
    linear: Any = small.get_submodule(f"{layer.name}.{layer.output}")
    D, e = lost.regression(ridge, intercept=linear.bias is not None)
    if lost.kept:
        linear.weight += D.to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias += e.to(linear.bias.dtype)


def _refuse_none(inputs: Tensor) -> None:
    if not len(inputs):
        raise ModelError("compensation needs at least one image")
