"""Closed-form compensation (ours): the kept units take over what they can of the signal of the pruned ones.

Kept units R, pruned units S, with mean μ and covariance C of their activations on the metric set, W2 and b2 the linear
that reads them:

    A = C_SR (C_RR + λI)⁻¹,   W2_R += W2_S A,   b2 += W2_S (μ_S - A μ_R),   λ = 1e-3 of the mean diagonal of C_RR

This is the ridge regression, on the kept activations, of the output that is lost, r = W2_S x_S. It is computed in that
form, because r may then be any lost output: a shrunk attention also changes the values of the dims that it kept (its
logits lack dims), and behind a shrunk prefix all inputs change. No labels, no gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from tapfl.config import PruningOptions
from tapfl.errors import ModelError
from tapfl.models.forward import hooked, segments
from tapfl.models.merging import Schedule, group_means, group_sums, merging, passing
from tapfl.models.residual import as_branch_output, observe
from tapfl.models.units import PrunableLayer, put
from tapfl.progress import track
from tapfl.pruning.reconstruction import Call, reconstruct
from tapfl.pruning.scores import record_activations, refuse_not_finite
from tapfl.pruning.sensitivity import Sensitivities

CORRECTION = 0.25  # γ, share of the drift of the residual stream that a branch is asked to correct
RIDGE = 1e-3  # λ, of the mean variance of the kept activations
RESOLUTION = 1e-12  # of the mean square of the kept activations: less variance than that is rounding


@dataclass(frozen=True)
class Fit:
    """How what is kept is refitted.

    Attributes:
        ridge: λ as a share of the mean variance of a layer's kept activations, >= 0.
        correction: γ in [0, 1], for the sequential form.
        steps, learning_rate: of `reconstruct` after each layer's closed form, for the sequential form.
    """

    ridge: float = RIDGE
    correction: float = CORRECTION
    steps: int = 0
    learning_rate: float = 0.0


class LostOutput:
    """Float64 moments of a branch's kept activations Z (rows, kept) and of the output r (rows, outputs) it has lost.

    Args:
        real: bool (tokens,), which tokens of an image count, or None: all.
        weights: of the rows (rows,), batch by batch, or None: all alike.
        device: of Z and r.
    """

    def __init__(
        self,
        kept: int,
        outputs: int,
        real: Tensor | None = None,
        weights: Sequence[Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.kept, self.real = kept, real
        self.weights = None if weights is None else iter(weights)
        self.total = torch.zeros(kept + outputs, dtype=torch.float64, device=device)
        self.product, self.rows = self.total.new_zeros(kept, kept + outputs), self.total.new_zeros(())

    def add(self, Z: Tensor, r: Tensor, source: Tensor | None = None) -> Tensor:
        """Adds a batch; returns the weights of its rows, float32 (rows,), 0 for tokens that do not count.

        Merged tokens (`source` as in `Merged`) have the weight of all that they stand for.
        """
        both = torch.cat([part.flatten(0, -2).double() for part in (Z, r)], dim=1)
        rows = len(both) if source is None else source.numel()
        weights = both.new_ones(rows) if self.weights is None else next(self.weights)
        if source is not None:
            weights = group_sums(weights.view(*source.shape, 1), source, Z.shape[1]).flatten()
        given = weights.float()
        if self.real is not None:
            real = self.real.repeat(len(both) // len(self.real))
            both, weights, given = both[real], weights[real], given * real
        weighted = weights.double()[:, None] * both
        self.rows += weights.double().sum()
        self.total += weighted.sum(0)
        self.product += both[:, : self.kept].T @ weighted
        return given

    def of_cut(self, kept: Tensor, W: Tensor) -> LostOutput:
        """Returns the moments of the units at `kept` and of r = W_S x_S, the output of the other units S.

        `self` is of all units and of no output; W (outputs, units) is the linear that reads them.
        """
        gone = torch.ones(self.kept, dtype=torch.bool).index_fill(0, kept, False)
        W_S = W.double()[:, gone]
        found = LostOutput(len(kept), len(W), device=W.device)
        found.rows = self.rows
        found.total = torch.cat([self.total[kept], W_S @ self.total[gone]])
        product = self.product[kept]
        found.product = torch.cat([product[:, kept], product[:, gone] @ W_S.T], dim=1)
        return found

    def covariance(self) -> Tensor:
        """Returns the covariance of the kept activations, float64 (kept, kept), with RESOLUTION on its diagonal."""
        mean = self.total[: self.kept] / self.rows
        second = self.product[:, : self.kept] / self.rows
        rounding = RESOLUTION * second.diagonal().mean()
        return second - mean[:, None] * mean + torch.diag(rounding.expand(self.kept))

    def regression(self, ridge: float = RIDGE, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """Returns D (outputs, kept) and e (outputs) of the ridge regression r ≈ D z + e; e = 0 without intercept."""
        mean = self.total / self.rows if intercept else torch.zeros_like(self.total)
        second = self.product / self.rows
        C_ZZ, C_Zr = (second - mean[: self.kept, None] * mean).split([self.kept, len(mean) - self.kept], dim=1)
        size = second.diagonal().sum() / max(self.kept, 1)
        D = torch.zeros_like(C_Zr.T)
        if size > 0:
            penalty = ridge * C_ZZ.diagonal().mean() + RESOLUTION * size
            D = torch.linalg.solve(C_ZZ + torch.diag(penalty.expand(self.kept)), C_Zr).T
        return D, mean[self.kept :] - D @ mean[: self.kept]


Moments = Mapping[str, LostOutput]


@torch.no_grad()
def unit_moments(
    model: nn.Module, layers: Sequence[PrunableLayer], inputs: Tensor, batch: int, fisher: Sensitivities | None = None
) -> dict[str, LostOutput]:
    """Returns the moments of all units of every FFN, by layer name; one-pass compensation of any cut follows from them.

    The output that an FFN loses is linear in its units. That of an attention depends on how its logits change, so it
    has to be measured for every cut.
    """
    ffns = [layer for layer in layers if layer.kind == "ffn"]
    rows = {layer.name: fisher[layer.name].rows if fisher else None for layer in ffns}
    found = {n.name: LostOutput(n.units, 0, weights=rows[n.name], device=inputs.device) for n in ffns}
    for number, images in enumerate(inputs.split(batch)):
        for name, X in record_activations(model, ffns, images, number)[1].items():
            found[name].add(X, X[..., :0])
    return found


def compensated(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    layers: Sequence[PrunableLayer],
    inputs: Tensor,
    batch: int,
    options: PruningOptions,
    fisher: Sensitivities | None = None,
    moments: Moments | None = None,
    tokens: Schedule = (),
) -> nn.Module:
    """Returns `model` shrunk to `kept` and compensated as the options say, which are not `auto`.

    Args: as `compensate`; `moments` are of use for ``one-pass`` alone, since another prefix changes the activations.
        tokens: schedule by which the smaller model merges tokens. All statistics are then of merged tokens, but those
            that the last block drops are still there.
    """
    how = options.compensation
    if how == "none":
        small, pruned = _begin(model, kept, layers, inputs)
        for layer in pruned:
            put(small, layer.name, layer.shrink(small.get_submodule(layer.name), kept[layer.name]))
    elif how == "one-pass":
        small = compensate(model, kept, layers, inputs, batch, fisher=fisher, moments=moments, tokens=tokens)
    else:
        steps = options.compensation_steps if how == "reconstruction" else 0
        fit = Fit(steps=steps, learning_rate=options.compensation_learning_rate)
        small = compensate_sequentially(model, kept, layers, inputs, batch, fit, fisher, tokens)
    return merging(small, tokens).eval()


@torch.no_grad()
def compensate(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    layers: Sequence[PrunableLayer],
    inputs: Tensor,
    batch: int,
    fit: Fit = Fit(),
    fisher: Sensitivities | None = None,
    moments: Moments | None = None,
    tokens: Schedule = (),
) -> nn.Module:
    """Returns `model` shrunk to `kept` and compensated, with the statistics of one pass of the dense model.

    Every shrunk branch sees the dense model's own input: z are its units and r = f(x) - f'(x), which for an FFN is
    W2_S x_S, and for an attention includes the change of its logits. Where a branch has no units left, b2 += W2 μ. An
    output linear without bias is fitted without intercept.

    Args:
        model: the dense backbone in evaluation mode; it is not changed.
        kept: the units that stay (sorted, int64) by layer name; layers that it does not name stay whole.
        layers: the prunable layers of `model`.
        inputs: the metric set in the backbone's input format (n, channels, height, width), n >= 1.
        batch: images a pass.
        fit: how.
        fisher: sensitivities on `inputs` by layer name, as weights of the rows; None: all rows alike.
        moments: `unit_moments` of the same model, images and `fisher`; these FFNs are not measured again.
        tokens: schedule by which the dense model merges tokens in that pass; `fisher` is of that model then.

    Raises:
        ModelError: if there is no image, or a layer's activations are not finite, naming layer and batch.
        PlanError: if `kept` does not fit the layers.
    """
    model = passing(model, tokens)
    small, pruned = _begin(model, kept, layers, inputs)
    lost: dict[str, LostOutput] = {}
    handles = []
    for layer in pruned:
        shrunk = layer.shrink(model.get_submodule(layer.name), kept[layer.name])
        put(small, layer.name, shrunk)
        if moments and layer.name in moments:
            lost[layer.name] = moments[layer.name].of_cut(kept[layer.name], layer.output_of(model).weight)
            continue
        found = lost[layer.name] = _empty_moments(model, layer, kept, fisher)
        compare = _compare(shrunk, layer.output, found)
        handles.append(model.get_submodule(layer.name).register_forward_hook(compare, with_kwargs=True))
    with hooked(handles):
        for number, part in enumerate(track(inputs.split(batch) if handles else (), "compensation")):
            model(part)
            refuse_not_finite({name: found.total for name, found in lost.items()}, number)
    for layer in pruned:
        _absorb(small, layer, lost[layer.name], fit.ridge)
    return small.eval()


@torch.no_grad()
def compensate_sequentially(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    layers: Sequence[PrunableLayer],
    inputs: Tensor,
    batch: int,
    fit: Fit = Fit(),
    fisher: Sensitivities | None = None,
    tokens: Schedule = (),
) -> nn.Module:
    """Returns `model` shrunk and compensated layer by layer, each with the statistics of the already shrunk prefix.

    With x the residual stream of the dense model at a branch f, x' that of the shrunk prefix and f' the shrunk branch:

        r = f(x') - f'(x') + γ [(x + f(x)) - (x' + f(x'))]

    what the branch itself lost, plus a share of the drift of the stream. Both extremes are worse on held-out images
    (DeiT-Tiny, half the MACs; KL to the dense model for γ = 0, 1/4, 1/2, 1 of tap: 1.53, 1.13, 1.14, 1.50; of low-rank
    heads: 0.82, 0.66, 0.65, 0.73; in one pass: 1.78, 0.79): without the drift, the shrinkage of one regression passes
    on to the next; all of it is more than the branch's units can predict. The target f(x) alone is worse (2.31, 1.34).

    With merged tokens x' has fewer tokens than x. Each is compared with the mean of those of x and f(x) that became it,
    and weighs what they weigh together; f(x') attends to tokens by their sizes, as f'(x') does. `fisher` is of the
    dense model.

    With `fit.steps` all weights of the branch then take gradient steps towards the same output, f(x') + γ […].

    Arguments and errors are those of `compensate`, and those of `reconstruct`.
    """
    small, pruned = _begin(passing(model, tokens), kept, layers, inputs)
    images = dense_x = small_x = list(inputs.split(batch))
    steps = list(zip(segments(model)[:-1], segments(small)[:-1], strict=True))
    for (block, dense_step), (_, small_step) in track(steps, "compensation"):
        after: list[Tensor | None] = [None] * len(images)
        for layer in (layer for layer in pruned if layer.block == block):
            f = model.get_submodule(layer.name)
            put(small, layer.name, layer.shrink(small.get_submodule(layer.name), kept[layer.name]))
            lost, calls = _empty_moments(model, layer, kept, fisher), []
            for number, (x, y) in enumerate(zip(dense_x, small_x, strict=True)):
                dense, now = observe(model, layer, dense_step, x), observe(small, layer, small_step, y)
                after[number], (args, kwargs) = dense.after, now.arguments
                own: Tensor = f(*args, **kwargs)
                x_dense, f_dense = dense.stream, dense.output
                if now.source is not None:
                    x_dense, f_dense = (group_means(each, now.source, own.shape[1]) for each in (x_dense, f_dense))
                drift = as_branch_output(small, layer, x_dense - now.stream) + f_dense - own
                pull = fit.correction * drift
                weights = lost.add(now.units, own - now.output + pull, now.source)
                refuse_not_finite({layer.name: lost.total}, number)
                if fit.steps:
                    calls.append(Call(len(images[number]), now.arguments, own + pull, weights))
            _absorb(small, layer, lost, fit.ridge)
            if calls:
                reconstruct(small.get_submodule(layer.name), calls, fit.steps, fit.learning_rate)
        dense_x = [dense_step(x) if known is None else known for x, known in zip(dense_x, after, strict=True)]
        small_x = [small_step(x) for x in small_x]
    return small.eval()


def _real_tokens(model: nn.Module, layer: PrunableLayer) -> Tensor | None:
    """Returns which tokens of an image are not padding (bool, in the order in which the branch sees them); None: all.

    Where windows extend beyond the grid, a Swin attention pads them; its block drops the output there.
    """
    block: Any = model.get_submodule(layer.block)
    if layer.kind != "attention" or not isinstance(block, SwinTransformerBlock):
        return None
    ones = layer.output_of(model).weight.new_ones(1, *block.input_resolution, layer.embed_dim)
    return as_branch_output(model, layer, ones)[..., 0].flatten() > 0


def _begin(
    model: nn.Module, kept: Mapping[str, Tensor], layers: Sequence[PrunableLayer], inputs: Tensor
) -> tuple[nn.Module, list[PrunableLayer]]:
    """Returns a copy of the model in which the branches that lose units are the model's own, and their layers."""
    if not len(inputs):
        raise ModelError("compensation needs at least one image")
    pruned = [layer for layer in layers if layer.name in kept and len(kept[layer.name]) < layer.units]
    own = [model.get_submodule(layer.name) for layer in pruned]
    return copy.deepcopy(model, {id(branch): branch for branch in own}), pruned


def _empty_moments(
    model: nn.Module, layer: PrunableLayer, kept: Mapping[str, Tensor], fisher: Sensitivities | None
) -> LostOutput:
    weights = fisher[layer.name].rows if fisher else None
    device = layer.output_of(model).weight.device
    return LostOutput(len(kept[layer.name]), layer.embed_dim, _real_tokens(model, layer), weights, device)


def _compare(shrunk: nn.Module, output: str, lost: LostOutput) -> Callable[..., None]:
    """Returns a hook on a dense branch that also calls the shrunk one and adds the difference to the moments."""
    linear: Any = shrunk.get_submodule(output)

    def add(_branch: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dense: Tensor) -> None:
        seen = [dense[..., :0]]  # a branch without units never calls its output linear
        with hooked([linear.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))]):
            now: Tensor = shrunk(*args, **kwargs)
        lost.add(seen[-1], dense - now)

    return add


def _absorb(small: nn.Module, layer: PrunableLayer, lost: LostOutput, ridge: float) -> None:
    """Adds to the output linear of a shrunk branch the regression of the lost output."""
    linear: Any = small.get_submodule(f"{layer.name}.{layer.output}")
    D, e = lost.regression(ridge, intercept=linear.bias is not None)
    if lost.kept:
        linear.weight += D.to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias += e.to(linear.bias.dtype)
