"""A warm start: the global adapters of the first round, trained on the server by distillation from the dense model.

In each of a few rounds the server trains every device's part of the global adapters on public images, so that the
device's smaller model answers as the dense model does, and aggregates them by the rule of the federation: FedAvg
without devices. It uses no label, and nothing of a device beyond its plan and its metric set. As on the devices, a
tensor that the server does not send has its initial value, and is not trained.

Some of each device's images are held out. Of the adapters after each round, and of those without effect from before
the first, the ones with the least held-out loss are returned. The rounds end when that loss rises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from tapfl.adapters import rules
from tapfl.adapters.layout import Layout, Update, gather_all
from tapfl.adapters.lora import AdaptedModel
from tapfl.compute import HERE, Compute, home
from tapfl.config import AdapterOptions, PrivacyOptions
from tapfl.progress import stage
from tapfl.pruning.recovery import batch_order, soft_loss, teacher_logits
from tapfl.seeds import numpy_generator, torch_generator
from tapfl.training import Params, minimise

BATCH = 32  # images in a minibatch
HELD_OUT, MOST_HELD_OUT = 0.25, 256  # share of a device's images, and at most so many


@dataclass(frozen=True)
class Pupil:
    """A device as the server knows it.

    Attributes:
        device: its partition id.
        model: makes its smaller model, which is not kept from round to round.
        layout: of its adapters.
        weight: its training samples.
        classes: bool (C,), the classes of these, as in `tapfl.adapters.layout.Update`.
        images: positions of the public images that stand for its task, at least two.
    """

    device: int
    model: Callable[[], nn.Module]
    layout: Layout
    weight: float
    classes: Tensor | None
    images: np.ndarray


@dataclass(frozen=True)
class WarmStart:
    """The global adapters to begin with, and the mean held-out loss before the first round and after each."""

    params: Params
    losses: tuple[float, ...]


class Teacher:
    """The dense model's answers to public images.

    Args:
        inputs: positions of public images -> these in the backbone's input format.
        positions: of all images that will be asked for; each is answered once.
    """

    def __init__(self, model: nn.Module, inputs: Callable[[np.ndarray], Tensor], positions: np.ndarray) -> None:
        self.inputs, self._known = inputs, np.unique(positions)
        size = len(self._known)
        batches = np.array_split(np.arange(size), -(-size // BATCH))
        self._logits = teacher_logits(model, lambda batch: inputs(self._known[batch]), size, batches)

    def loss(self, model: Callable[[Tensor], Tensor], positions: np.ndarray) -> Tensor:
        """Returns the mean distillation loss of a model on these images."""
        known = torch.from_numpy(np.searchsorted(self._known, positions))
        return soft_loss(model(self.inputs(positions)), self._logits[known])


class Lesson:
    """The distillation of one device's adapters.

    Args:
        options: as in `warm_start`, and so are `initial` and `seed`.
    """

    def __init__(
        self, options: AdapterOptions, initial: Params, pupil: Pupil, seed: int, compute: Compute = HERE
    ) -> None:
        self.options, self.initial, self.pupil, self.seed, self.compute = options, initial, pupil, seed, compute
        drawn = numpy_generator(seed, "warm start", pupil.device).permutation(pupil.images)
        held_out = min(max(1, int(HELD_OUT * len(drawn))), MOST_HELD_OUT)
        self.images, self.held_out = drawn[held_out:], drawn[:held_out]
        self._sent = rules.down(options, pupil.layout)

    def order(self, round: int) -> list[np.ndarray]:
        """Returns the positions of the images of each step of a round."""
        generator = numpy_generator(self.seed, "warm start", self.pupil.device, round)
        return [self.images[i] for i in batch_order(len(self.images), BATCH, self.options.start_steps, generator)]

    @torch.no_grad()
    def loss(self, w: Params, teacher: Teacher) -> float:
        """Returns the held-out loss of the device with the global adapters `w`."""
        adapted, received = self._received(w)
        return float(teacher.loss(partial(adapted, received), self.held_out))

    def update(self, w: Params, teacher: Teacher, round: int) -> Update:
        """Returns the device's adapters after a round of training that begins with the global ones, `w`."""
        adapted, received = self._received(w)
        moving = self._sent.keys() & rules.trained(self.options, self.pupil.layout, round)
        params = {name: theta.clone().requires_grad_(name in moving) for name, theta in received.items()}
        minimise(
            [theta for theta in params.values() if theta.requires_grad],
            lambda step, batch: teacher.loss(partial(adapted, params), batch),
            self.order(round),
            self.options.start_steps,
            self.options.start_learning_rate,
            ("adapters.start-learning-rate", "the warm start"),
        )
        return Update(home(params), self.pupil.layout, self.pupil.weight, self.pupil.classes)

    def _received(self, w: Params) -> tuple[AdaptedModel, Params]:
        """Returns the device's model as a function of its adapters, and these when it has received `w`."""
        model, layout = self.pupil.model(), self.pupil.layout
        whole = rules.untrained(layout, self.initial, model) | gather_all(w, self._sent)
        return AdaptedModel(self.compute.put(model), layout, self.options.scale), self.compute.put(whole)


def warm_start(
    options: AdapterOptions,
    initial: Params,
    pupils: Sequence[Pupil],
    inputs: Callable[[np.ndarray], Tensor],
    dense: nn.Module,
    seed: int,
    compute: Compute = HERE,
) -> WarmStart:
    """Returns the adapters to begin with, a function of the arguments alone.

    Args:
        options: the rule, the head and `start-*`. Robust means, clipping and the server's optimiser are for what
            devices upload, and are not applied.
        initial: the global adapters without effect.
        pupils: the devices, in order of partition ids.
        inputs: positions of public images -> these in the backbone's input format, where `compute` is.
        dense: the teacher, likewise.

    Raises:
        ModelError: if training diverges.
    """
    options = options.model_copy(update={"combine": "mean", "clip": 0.0, "server": "none"})
    lessons = [Lesson(options, initial, pupil, seed, compute) for pupil in pupils]
    rounds = range(1, options.start_rounds + 1)
    asked = [lesson.held_out for lesson in lessons]
    asked += [batch for lesson in lessons for t in rounds for batch in lesson.order(t)]
    teacher, weights = Teacher(dense, inputs, np.concatenate(asked)), [pupil.weight for pupil in pupils]

    def loss(w: Params) -> float:
        return float(np.average([lesson.loss(w, teacher) for lesson in lessons], weights=weights))

    w, losses = initial, [loss(initial)]
    with stage("warm start") as advance:
        advance(0, len(rounds), f"held-out loss {losses[0]:.3f}")
        for t in rounds:
            updates = [lesson.update(w, teacher, t) for lesson in lessons]
            generator = torch_generator(seed, "warm start", t)
            state = rules.aggregate(options, PrivacyOptions(), rules.ServerState(w), updates, initial, t, generator)
            losses.append(loss(state.params))
            advance(t, len(rounds), f"held-out loss {losses[-1]:.3f}")
            if not losses[-1] < losses[-2]:
                break
            w = state.params
    return WarmStart(w, tuple(losses))
