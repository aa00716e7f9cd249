"""Chooses the weight α of APFL on held-out images.

On a training batch, α is biased towards v, which has seen the batch many times: the gradient there favours the personal
model even where the shared one is better. So a fraction of the device's training images is held out from the training
of both v and w, in every round. A handful of images would hardly move α from the mean of its prior, and would be
missing in training. A device that would hold out fewer than `FEWEST` images therefore holds out none, and uses the mean
of the prior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tapfl.adapters.lora import interpolate
from tapfl.training import Params

Losses = Callable[[Params], Tensor]
"""parameters -> the loss of each image of a batch (n,)"""

GRID = torch.linspace(0, 1, 11, dtype=torch.float64)
PRIOR = 2.0  # κ; the mean of this prior is α = 0.31
FEWEST = 12  # smallest number of held-out images


def hold_out(labels: np.ndarray, share: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted positions of the images to train on and of those to hold out.

    The fraction `share` of the images is held out, but at least one. Each class is held out in the same proportion as
    far as possible; a class with too few images for this is held out last.

    Args:
        labels: of the device's training images, int (n,), n >= 2.
    """
    order = generator.permutation(len(labels))
    _, of_class, count = np.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = np.argsort(of_class, kind="stable")
    rank = np.empty(len(labels), dtype=np.int64)  # rank of each image within its class, in the drawn order
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(count) - count, count)
    priority = share * count[of_class] - rank
    number = min(max(1, round(share * len(labels))), len(labels) - 1)
    held_out = np.sort(order[np.argsort(-priority, kind="stable")[:number]])
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


@torch.no_grad()
def held_out_alpha(v: Params, w: Params, batches: Sequence[Losses]) -> Tensor:
    """Returns α, 0-d float64: its posterior mean given the held-out images, or its prior mean if there are none.

        α = Σ_g g p_g,    p_g ∝ exp(-κ g - Σ_i f_i(g v + (1-g) w)),    g in {0, 0.1, …, 1}

    f_i is the cross-entropy of image i, so exp(-Σ_i f_i) is the likelihood of the labels under the interpolated model.
    A few images move α only a little from its prior mean, and many move it to where their loss is smallest. The best α
    of the grid would follow the noise of a handful of images to 0 or 1.
    """
    zero = torch.zeros((), dtype=torch.float64, device=next(iter(v.values())).device)
    losses = torch.stack([sum((f(interpolate(v, w, a)).double().sum() for f in batches), zero) for a in GRID])
    grid = GRID.to(losses.device)
    return torch.softmax(-PRIOR * grid - losses, 0) @ grid
