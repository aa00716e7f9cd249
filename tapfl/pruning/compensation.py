"""Closed-form compensation (ours): the kept units of a branch take over what they can of the pruned units' output.

A pruned branch f' has activations z and has lost the output r of the dense branch f. The ridge regression of r on z,
with λ = 1e-3 times the mean variance of z, is added to the output linear of f'. It needs no labels and no gradients. A
branch without units becomes the mean of f. An output linear without bias is fitted without intercept.

    one-pass     r = f(x) - f'(x)                                           x: input in the dense model
    sequential   r = f(x') - f'(x') + γ [(x + f(x)) - (x' + f(x'))]         x': input behind the layers already pruned

In the one-pass form an FFN has lost r = W2_S x_S, the output of its pruned units S. A pruned attention also changes the
values of the dims that it kept, because its logits are computed from fewer dims.

In the sequential form r is what the branch itself lost plus the fraction γ of the drift of the residual stream. Both
extremes are worse on held-out images. At half the MACs of DeiT-Tiny, the KL to the dense model for γ = 0, 1/4, 1/2, 1
is 1.53, 1.13, 1.14, 1.50 for tap and 0.82, 0.66, 0.65, 0.73 for low-rank heads; the one-pass form gives 1.78 and 0.79.
With γ = 0, the shrinkage of one ridge regression is passed on to the next. With γ = 1, the target is more than the
units of the branch can predict. The target f(x) alone is worse (2.31, 1.34).

With merged tokens, x' has fewer tokens than x. Each token of x' is compared with the mean of the tokens of x and f(x)
that were merged into it, and its weight is the sum of theirs. The attention in f(x') weights tokens by their sizes, as
in f'(x'). In the one-pass form the dense model merges tokens, too. All statistics still include the tokens that the
last block drops.

With ``reconstruction``, all weights of a branch are then trained by gradient steps towards the output f'(x') + r of the
sequential form (`tapfl.pruning.reconstruction`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tapfl.config import PruningOptions
from tapfl.errors import ConfigError, ModelError
from tapfl.models.merging import group_means, merging, passing
from tapfl.models.residual import Passage, as_branch_output, branch_steps, observe, pre_norm_block, real_tokens
from tapfl.models.units import PrunableLayer, put
from tapfl.progress import track
from tapfl.pruning.criteria.criterion import PruningTask, Selection
from tapfl.pruning.moments import RIDGE, LostOutput
from tapfl.pruning.reconstruction import Call, reconstruct
from tapfl.pruning.scores import refuse_not_finite
from tapfl.pruning.sensitivity import Sensitivities

CORRECTION = 0.25  # γ, the fraction of the drift of the residual stream that a branch has to correct


def require_compensable(model: nn.Module, layers: Sequence[PrunableLayer], options: PruningOptions) -> None:
    """Raises ConfigError if the blocks of `model` cannot be compensated as the options say."""
    if options.compensation in ("none", "one-pass"):
        return
    try:
        for layer in layers:
            pre_norm_block(model, layer)
    except ModelError as error:
        how = f"pruning.compensation = {options.compensation!r}"
        raise ConfigError(f"{how}: {error}; for this backbone: one-pass, none") from None


def row_sensitivities(task: PruningTask, weights: nn.Module) -> Sensitivities | None:
    """Returns the Fisher sensitivities of `weights`, or None if compensation does not weight rows by them."""
    if task.options.compensation == "none" or task.options.compensation_rows != "sensitivity":
        return None
    return task.fisher if weights is task.model else task.fisher_of(weights)


@torch.no_grad()
def cut(task: PruningTask, selection: Selection, fisher: Sensitivities | None = None) -> nn.Module:
    """Returns the pruned model of a selection, compensated as the task's options say.

    Args:
        selection: layers that it does not name are not cut.
        fisher: the `row_sensitivities` of the model that is cut, if they are already known.

    Raises:
        ModelError: if a layer's activations are not finite, or as for `reconstruct`.
        PlanError: if the selection does not fit the layers.
    """
    options, kept, model = task.options, selection.kept, selection.model or task.model
    how, merged = options.compensation, passing(model, selection.tokens)
    if how == "one-pass" and any(selection.tokens):
        fisher = row_sensitivities(task, merged)
    fisher = fisher or row_sensitivities(task, model)
    pruned = {n.name: n for n in task.layers if n.name in kept and len(kept[n.name]) < n.units}
    own = {name: merged.get_submodule(name) for name in pruned}
    shrunk = {name: layer.shrink(own[name], kept[name]) for name, layer in pruned.items()}
    real = {name: real_tokens(model, layer) for name, layer in pruned.items() if how != "none"}
    small = copy.deepcopy(merged, {id(branch): branch for branch in own.values()})
    images = dense_x = small_x = list(task.inputs.split(task.batch))
    steps = list(zip(branch_steps(model, True)[:-1], branch_steps(small, True)[:-1], strict=True))
    for (step, dense_step), (_, small_step) in track(steps if real else (), "compensation"):
        after = []
        # one layer or none; several where a step is a whole block, because it is not one of timm's plain blocks
        for layer in (layer for layer in pruned.values() if step in (layer.name, layer.block)):
            name = layer.name
            put(small, name, shrunk[name])
            weights = fisher[name].rows if fisher else None
            lost = LostOutput(len(kept[name]), layer.embed_dim, real[name], weights, task.inputs.device)
            calls: list[Call] = []
            for number, (x, y) in enumerate(zip(dense_x, small_x, strict=True)):
                now = observe(small, layer, small_step, y)
                args, kwargs = now.arguments
                target: Tensor = own[name](*args, **kwargs)
                r, source = target - now.output, None
                if how != "one-pass":
                    dense = observe(model, layer, dense_step, x)
                    after.append(dense.after)
                    pull = CORRECTION * _drift(small, layer, dense, now, target)
                    r, target, source = r + pull, target + pull, now.source
                counted = lost.add(now.units, r, source)
                refuse_not_finite({name: lost.total}, number)
                if how == "reconstruction":
                    calls.append(Call(len(images[number]), now.arguments, target, counted))
            _absorb(shrunk[name], layer, lost)
            if calls:
                reconstruct(shrunk[name], calls, options.compensation_steps, options.compensation_learning_rate)
            if how == "one-pass":  # the next layers see the dense model
                put(small, name, own[name])
        small_x = [small_step(y) for y in small_x]
        if how != "one-pass":
            dense_x = after or [dense_step(x) for x in dense_x]
    for name, branch in shrunk.items():
        put(small, name, branch)
    return merging(small, selection.tokens).eval()


def _drift(small: nn.Module, layer: PrunableLayer, dense: Passage, now: Passage, own: Tensor) -> Tensor:
    """Returns the drift (x + f(x)) - (x' + f(x')) in the shape of the branch's output.

    Args:
        dense: the passage of x.
        now: the passage of x'.
        own: f(x').
    """
    x, f_x = dense.stream, dense.output
    if now.source is not None:
        x, f_x = (group_means(tensor, now.source, own.shape[1]) for tensor in (x, f_x))
    return as_branch_output(small, layer, x - now.stream) + f_x - own


def _absorb(branch: nn.Module, layer: PrunableLayer, lost: LostOutput) -> None:
    """Adds the regression of the lost output to the output linear of a pruned branch."""
    linear: Any = branch.get_submodule(layer.output)
    D, e = lost.regression(RIDGE, intercept=linear.bias is not None)
    if lost.kept:
        linear.weight += D.to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias += e.to(linear.bias.dtype)
