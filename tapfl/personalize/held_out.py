"""The weight α of APFL, chosen on images that nothing is trained on.

On a training batch α is biased to v, which has seen the batch many times: its gradient there favours the personal model
even where the shared one is better. So a share of the device's training images is held out, of v and of w, in every
round. A handful of images hardly moves α from the mean of its prior, and w and v miss them in training. So a device
that would hold out fewer than `FEWEST` holds out none, and has the prior's α.
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
PRIOR = 2.0  # κ: before any image is seen α is 0.31
FEWEST = 12  # held-out images


def hold_out(labels: np.ndarray, share: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted positions (trained on, held out) of a device's training images.

    `share` of the images is held out, at least one, of each class as near to its share as possible: a class with few
    images gives none while others can.

    Args:
        labels: int (n,), n >= 2.
    """
    order = generator.permutation(len(labels))
    _, of_class, count = np.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = np.argsort(of_class, kind="stable")
    rank = np.empty(len(labels), dtype=np.int64)  # of each image among those of its class, in the drawn order
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(count) - count, count)
    still_due = share * count[of_class] - rank
    number = min(max(1, round(share * len(labels))), len(labels) - 1)
    taken = np.sort(order[np.argsort(-still_due, kind="stable")[:number]])
    return np.setdiff1d(np.arange(len(labels)), taken), taken


@torch.no_grad()
def held_out_alpha(v: Params, w: Params, batches: Sequence[Losses]) -> Tensor:
    """Returns α, 0-d float64: the mean of its posterior, given the held-out images, or of its prior if there are none.

        α = Σ_g g p_g,    p_g ∝ exp(-κ g - Σ_i f_i(g v + (1-g) w)),    g in {0, 0.1, …, 1}

    f_i is the cross-entropy of image i, so exp(-Σ_i f_i) is the likelihood of the labels under the interpolated model.
    Few images move α little from the mean of its prior, and many move it to where their loss is least. The best of the
    grid would follow the noise of a handful of images to 0 or 1.
    """
    none = torch.zeros((), dtype=torch.float64, device=next(iter(v.values())).device)
    of_each = torch.stack([sum((f(interpolate(v, w, a)).double().sum() for f in batches), none) for a in GRID])
    grid = GRID.to(of_each.device)
    return torch.softmax(-PRIOR * grid - of_each, 0) @ grid
