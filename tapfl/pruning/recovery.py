"""Recovery: training of a pruned model after surgery, the same for all criteria.

A fixed number of steps of Adam at a constant learning rate on public images, with no augmentation and no dropout, and
nothing selected on test data. With ``recovery-held-out`` a share of these images only judges: the weights with the
least loss on them stay, those before any step among them, so that a model never gets worse on them. With logits z,
label y and the dense model's logits t, the loss is

    fine-tune   CE(z, y)
    distill     β T² KL(softmax(t/T) ‖ softmax(z/T)) + (1 − β) CE(z, y)            (Hinton et al., arXiv 1503.02531)

As published for TAP-ViTs: fine-tuning on the 6400 top public images, Adam 1e-5, batch 64. The defaults are ours (100
steps of 32 images at 1e-4), and so is distillation.

A branch f that was dropped as a whole may *fade* (UPDP, AAAI 2024) instead of being gone at once. Surgery leaves its
constant b, the bias of its output linear, so what fades is what the branch does beyond that:

    x + b + λ (f(x) − b),   λ from 1 to 0 over the first 30 % of the steps

It begins as the dense branch and ends as the shrunk model has it, with no step in between.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.config import PruningOptions
from tapfl.errors import ConfigError, ModelError
from tapfl.models.units import put
from tapfl.progress import track
from tapfl.pruning.criteria.criterion import Selection
from tapfl.training import LOOK, BestSoFar, apart, batches, minimise

FADING_SHARE = 0.3  # of the steps, as published
TEMPERATURE, SOFT_SHARE = 4.0, 0.9  # T and β of distillation


def steps_left(options: PruningOptions, selection: Selection) -> int:
    """Returns the steps of recovery that remain after the steps of the criterion's own search are deducted."""
    return max(options.recovery_steps - selection.steps, 0)


def fading_branches(model: nn.Module, selection: Selection) -> dict[str, nn.Module]:
    """Returns, by name, the branches of the dense `model` that fade: dropped as a whole, if the criterion lets them."""
    if not selection.fades:
        return {}
    return {name: model.get_submodule(name) for name, kept in selection.kept.items() if len(kept) == 0}


def recover(
    model: nn.Module,
    inputs: Callable[[np.ndarray], Tensor],
    labels: Tensor,
    options: PruningOptions,
    generator: np.random.Generator,
    *,
    steps: int,
    teacher: Callable[[Tensor], Tensor] | None = None,
    fading: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """Returns a trained copy of `model`, frozen and in evaluation mode, with all names and shapes as they were.

    Args:
        model: the pruned model; it is left as it is, and so are `teacher` and `fading`.
        inputs: positions -> images in the backbone's input format, so that a large fine-tune set need not be in memory
            as floats.
        labels: int64 (n,) of the fine-tune set, n >= 1.
        options: kind of recovery, batch and learning rate.
        generator: the only source of chance: the order of the images. Fewer steps see the first batches of more.
        steps: gradient steps; with 0, or with ``recovery = none``, the copy is what `model` is.
        teacher: images -> logits of the dense model, for ``recovery = distill``.
        fading: dense branches that fade, by name; each must be one of which nothing is left in `model`.

    Raises:
        ConfigError: if distillation has no teacher.
        ModelError: if there is no image, or it diverges, saying at which step.
    """
    small = copy.deepcopy(model).eval().requires_grad_(True)
    if steps and options.recovery != "none":
        trained, held = np.arange(len(labels)), np.arange(0)
        if options.recovery_held_out:
            trained, held = apart(len(labels), options.recovery_held_out, "pruning.recovery-held-out")
        order = [trained[chosen] for chosen in batch_order(len(trained), options.recovery_batch, steps, generator)]
        targets = _targets(options, teacher, inputs, len(labels), [*order, held])

        def loss_of(chosen: np.ndarray) -> Tensor:
            index = torch.from_numpy(chosen)
            return recovery_loss(small(inputs(chosen)), labels[index], None if targets is None else targets[index])

        def error() -> float:
            parts = np.array_split(held, -(-len(held) // options.recovery_batch))
            return sum(float(loss_of(part)) * len(part) for part in parts) / len(held)

        best = BestSoFar(small, error) if len(held) else None
        faders = _faders(small, fading or {})

        def loss(step: int, chosen: np.ndarray) -> Tensor:
            _fade(small, faders, strength(step, steps))
            if best and step and step % LOOK == 0 and not faders:
                best.look()
            return loss_of(chosen)

        rate, said = options.recovery_learning_rate, ("pruning.recovery-learning-rate", "recovery")
        minimise(list(small.parameters()), loss, track(order, "recovery"), steps, rate, said)
        _fade(small, faders, 0.0)
        if best:
            best.look()
            best.restore()
    return small.requires_grad_(False)


def _targets(
    options: PruningOptions,
    teacher: Callable[[Tensor], Tensor] | None,
    inputs: Callable[[np.ndarray], Tensor],
    size: int,
    order: list[np.ndarray],
) -> Tensor | None:
    """Returns the `teacher_logits` for distillation, and None without it."""
    if options.recovery != "distill":
        return None
    if teacher is None:
        raise ConfigError("pruning.recovery = 'distill': needs the dense model as teacher")
    return teacher_logits(teacher, inputs, size, order)


def recovery_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> Tensor:
    """Returns the mean loss of a batch, as defined above.

    Args:
        logits: (n, classes) of the pruned model.
        labels: int64 (n,).
        teacher: logits (n, classes) of the dense model, or None for cross-entropy alone.
    """
    hard = F.cross_entropy(logits, labels)
    if teacher is None:
        return hard
    return SOFT_SHARE * soft_loss(logits, teacher) + (1 - SOFT_SHARE) * hard


def soft_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Returns T² KL(softmax(t/T) ‖ softmax(z/T)), the mean over the images; both are logits (n, classes)."""
    T = TEMPERATURE
    soft = F.kl_div((logits / T).log_softmax(-1), (teacher / T).log_softmax(-1), log_target=True, reduction="batchmean")
    return T**2 * soft


@torch.no_grad()
def teacher_logits(
    teacher: Callable[[Tensor], Tensor], inputs: Callable[[np.ndarray], Tensor], size: int, order: list[np.ndarray]
) -> Tensor:
    """Returns the logits (size, classes) of the images that `order` names, each computed once; the others are NaN."""
    seen = np.unique(np.concatenate(order))
    parts = np.array_split(seen, -(-len(seen) // len(order[0])))
    logits = torch.cat([teacher(inputs(part)) for part in track(parts, "teacher")])
    places = torch.from_numpy(seen).to(logits.device)
    return logits.new_full((size, logits.shape[1]), torch.nan).index_copy_(0, places, logits)


def strength(step: int, steps: int) -> float:
    """Returns λ at `step` (from 0) of `steps`: 1 at first, and 0 from 30 % of the steps on."""
    return max(0.0, 1 - step / math.ceil(FADING_SHARE * steps))


class FadingBranch(nn.Module):
    """b + λ (f(x) − b), in place of a branch f of which only the constant b stays."""

    def __init__(self, branch: nn.Module, constant: nn.Module) -> None:
        super().__init__()
        self.branch, self.constant = branch, constant
        self.strength = 1.0

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        b: Tensor = self.constant(x)
        return b + self.strength * (self.branch(x, *args, **kwargs) - b)


def batch_order(size: int, batch: int, steps: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Returns the positions of the images of each step. Raises ModelError if there is no image."""
    if size == 0:
        raise ModelError("recovery needs at least one image")
    passes = -(-steps // -(-size // batch))
    return list(islice(batches(size, batch, passes, generator), steps))


def _faders(small: nn.Module, fading: Mapping[str, nn.Module]) -> dict[str, FadingBranch]:
    """Puts dense branches in the places of what is left of them, to fade; returns them by name."""
    faders = {}
    for name, branch in fading.items():
        dense = copy.deepcopy(branch).eval().requires_grad_(True)
        faders[name] = FadingBranch(dense, small.get_submodule(name))
        put(small, name, faders[name])
    return faders


def _fade(small: nn.Module, faders: dict[str, FadingBranch], strength: float) -> None:
    for name, fader in list(faders.items()):
        fader.strength = strength
        if strength == 0:
            put(small, name, faders.pop(name).constant)
