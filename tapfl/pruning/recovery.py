"""Recovery: training of a pruned model after surgery, the same for all criteria.

It takes a fixed number of Adam steps at a constant learning rate on public images, without augmentation or dropout, and
selects nothing on test data. With ``recovery-held-out``, a fraction of these images is held out. The weights with the
smallest loss on them are kept, and the weights before the first step are candidates too, so a model never gets worse on
the held-out images. With logits z, label y and the dense model's logits t, the loss is

    fine-tune   CE(z, y)
    distill     β T² KL(softmax(t/T) ‖ softmax(z/T)) + (1 − β) CE(z, y)            (Hinton et al., arXiv 1503.02531)

TAP-ViTs as published fine-tunes on the 6400 top public images with Adam at 1e-5 and batches of 64. The defaults here
(100 steps of 32 images at 3e-5) and distillation are ours.

A branch f that is dropped entirely may *fade out* (UPDP, AAAI 2024) instead of disappearing at once. Surgery keeps its
constant b, the bias of its output linear, so only the rest of its output fades:

    x + b + λ (f(x) − b),   λ from 1 to 0 over the first 30 % of the steps

This starts as the dense branch and ends as the pruned model, without a jump.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.config import PruningOptions
from tapfl.data.images import ImageSet
from tapfl.data.transform import Transform
from tapfl.errors import ConfigError, ModelError
from tapfl.models.forward import full
from tapfl.models.units import put
from tapfl.progress import track
from tapfl.pruning.criteria.criterion import PruningTask, Selection
from tapfl.seeds import numpy_generator
from tapfl.training import LOOK, BestSoFar, apart, batches, minimise

FADING_SHARE = 0.3  # fraction of the steps, as published
TEMPERATURE, SOFT_SHARE = 4.0, 0.9  # T and β of distillation


@dataclass(frozen=True)
class FineTuneSet:
    """The public images of recovery.

    Attributes:
        inputs: maps positions to images in the backbone's input format, so that not all are in memory as floats.
        size: number of images.
        labels: int64 (size,); None stands for the dense model's predictions.
    """

    inputs: Callable[[np.ndarray], Tensor]
    size: int
    labels: Tensor | None


def fine_tune_set(pick: Callable[[int], ImageSet], transform: Transform, options: PruningOptions) -> FineTuneSet | None:
    """Returns `recovery-size` public images, or None if recovery uses the metric set or is off.

    Args:
        pick: returns the given number of public images; called only if they are needed.
    """
    if options.recovery == "none" or not options.recovery_size:
        return None
    chosen = pick(options.recovery_size)
    return FineTuneSet(lambda index: transform(chosen.read(index)), len(chosen), labels_of(chosen, options))


def labels_of(images: ImageSet, options: PruningOptions) -> Tensor | None:
    """Returns the labels that the options allow, int64 (n,); None stands for the dense model's predictions.

    Raises:
        ConfigError: if the options ask for labels and the images have none.
    """
    if options.labels != "public":
        return None
    if not images.classes:
        raise ConfigError("pruning.labels = 'public': the public pool has no labels; accepted: pseudo")
    return torch.from_numpy(images.labels)


def recovered(
    task: PruningTask, selection: Selection, pruned: nn.Module, fine_tune: FineTuneSet | None = None, seed: int = 0
) -> nn.Module:
    """Returns a trained copy of `pruned`, frozen and in evaluation mode, or `pruned` itself if there are no steps.

    The steps that the criterion's own search has trained are deducted.

    Args:
        fine_tune: the images to train on; None: the metric set.
        seed: determines the order of the images. A shorter training sees the first batches of a longer one.

    Raises:
        ModelError: if there are too few images, or training diverges. It names the step.
    """
    options, steps = task.options, max(task.options.recovery_steps - selection.steps, 0)
    if options.recovery == "none" or not steps:
        return pruned
    device, small = task.inputs.device, copy.deepcopy(pruned).eval().requires_grad_(True)
    images = fine_tune or FineTuneSet(lambda index: task.inputs[torch.from_numpy(index)], len(task.inputs), task.labels)
    trained, held = np.arange(images.size), np.arange(0)
    if options.recovery_held_out:
        trained, held = apart(images.size, options.recovery_held_out, "pruning.recovery-held-out")
    generator = numpy_generator(seed, "recovery")
    order = [trained[chosen] for chosen in batch_order(len(trained), options.recovery_batch, steps, generator)]

    def inputs(chosen: np.ndarray) -> Tensor:
        return images.inputs(chosen).to(device)

    def teacher(x: Tensor) -> Tensor:
        with task.compute.forward():
            return full(task.model(x))

    used, labels, targets = [*order, held], images.labels, None
    if options.recovery == "distill":
        targets = teacher_logits(teacher, inputs, images.size, used)
    if labels is None:  # the dense model's predictions, which no reduced precision may change
        exact = task.compute.reduced is None
        logits = targets if exact and targets is not None else teacher_logits(task.model, inputs, images.size, used)
        labels = logits.argmax(1)
    labels = labels.to(device)

    def loss_of(chosen: np.ndarray) -> Tensor:
        index = torch.from_numpy(chosen)
        return recovery_loss(small(inputs(chosen)), labels[index], None if targets is None else targets[index])

    def error() -> float:
        parts = np.array_split(held, -(-len(held) // options.recovery_batch))
        return sum(float(loss_of(part)) * len(part) for part in parts) / len(held)

    best = BestSoFar(small, error) if len(held) else None
    faders = _faders(small, task.model, selection)

    def loss(step: int, chosen: np.ndarray) -> Tensor:
        _fade(small, faders, strength(step, steps))
        if best and step and step % LOOK == 0 and not faders:
            best.look()
        return loss_of(chosen)

    rate, names = options.recovery_learning_rate, ("pruning.recovery-learning-rate", "recovery")
    minimise(list(small.parameters()), loss, track(order, "recovery"), steps, rate, names)
    _fade(small, faders, 0.0)
    if best:
        best.look()
        best.restore()
    return small.requires_grad_(False)


def recovery_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> Tensor:
    """Returns the mean loss of a batch, as defined above.

    Args:
        logits: logits of the pruned model (n, classes).
        labels: int64 (n,).
        teacher: logits of the dense model (n, classes); None for cross-entropy only.
    """
    hard = F.cross_entropy(logits, labels)
    if teacher is None:
        return hard
    return SOFT_SHARE * soft_loss(logits, teacher) + (1 - SOFT_SHARE) * hard


def soft_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Returns T² KL(softmax(t/T) ‖ softmax(z/T)), the mean over the images, for two sets of logits (n, classes)."""
    T = TEMPERATURE
    soft = F.kl_div((logits / T).log_softmax(-1), (teacher / T).log_softmax(-1), log_target=True, reduction="batchmean")
    return T**2 * soft


@torch.no_grad()
def teacher_logits(
    teacher: Callable[[Tensor], Tensor], inputs: Callable[[np.ndarray], Tensor], size: int, order: list[np.ndarray]
) -> Tensor:
    """Returns the teacher's logits (size, classes), computed once per image in `order`; the other rows are NaN."""
    seen = np.unique(np.concatenate(order))
    parts = np.array_split(seen, -(-len(seen) // len(order[0])))
    logits = torch.cat([teacher(inputs(part)) for part in track(parts, "teacher")])
    places = torch.from_numpy(seen).to(logits.device)
    return logits.new_full((size, logits.shape[1]), torch.nan).index_copy_(0, places, logits)


def strength(step: int, steps: int) -> float:
    """Returns λ at `step` (counted from 0) of `steps`: 1 at first, and 0 after 30 % of the steps."""
    return max(0.0, 1 - step / math.ceil(FADING_SHARE * steps))


class FadingBranch(nn.Module):
    """b + λ (f(x) − b): takes the place of a dropped branch f, of which only the constant b will stay."""

    def __init__(self, branch: nn.Module, constant: nn.Module) -> None:
        super().__init__()
        self.branch, self.constant = branch, constant
        self.strength = 1.0

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        b: Tensor = self.constant(x)
        return b + self.strength * (self.branch(x, *args, **kwargs) - b)


def batch_order(size: int, batch: int, steps: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Returns the positions of the images of each step, batch by batch. Raises ModelError if there is no image."""
    if size == 0:
        raise ModelError("recovery needs at least one image")
    passes = -(-steps // -(-size // batch))
    return list(islice(batches(size, batch, passes, generator), steps))


def _faders(small: nn.Module, model: nn.Module, selection: Selection) -> dict[str, FadingBranch]:
    """Puts the dropped branches of the dense `model` back into `small` as `FadingBranch`. Returns these by name.

    Only branches that were dropped entirely fade, and only if the criterion asks for it.
    """
    faders = {}
    for name in [name for name, kept in selection.kept.items() if selection.fades and not len(kept)]:
        dense = copy.deepcopy(model.get_submodule(name)).eval().requires_grad_(True)
        faders[name] = FadingBranch(dense, small.get_submodule(name))
        put(small, name, faders[name])
    return faders


def _fade(small: nn.Module, faders: dict[str, FadingBranch], strength: float) -> None:
    for name, fader in list(faders.items()):
        fader.strength = strength
        if strength == 0:
            put(small, name, faders.pop(name).constant)
