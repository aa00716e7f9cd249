"""Warm start: trains the global adapters on the server, before the first round, by distillation from the dense model.

For a few rounds, the server does what the devices do in federated training. It trains every device's part of the global
adapters on public images, so that the device's pruned model predicts what the dense model predicts, and aggregates the
adapters by the rule of the federation. It uses no labels, and of a device only the plan and the metric set. As on the
devices, a tensor that the server does not send keeps its initial value and is not trained.

Some of the images of each device are held out. The rounds end when the held-out loss does not fall any more. The
adapters with the smallest held-out loss are returned, which may be the initial ones.
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
from tapfl.seeds import numpy_generator
from tapfl.training import Params, minimise

BATCH = 32  # images in a minibatch
HELD_OUT, MOST_HELD_OUT = 0.25, 256  # fraction of a device's images that is held out, and the largest number of them


@dataclass(frozen=True)
class Pupil:
    """What the server knows of a device.

    Attributes:
        device: its partition id.
        model: builds its pruned model, which is not kept between rounds.
        layout: of its adapters.
        weight: number of its training samples.
        classes: as in `tapfl.adapters.layout.Update`.
        images: positions of the public images that represent its task, at least two.
    """

    device: int
    model: Callable[[], nn.Module]
    layout: Layout
    weight: float
    classes: Tensor | None
    images: np.ndarray


@dataclass(frozen=True)
class WarmStart:
    """The global adapters to start from, and the mean held-out loss before the first round and after each round."""

    params: Params
    losses: tuple[float, ...]


class Teacher:
    """The dense model's logits of public images.

    Args:
        inputs: maps positions of public images to the images in the backbone's input format.
        positions: positions of all images that `loss` will be called with; their logits are computed once.
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
        options, initial, seed: as for `warm_start`.
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
        """Returns the positions of the images of each step in a round."""
        generator = numpy_generator(self.seed, "warm start", self.pupil.device, round)
        return [self.images[i] for i in batch_order(len(self.images), BATCH, self.options.start_steps, generator)]

    @torch.no_grad()
    def loss(self, w: Params, teacher: Teacher) -> float:
        """Returns the held-out loss of the device with the global adapters `w`."""
        adapted, received = self._received(w)
        return float(teacher.loss(partial(adapted, received), self.held_out))

    def update(self, w: Params, teacher: Teacher, round: int) -> Update:
        """Returns the device's adapters after a round of training that starts from the global adapters `w`."""
        adapted, received = self._received(w)
        trained = self._sent.keys() & rules.trained(self.options, self.pupil.layout, round)
        params = {name: theta.clone().requires_grad_(name in trained) for name, theta in received.items()}
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
        """Returns the device's model as a function of its adapters, and its adapters after it has received `w`."""
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
    """Returns the adapters to start from. They depend only on the arguments.

    Args:
        options: the rule, the head and `start-*`. Robust means, clipping and the server's optimiser are meant for
            uploads of devices and are not applied.
        initial: the initial global adapters, whose product is 0.
        pupils: the devices, in order of partition ids.
        inputs: maps positions of public images to the images in the backbone's input format, where `compute` is.
        dense: the teacher, on the same device.

    Raises:
        ModelError: if training diverges.
    """
    options = options.model_copy(update={"combine": "mean", "clip": 0.0, "server": "none"})
    lessons = [Lesson(options, initial, pupil, seed, compute) for pupil in pupils]
    rounds = range(1, options.start_rounds + 1)
    used = [lesson.held_out for lesson in lessons]
    used += [batch for lesson in lessons for t in rounds for batch in lesson.order(t)]
    teacher, weights = Teacher(dense, inputs, np.concatenate(used)), [pupil.weight for pupil in pupils]

    def loss(w: Params) -> float:
        return float(np.average([lesson.loss(w, teacher) for lesson in lessons], weights=weights))

    w, losses = initial, [loss(initial)]
    with stage("warm start") as advance:
        advance(0, len(rounds), f"held-out loss {losses[0]:.3f}")
        for t in rounds:
            updates = [lesson.update(w, teacher, t) for lesson in lessons]
            generator = numpy_generator(seed, "warm start", t)
            state = rules.aggregate(options, PrivacyOptions(), rules.ServerState(w), updates, initial, t, generator)
            losses.append(loss(state.params))
            advance(t, len(rounds), f"held-out loss {losses[-1]:.3f}")
            if not losses[-1] < losses[-2]:
                break
            w = state.params
    return WarmStart(w, tuple(losses))
