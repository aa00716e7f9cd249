"""Reconstruction of a pruned branch: gradient steps after the closed form (ours).

The closed form (`tapfl.pruning.compensation`) refits only the output linear of a branch. Here all weights of the pruned
branch f' are trained towards the same target t, on the inputs y that the branch gets in the pruned model:

    minimise  Σ s |f'(y) − t|² / Σ s        over rows (tokens of an image) of weight s

by a few dozen steps of Adam, as BRECQ (Li et al., ICLR 2021, arXiv 2102.05426) does for the blocks of a quantised
model. No labels are needed and nothing is random: the images are sorted, best first, and a batch is every k-th of them.
Every fifth image is held out. The weights with the smallest held-out error are kept, so a branch never gets worse on
the held-out images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tapfl.training import LOOK, BestSoFar, apart, minimise

HELD_OUT = 0.2  # fraction of the images
BATCH = 32  # largest number of images per step
OPTION = "pruning.compensation-learning-rate"


class Call(NamedTuple):
    """One call of a branch, with a batch of images.

    Attributes:
        images: number of images.
        arguments: positional and keyword arguments. The first is the input (images or windows, tokens, width).
        target: t, in the shape of the branch's output.
        weights: s of the rows, float (rows,).
    """

    images: int
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]]
    target: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Rows:
    """All calls together: inputs and targets (images, windows, tokens, width), weights (images, windows, tokens).

    Attributes:
        others: positional arguments after the input, the same for all calls.
        options: keyword arguments, the same for all calls except `attn_mask`.
        masks: `attn_mask` of each image, where merged tokens have sizes.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    others: tuple[Any, ...]
    options: Mapping[str, Any]
    masks: Tensor | None

    @classmethod
    def of(cls, calls: Sequence[Call]) -> Rows:
        (_, *others), options = calls[0].arguments
        inputs = torch.cat([call.arguments[0][0].unflatten(0, (call.images, -1)) for call in calls])
        targets = torch.cat([call.target.unflatten(0, (call.images, -1)) for call in calls])
        weights = torch.cat([call.weights.to(inputs.dtype).view(call.images, -1) for call in calls])
        masks = None
        if options.get("attn_mask") is not None:
            masks = torch.cat([call.arguments[1]["attn_mask"] for call in calls])
        return cls(inputs, targets, weights.view(targets.shape[:3]), tuple(others), options, masks)

    def squares(self, branch: nn.Module, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns (Σ s |f'(y) − t|², Σ s) of the images at the positions `chosen`; |·|² is the mean over the width."""
        i = torch.from_numpy(chosen).to(self.inputs.device)
        options = self.options if self.masks is None else {**self.options, "attn_mask": self.masks[i]}
        output = branch(self.inputs[i].flatten(0, 1), *self.others, **options)
        errors = (output.view_as(self.targets[i]) - self.targets[i]).square().mean(-1)
        return (self.weights[i] * errors).sum(), self.weights[i].sum()


def reconstruct(branch: nn.Module, calls: Sequence[Call], steps: int, learning_rate: float) -> tuple[float, float]:
    """Trains all weights of a pruned branch in place.

    Args:
        calls: the images to train on and to hold out. Arguments that do not have one entry per image must be equal in
            all calls.
        steps: gradient steps, >= 0.

    Returns:
        The held-out error before and after; the second is never larger.

    Raises:
        ModelError: if there are fewer than two images, or training diverges. It names the step.
    """
    rows = Rows.of(calls)
    trained, held = apart(len(rows.inputs), HELD_OUT, "reconstruction")
    stride = -(-len(trained) // BATCH)

    def error() -> float:
        parts = [rows.squares(branch, part) for part in np.array_split(held, -(-len(held) // BATCH))]
        return float(sum(total for total, _ in parts) / sum(weight for _, weight in parts))

    best = BestSoFar(branch, error)

    def loss(step: int, chosen: np.ndarray) -> Tensor:
        if step and step % LOOK == 0:
            best.look()
        total, weight = rows.squares(branch, chosen)
        return total / weight

    params = list(branch.requires_grad_(True).parameters())
    with torch.enable_grad():
        order = (trained[step % stride :: stride] for step in range(steps))
        minimise(params, loss, order, steps, learning_rate, (OPTION, "reconstruction"))
    branch.requires_grad_(False)
    best.look()
    best.restore()
    return best.first, best.least
