"""Local rounds of one device, or of several devices that step together as one stack.

A step of K devices together takes as many calls as a step of one device, and calls dominate the time of a small model.
A method whose operations are elementwise, or products of one device's factors, gives the same results for a stack as
for each device (`Method.together`), except for rounding. Which devices step together must therefore depend only on a
run's options and plans.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tapfl.adapters.lora import AdaptedModel
from tapfl.adapters.stacked_model import StackedModel
from tapfl.compute import Recorder, home
from tapfl.config import TrainOptions
from tapfl.errors import ModelError
from tapfl.personalize.label_prior import informed
from tapfl.personalize.method import LocalResult, Method, Personal, checked, local_round, step_of
from tapfl.training import Params

Batch = tuple[Tensor, Tensor]  # images and labels


@dataclass(frozen=True, eq=False)
class LocalTask:
    """A round of one device that has not been computed yet: the arguments of `local_round`, and the device's model.

    Attributes:
        batches: images in the model's input format, and labels; they can be read only once.
        train: training options, with the learning rate and the `steps` of this round.
        device: number of the device, for messages.
        prior: log p(y), which the model adds to its logits (`tapfl.personalize.label_prior`).
        recorder: records the steps.
    """

    method: Method[Any]
    model: AdaptedModel
    received: Params
    personal: Personal | None
    batches: Iterable[Batch]
    train: TrainOptions
    trained: frozenset[str]
    device: int
    prior: Tensor | None = None
    recorder: Recorder | None = None

    def alone(self) -> LocalResult:
        """Returns the result, computed without other devices. Raises ModelError if training diverges."""

        def objective(params: Any, batch: Any) -> Tensor:
            x, y = batch

            def loss(logits: Tensor) -> Tensor:
                return F.cross_entropy(informed(logits, self.prior), y, label_smoothing=self.train.label_smoothing)

            return self.model.losses(params, x, loss)

        args = self.method, objective, self.received, self.personal, self.batches, self.train, self.trained
        return local_round(*args, self.recorder)


Outcome = LocalResult | Exception
R = TypeVar("R")
Say = Callable[[str], object]
Training = Generator[LocalTask, LocalResult, R]
"""A device's work as a generator: it yields local rounds, receives their results, and returns R."""


def ignored(line: str) -> None:
    pass


def carried_out(devices: Sequence[Training[R]], say: Say = ignored) -> list[R | Exception]:
    """Returns what each device's work returns or raises. Local rounds that wait at the same time are computed together.

    Args:
        say: called with a line of text if devices cannot step together, with the reason.
    """
    results: dict[int, R | Exception] = {}
    waiting: dict[int, LocalTask] = {}

    def advance(i: int, outcome: Outcome | None) -> None:
        waiting.pop(i, None)
        try:
            if isinstance(outcome, Exception):
                waiting[i] = devices[i].throw(outcome)
            else:
                waiting[i] = devices[i].send(outcome)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            results[i] = end.value
        except Exception as error:
            results[i] = error

    for i in range(len(devices)):
        advance(i, None)
    while waiting:
        members = list(waiting)
        for i, outcome in zip(members, all_of([waiting[i] for i in members], say), strict=True):
            advance(i, outcome)
    return [results[i] for i in range(len(devices))]


def all_of(tasks: Sequence[LocalTask], say: Say = ignored) -> list[Outcome]:
    """Returns the result of each task, or its error. The tasks are computed together if possible."""
    if len(tasks) > 1:
        try:
            model = stacked(tasks)
        except ModelError as error:
            say(f"devices {', '.join(str(task.device) for task in tasks)} are trained one by one: {error}")
        else:
            return together(tasks, model)
    outcomes: list[Outcome] = []
    for task in tasks:
        try:
            outcomes.append(task.alone())
        except Exception as error:
            outcomes.append(error)
    return outcomes


def stacked(tasks: Sequence[LocalTask]) -> StackedModel:
    """Returns the models of all tasks as one model.

    Raises:
        ModelError: if the tasks have to be computed one by one.
    """
    first = tasks[0]
    if not all(task.method.together and vars(task.method) == vars(first.method) for task in tasks):
        raise ModelError("their method cannot train devices together")
    new = [task.device for task in tasks if task.personal is None]
    if 0 < len(new) < len(tasks):
        raise ModelError(f"device {new[0]} has no private model of an earlier round, but others do")
    if any(task.personal and task.personal.alpha.dim() for task in tasks):
        raise ModelError("each layer has an α of its own")
    return StackedModel([task.model for task in tasks])


def together(tasks: Sequence[LocalTask], model: StackedModel) -> list[Outcome]:
    """Returns the results of tasks with the same method, computed as one stack.

    The result of a device is taken after its last step. Its slice then continues with the device's last batch until all
    devices are done, and is ignored. So is the slice of a device whose batches cannot be read.
    """
    method, stacking = tasks[0].method, model.stacking
    train = tasks[0].train.model_copy(update={"steps": max(task.train.steps for task in tasks)})
    priors = [task.prior for task in tasks if task.prior is not None]
    received = stacking.up([task.received for task in tasks])
    state = method.init(received, _stacked(tasks, model), train, frozenset().union(*(task.trained for task in tasks)))

    def objective(params: Any, batch: Any) -> Tensor:
        x, y, weights = batch
        prior = torch.stack(priors).repeat_interleave(weights.shape[1], 0) if priors else None

        def loss(logits: Tensor) -> Tensor:
            logits = informed(logits, prior)
            losses = F.cross_entropy(logits, y, reduction="none", label_smoothing=train.label_smoothing)
            return (losses.view(weights.shape) * weights).sum(1)

        return model.losses(params, x, loss)

    step = step_of(method, state, objective, train, tasks[0].recorder)
    sources = [iter(task.batches) for task in tasks]
    failed: dict[int, Exception] = {}

    def following() -> list[Batch | None]:
        batches: list[Batch | None] = [None] * len(tasks)
        for i, source in enumerate(sources):
            try:
                batches[i] = next(source, None)
            except Exception as error:
                failed[i] = error
        return batches

    batches = following()
    ended: dict[int, tuple[Params | None, Personal | None, int]] = {}
    losses: list[Tensor] = []
    while len(ended) + len(failed) < len(tasks):
        some = next(batch for batch in batches if batch)  # in place of a device's first batch that cannot be read
        losses.append(step(_concatenated([batch or some for batch in batches])).detach())
        now = following()
        if done := [i for i, batch in enumerate(now) if not (batch or i in ended or i in failed)]:
            upload, kept = method.final(state)
            for i in done:
                ended[i] = (upload and stacking.down(upload, i), kept and _own(kept, model, i), len(losses))
        batches = [batch or last for batch, last in zip(now, batches, strict=True)]
    if not losses:
        return [failed[i] for i in range(len(tasks))]
    by_device = home(torch.stack(losses, 1))
    return [
        failed[i] if i in failed else _outcome(task, *ended[i][:2], by_device[i, : ended[i][2]])
        for i, task in enumerate(tasks)
    ]


def _outcome(task: LocalTask, upload: Params | None, personal: Personal | None, losses: Tensor) -> Outcome:
    try:
        return checked(task.method, task.train, upload, personal, losses)
    except ModelError as error:
        return error


def _stacked(tasks: Sequence[LocalTask], model: StackedModel) -> Personal | None:
    kept = [task.personal for task in tasks if task.personal]
    if not kept:
        return None
    alpha = torch.stack([personal.alpha for personal in kept])[:, None]
    return Personal(model.stacking.up([personal.params for personal in kept]), alpha)


def _own(personal: Personal, model: StackedModel, i: int) -> Personal:
    alpha = personal.alpha if personal.alpha.dim() == 0 else personal.alpha[i, 0].clone()
    return replace(personal, params=model.stacking.down(personal.params, i), alpha=alpha)


def _concatenated(batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns images (K · n, …) and labels (K · n,) of all devices, and the images' weights (K, n) in the losses.

    Smaller batches are padded with zero images, whose weight is 0.
    """
    most = max(len(y) for _, y in batches)
    images = [F.pad(x, (0, 0) * (x.dim() - 1) + (0, most - len(x))) for x, _ in batches]
    labels = [F.pad(y, (0, most - len(y))) for _, y in batches]
    weights = [F.pad(x.new_full((len(y),), 1 / len(y)), (0, most - len(y))) for x, y in batches]
    return torch.cat(images), torch.cat(labels), torch.stack(weights)
