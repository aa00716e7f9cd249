"""Reconstruction of a branch that was cut: gradient steps after the closed form (ours).

The closed form (`tapfl.pruning.compensation`) refits the output linear of a branch alone. Here all weights of the cut
branch f' move towards the same target t, on the inputs y that the cut model sends into it:

    minimise  Σ s |f'(y) − t|² / Σ s        over rows (tokens of an image) of weight s

by a few dozen steps of Adam, as BRECQ (Li et al., ICLR 2021, arXiv 2102.05426) does with the blocks of a quantised
model. No labels, and nothing is drawn: the images come best first, and a batch is every k-th of them. Every fifth image
is held out. The weights with the least error on these stay, so that a branch never gets worse on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tapfl.training import LOOK, BestSoFar, apart, minimise

HELD_OUT = 0.2  # of the images
BATCH = 32  # images a step, at most
OPTION = "pruning.compensation-learning-rate"


class Call(NamedTuple):
    """A batch of images on its way through a branch.

    Attributes:
        images: how many.
        arguments: of the branch (positional, by name): first the input (images or windows, tokens, width).
        target: t, as the branch's output.
        weights: s of its rows, float (rows,).
    """

    images: int
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]]
    target: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Rows:
    """All calls together, with the images first: inputs, targets (images, windows, tokens, width) and weights."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    others: tuple[Any, ...]
    options: Mapping[str, Any]
    masks: Tensor | None  # of the tokens of each image, where they have sizes

    @classmethod
    def of(cls, calls: Sequence[Call]) -> Rows:
        (_, *others), options = calls[0].arguments
        by_name = [call.arguments[1] for call in calls]
        inputs, targets = (
            torch.cat([each.unflatten(0, (call.images, -1)) for call, each in zip(calls, values, strict=True)])
            for values in ([call.arguments[0][0] for call in calls], [call.target for call in calls])
        )
        weights = torch.cat([call.weights.to(inputs.dtype).view(call.images, -1) for call in calls])
        masks = None if options.get("attn_mask") is None else torch.cat([each["attn_mask"] for each in by_name])
        return cls(inputs, targets, weights.view(targets.shape[:3]), tuple(others), options, masks)

    def squares(self, branch: nn.Module, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns Σ s |f'(y) − t|², the mean over the width, and Σ s, of the images at these positions."""
        i = torch.from_numpy(chosen).to(self.inputs.device)
        options = self.options if self.masks is None else {**self.options, "attn_mask": self.masks[i]}
        found = branch(self.inputs[i].flatten(0, 1), *self.others, **options)
        apart = (found.view_as(self.targets[i]) - self.targets[i]).square().mean(-1)
        return (self.weights[i] * apart).sum(), self.weights[i].sum()


def reconstruct(branch: nn.Module, calls: Sequence[Call], steps: int, learning_rate: float) -> tuple[float, float]:
    """Trains all weights of a cut branch in place; returns its held-out error before and after, which is no larger.

    Args:
        calls: on which it is trained and judged; the arguments that are not one an image are alike in all.
        steps: gradient steps, >= 0.

    Raises:
        ModelError: if there are fewer than two images, or it diverges, saying at which step.
    """
    rows = Rows.of(calls)
    trained, held = apart(len(rows.inputs), HELD_OUT, "reconstruction")
    stride = -(-len(trained) // BATCH)

    def error() -> float:
        parts = [rows.squares(branch, part) for part in np.array_split(held, -(-len(held) // BATCH))]
        return float(sum(each[0] for each in parts) / sum(each[1] for each in parts))

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
