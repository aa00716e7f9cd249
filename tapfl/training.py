"""Minibatches, optimisers and evaluation, and the training of the dense backbone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from tapfl.config import TrainOptions
from tapfl.errors import ModelError
from tapfl.progress import stage

Params = dict[str, Tensor]
Objective = Callable[[Any, object], Tensor]
"""(parameters, batch) -> loss; for a pair of parameters (`tapfl.adapters.lora.Pair`), both losses (2, …)."""


class InPieces(Protocol):
    """Inputs that need not be in memory at the same time."""

    def split(self, batch: int, /) -> Iterable[Any]:
        """Returns all inputs in order, in batches of size `batch`, as `Tensor.split` does."""
        ...


LOOK = 10  # steps between evaluations on held-out images
LARGEST = 1e6  # far above any trained weight or adapter; products of such values stay finite in float32
LOST = 10.0  # training has failed if the final mean loss is more than this multiple of the loss of guessing


def tensors_in(tree: Any) -> list[Tensor]:
    """Returns the tensors in nested containers, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def batches(size: int, batch: int, epochs: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields positions 0..size-1, reshuffled in each epoch, in batches of nearly equal size, at most `batch`."""
    count = -(-size // batch)
    for _ in range(epochs):
        yield from np.array_split(generator.permutation(size), count)


def local_batches(size: int, options: TrainOptions, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields the batches of a device's round: those of its `epochs`, or `steps` of them; see `batches`."""
    epochs = -(-options.steps // -(-size // options.batch)) if options.steps else options.epochs
    return islice(batches(size, options.batch, epochs, generator), local_steps(size, options))


def local_steps(size: int, options: TrainOptions) -> int:
    """Returns the number of batches in a device's round."""
    return options.steps or options.epochs * -(-size // options.batch)


def images_seen(size: int, options: TrainOptions) -> float:
    """Returns how many of `size` images pass through the model in a round, counting repetitions."""
    return options.steps * size / -(-size // options.batch) if options.steps else options.epochs * size


def is_evaluated(options: TrainOptions, round: int) -> bool:
    """Returns whether devices evaluate the result of `round` when they train in the next one (0: the initial model)."""
    return round % options.evaluate_every == 0


def rate_factor(options: TrainOptions, round: int) -> float:
    """Returns the factor of the learning rates in `round`, counted from 1: warm-up, then the schedule.

    In round t of the warm-up it is t / (warm-up + 1). Afterwards, let p in [0, 1) be the fraction of the remaining
    rounds that are over. Then it is 1 - p for `linear` and (1 + cos πp) / 2 for `cosine` (Loshchilov and Hutter 2017,
    arXiv 1608.03983, without restarts). Fine-tuning for the last evaluation, after the last round, has the factor of
    the last round.
    """
    if round <= (warm_up := options.warmup_rounds):
        return round / (warm_up + 1)
    over = (min(round, options.rounds) - warm_up - 1) / (options.rounds - warm_up)
    factors = {"constant": 1.0, "linear": 1 - over, "cosine": (1 + math.cos(math.pi * over)) / 2}
    return factors[options.schedule]


def optimizer(
    options: TrainOptions, params: list[Tensor], learning_rate: float, fused: bool = False
) -> torch.optim.Optimizer:
    """Returns a new optimiser of local training for leaf tensors. Each round has a new one, without earlier state.

    Fused Adam makes one call per tensor instead of a dozen, which saves 4-8 % of a step of a small model. Parameters
    and gradients must then have the same memory layout.
    """
    match options.optimizer:
        case "adam":
            return torch.optim.Adam(params, lr=learning_rate, fused=fused)
        case "adamw":
            return torch.optim.AdamW(params, lr=learning_rate, weight_decay=options.weight_decay, fused=fused)
        case "sgd":
            momentum, decay = options.momentum, options.weight_decay
            return torch.optim.SGD(params, lr=learning_rate, momentum=momentum, weight_decay=decay)


@torch.no_grad()
def predict(model: Callable[[Any], Tensor], inputs: Tensor | InPieces, batch: int = 256) -> Tensor:
    """Returns the logits (n, classes) of all inputs."""
    return torch.cat([model(part) for part in inputs.split(batch)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Returns the fraction of rows whose largest logit is that of the label."""
    return float((logits.argmax(1) == labels).double().mean())


def diverged(option: str, what: str, step: int, steps: int, sign: str) -> ModelError:
    """Returns the error that training diverged.

    Args:
        option: the learning rate to lower, as ``option = value``.
        what: the training that diverged.
        sign: how it was noticed.
    """
    return ModelError(f"{option}: {what} diverged at step {step} of {steps} ({sign}); accepted: a lower one")


def largest(tensors: Iterable[Tensor]) -> float:
    """Returns the largest absolute value in any of the tensors; NaN if one is NaN."""
    maxima = [tensor.detach().abs().max().double() for tensor in tensors if tensor.numel()]
    return float(torch.stack(maxima).max()) if maxima else 0.0  # waits for the GPU only once


def minimise(
    params: Sequence[Tensor],
    loss_of: Callable[[int, np.ndarray], Tensor],
    order: Iterable[np.ndarray],
    steps: int,
    learning_rate: float,
    names: tuple[str, str],
) -> None:
    """Trains leaf tensors in place, with one step of Adam for each batch.

    Args:
        loss_of: (step, counted from 0; positions of the batch) -> loss.
        order: positions of each batch, `steps` of them.
        names: the option of the learning rate, and the name of the training, for errors.

    Raises:
        ModelError: if a loss is not finite (it names the step), or a parameter exceeds LARGEST at the end.
    """
    adam, rate, what = torch.optim.Adam(params, lr=learning_rate), f"{names[0]} = {learning_rate:g}", names[1]
    for step, chosen in enumerate(order):
        loss = loss_of(step, chosen)
        if not torch.isfinite(loss):
            raise diverged(rate, what, step + 1, steps, f"its loss is {float(loss.detach())}")
        adam.zero_grad()
        loss.backward()
        adam.step()
    if not (reached := largest(params)) <= LARGEST:
        raise diverged(rate, what, steps, steps, f"its weights reach {reached:.3g}")


def apart(count: int, share: float, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions 0..count-1 split into those to train on and those to hold out, which are evenly spaced.

    Args:
        share: fraction to hold out; at least one image is held out.
        what: names the training in the error.

    Raises:
        ModelError: if there are fewer than two images.
    """
    if count < 2:
        raise ModelError(f"{what} needs at least two images, of which one is held out; there are {count}")
    number = min(max(round(count * share), 1), count - 1)
    held = (np.arange(number) + 1) * count // number - 1
    return np.setdiff1d(np.arange(count), held), held


class BestSoFar:
    """The weights of a model in training that had the smallest held-out error so far, including the initial weights.

    Args:
        error: returns the current error of the model on held-out images. A value that is not finite counts as worst.

    Attributes:
        first: error before training.
        least: smallest error so far.
    """

    def __init__(self, model: nn.Module, error: Callable[[], float]) -> None:
        self.model, self._error = model, torch.no_grad()(error)
        self.first = self.least = self._error()
        self._weights = copy.deepcopy(model.state_dict())

    def look(self) -> None:
        """Stores the model's current weights if their error is the smallest so far."""
        if (error := self._error()) < self.least:
            self.least, self._weights = error, copy.deepcopy(self.model.state_dict())

    def restore(self) -> None:
        """Loads the weights of the smallest error into the model."""
        self.model.load_state_dict(self._weights)


def train_dense(
    model: nn.Module,
    inputs: Callable[[np.ndarray], Tensor],
    labels: Tensor,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    generator: np.random.Generator,
    name: str = "training",
) -> None:
    """Trains all parameters of `model` in place with AdamW and a one-cycle learning rate, without data augmentation.

    Args:
        inputs: maps positions to inputs of the model, so that a large pool need not be in memory as floats.
        labels: (n,).
        name: of the stage that shows the progress and the mean loss of the current epoch.

    Raises:
        ModelError: if training diverges: a loss is not finite, or at the end, a weight exceeds LARGEST or the mean loss
            of the last epoch is more than LOST times that of guessing.
    """
    option = f"model.learning-rate = {learning_rate:g}"
    model.eval()  # without dropout and stochastic depth, the result depends only on data and seed
    params = list(model.requires_grad_(True).parameters())
    epoch_steps = -(-len(labels) // batch)
    steps = epochs * epoch_steps
    adam = torch.optim.AdamW(params, lr=learning_rate, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, learning_rate, total_steps=max(steps, 2))
    with stage(name) as advance:
        advance(0, steps)
        mean, guessing = 0.0, math.inf
        for step, chosen in enumerate(batches(len(labels), batch, epochs, generator)):
            logits = model(inputs(chosen))
            loss = F.cross_entropy(logits, labels[torch.from_numpy(chosen)])
            adam.zero_grad()
            loss.backward()
            adam.step()
            cycle.step()
            epoch, in_epoch = divmod(step, epoch_steps)
            mean += (float(loss.detach()) - mean) / (in_epoch + 1)
            if not math.isfinite(mean):
                raise diverged(option, name, step + 1, steps, f"its loss is {float(loss.detach())}")
            guessing = math.log(logits.shape[1])
            advance(step + 1, steps, f"epoch {epoch + 1} of {epochs}, loss {mean:.3f}")
    if not (reached := largest(params)) <= LARGEST:
        raise diverged(option, name, steps, steps, f"its weights reach {reached:.3g}")
    if mean > LOST * guessing:
        raise diverged(option, name, steps, steps, f"its loss is {mean:.3g}; that of guessing is {guessing:.3g}")
    model.requires_grad_(False)
