"""UPop (Shi et al., "UPop: unified and progressive pruning for compressing vision-language transformers", ICML 2023).

The ranking is that of `tapfl.pruning.criteria.upop_oneshot`; this adds the progressive search. Over T steps of
training, with p the share of what all units cost that has to go in the end (MACs; or the quantity of the budget's
tightest limit),

    p_t = p · sqrt((1 − cos(πt/T)) / 2)

and every T/20 steps the units of largest z, up to a cost of p_t, are selected anew, by the masks' gradients accumulated
since the first step (as in the public code, which never clears them; cleared at each selection, a unit that fades gets
a gradient of the other sign and comes back, and hardly a unit is selected twice). Masks of selected units fall to
1 − p_t/p, those of all others return to 1, while the weights keep training. What is selected at the end, when the masks
of it are 0, goes.

Differs from the publication: T is 100 and not 60 epochs of ImageNet, on the metric set alone, without augmentation or
distillation, at a constant learning rate; and as said in `upop_oneshot`. The gradient steps are reported, for a fair
comparison deducts them from recovery.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tapfl.progress import track
from tapfl.pruning.criteria.gates import targets
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.pruning.criteria.upop_oneshot import masked, open_masks, standardise, unified, worth

STEPS = 100  # T; 100 to 300 is the short form of the method
SELECTIONS = 20  # of them over the search, as published
LEARNING_RATE = 1e-4  # of AdamW: a pretrained backbone's last fine-tuning, and recovery's in our comparisons
WEIGHT_DECAY = 0.05  # as published


def upop(task: PruningTask) -> Selection:
    """Returns what stays, and in `model` the trained copy it is to be cut from; `steps` is T."""
    model = copy.deepcopy(task.model).eval().requires_grad_(True)
    labels = targets(task)
    masks = open_masks(task.layers, task.inputs)
    final = share_to_go(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    interval = max(1, STEPS // SELECTIONS)
    with torch.enable_grad(), masked(model, task.layers, masks):
        for step, chosen in enumerate(track(_batches(task, STEPS), "search", STEPS), start=1):
            optimizer.zero_grad()  # not the masks', which add up from the first step on
            F.cross_entropy(model(task.inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
            if step % interval == 0 or step == STEPS:
                z = standardise(task.layers, {name: _gradient(mask) for name, mask in masks.items()})
                now = schedule(step, STEPS, final)
                for name, values in faded(task, z, now, final).items():
                    masks[name].data.copy_(values)
    optimizer.zero_grad(set_to_none=True)
    return replace(unified(task, worth(task.layers, z)), model=model.requires_grad_(False), steps=STEPS)


def schedule(t: int, T: int, p: float) -> float:
    """Returns p_t: 0 at the start, p at t = T."""
    return p * math.sqrt((1 - math.cos(math.pi * t / T)) / 2)


def share_to_go(task: PruningTask) -> float:
    """Returns p, the share of what all prunable units cost that is over the budget's tightest limit."""
    return 1 - float(task.costs.shares.min())


def faded(task: PruningTask, z: Mapping[str, Tensor], now: float, final: float) -> dict[str, Tensor]:
    """Returns the masks at p_t = `now`, p = `final`: 1 − p_t/p for the units of largest z up to the cost p_t, else 1.

    A layer never loses all: its unit of smallest z stays at 1, as in the public code.
    """
    limit = task.costs.tightest
    unit = [layer.heads * float(task.costs.slopes[layer.name][limit]) for layer in task.layers]
    values = {layer.name: torch.ones_like(z[layer.name]) for layer in task.layers}
    ranked = sorted(
        ((-float(score), i, k) for i, layer in enumerate(task.layers) for k, score in enumerate(z[layer.name])),
    )
    last = [int(z[layer.name].argmin()) for layer in task.layers]
    left = now * float(task.costs.prunable[limit]) * (1 + 1e-12)
    for _, i, k in ranked:
        if k == last[i]:
            continue
        if left < unit[i]:
            break
        left -= unit[i]
        values[task.layers[i].name][k] = 1 - now / final
    return values


def _batches(task: PruningTask, steps: int) -> Iterator[Tensor]:
    """Yields the positions of `steps` batches of the metric set, which is shuffled anew each time through."""
    while True:
        for chosen in torch.randperm(len(task.inputs), generator=task.generator).split(task.batch):
            if steps == 0:
                return
            steps -= 1
            yield chosen


def _gradient(mask: Tensor) -> Tensor:
    assert mask.grad is not None
    return mask.grad
