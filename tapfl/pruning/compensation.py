"""Closed-form compensation (ours): the kept units take over what they can of the signal of the pruned ones.

A shrunk branch f' is fitted to z, the activations of its units, and r, the output that it has lost of the branch f, by
the ridge regression of r on z, with λ = 1e-3 of the mean variance of z. No labels, no gradients. A branch without units
becomes the mean of f. An output linear without bias is fitted without intercept.

    one-pass     r = f(x) - f'(x)                                           x in the dense model
    sequential   r = f(x') - f'(x') + γ [(x + f(x)) - (x' + f(x'))]         x' behind the already shrunk layers

In one pass an FFN has lost r = W2_S x_S, the output of its pruned units S. A shrunk attention also changes the values
of the dims that it kept, since its logits lack dims.

In the sequential form r is what the branch itself lost, plus a share of the drift of the stream. Both extremes are
worse on held-out images (DeiT-Tiny, half the MACs; KL to the dense model for γ = 0, 1/4, 1/2, 1 of tap: 1.53, 1.13,
1.14, 1.50; of low-rank heads: 0.82, 0.66, 0.65, 0.73; in one pass: 1.78, 0.79): without the drift, the shrinkage of one
regression passes on to the next; all of it is more than the branch's units can predict. The target f(x) alone is worse
(2.31, 1.34).

With merged tokens x' has fewer tokens than x. Each is compared with the mean of those of x and f(x) that became it, and
weighs what they weigh together; f(x') attends to tokens by their sizes, as f'(x') does. In one pass the dense model
merges, too. Tokens that the last block drops are still there in all statistics.

With ``reconstruction`` all weights of a branch then take gradient steps towards the output f'(x') + r of the sequential
form (`tapfl.pruning.reconstruction`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from tapfl.models.merging import group_means, merging, passing
from tapfl.models.residual import Passage, as_branch_output, branch_steps, observe
from tapfl.models.units import PrunableLayer, put
from tapfl.progress import track
from tapfl.pruning.criteria.criterion import PruningTask, Selection
from tapfl.pruning.moments import RIDGE, LostOutput
from tapfl.pruning.reconstruction import Call, reconstruct
from tapfl.pruning.scores import refuse_not_finite
from tapfl.pruning.sensitivity import Sensitivities

CORRECTION = 0.25  # γ, share of the drift of the residual stream that a branch is asked to correct


def row_sensitivities(task: PruningTask, weights: nn.Module) -> Sensitivities | None:
    """Returns the Fisher sensitivities of a model, or None unless the task's compensation weights rows by them."""
    if task.options.compensation == "none" or task.options.compensation_rows != "sensitivity":
        return None
    return task.fisher if weights is task.model else task.fisher_of(weights)


@torch.no_grad()
def cut(task: PruningTask, selection: Selection, fisher: Sensitivities | None = None) -> nn.Module:
    """Returns the smaller model of a selection, compensated as the task's options say.

    Args:
        selection: layers that it does not name stay whole.
        fisher: the `row_sensitivities` of the weights that are cut, if they are known.

    Raises:
        ModelError: if a layer's activations are not finite, or as `reconstruct`.
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
    real = {name: _real_tokens(model, layer) for name, layer in pruned.items() if how != "none"}
    small = copy.deepcopy(merged, {id(branch): branch for branch in own.values()})
    images = dense_x = small_x = list(task.inputs.split(task.batch))
    steps = list(zip(branch_steps(model, True)[:-1], branch_steps(small, True)[:-1], strict=True))
    for (step, dense_step), (_, small_step) in track(steps if real else (), "compensation"):
        after = []
        # one layer, or none; those of a block of another kind than timm's plain ones, which is one step
        for layer in (each for each in pruned.values() if step in (each.name, each.block)):
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
    """Returns (x + f(x)) - (x' + f(x')) as an output of the branch, given its passages of x and x' and f(x')."""
    x, f_x = dense.stream, dense.output
    if now.source is not None:
        x, f_x = (group_means(each, now.source, own.shape[1]) for each in (x, f_x))
    return as_branch_output(small, layer, x - now.stream) + f_x - own


def _real_tokens(model: nn.Module, layer: PrunableLayer) -> Tensor | None:
    """Returns which tokens of an image are not padding (bool, in the order in which the branch sees them); None: all.

    Where windows extend beyond the grid, a Swin attention pads them; its block drops the output there.
    """
    block: Any = model.get_submodule(layer.block)
    if layer.kind != "attention" or not isinstance(block, SwinTransformerBlock):
        return None
    ones = layer.output_of(model).weight.new_ones(1, *block.input_resolution, layer.embed_dim)
    return as_branch_output(model, layer, ones)[..., 0].flatten() > 0


def _absorb(branch: nn.Module, layer: PrunableLayer, lost: LostOutput) -> None:
    """Adds to the output linear of a shrunk branch the regression of the lost output."""
    linear: Any = branch.get_submodule(layer.output)
    D, e = lost.regression(RIDGE, intercept=linear.bias is not None)
    if lost.kept:
        linear.weight += D.to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias += e.to(linear.bias.dtype)
