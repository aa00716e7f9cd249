"""Minibatches, optimisers and evaluation; and the training of the dense backbone."""

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
"""(parameters, batch) -> loss; of a pair of parameters (`tapfl.adapters.lora.Pair`) -> both losses (2, …)"""


class InPieces(Protocol):
    """Inputs that need not be in memory together."""

    def split(self, batch: int, /) -> Iterable[Any]:
        """Returns all of them in order, so many at a time, as `Tensor.split` does."""
        ...


LOOK = 10  # steps between looks at held-out images
LARGEST = 1e6  # far above any trained weight or adapter; products of such values stay finite in float32
LOST = 10.0  # times the loss of guessing: a mean loss beyond that at the end is no result of training


def tensors_in(tree: Any) -> list[Tensor]:
    """Returns the tensors in nested tuples and the like, in their order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def batches(size: int, batch: int, epochs: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields positions 0..size-1, shuffled anew each epoch, in batches of nearly equal size (at most `batch`)."""
    count = -(-size // batch)
    for _ in range(epochs):
        yield from np.array_split(generator.permutation(size), count)


def local_batches(size: int, options: TrainOptions, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields the batches of a device's round: of its `epochs`, or as many as its `steps`; see `batches`."""
    epochs = -(-options.steps // -(-size // options.batch)) if options.steps else options.epochs
    return islice(batches(size, options.batch, epochs, generator), local_steps(size, options))


def local_steps(size: int, options: TrainOptions) -> int:
    """Returns the number of batches of a device's round."""
    return options.steps or options.epochs * -(-size // options.batch)


def images_seen(size: int, options: TrainOptions) -> float:
    """Returns how many of `size` images pass through the model in a round, with repetition."""
    return options.steps * size / -(-size // options.batch) if options.steps else options.epochs * size


def is_evaluated(options: TrainOptions, round: int) -> bool:
    """Returns whether devices evaluate what `round` ended with when they train in the next one; 0: before the first."""
    return round % options.evaluate_every == 0


def rate_factor(options: TrainOptions, round: int) -> float:
    """Returns the factor of the learning rates in `round`, counted from 1: warm-up, then the schedule.

    Linear warm-up has t / (warm-up + 1) in round t. After it, with p in [0, 1) the share of the other rounds that is
    over, `linear` has 1 - p and `cosine` (1 + cos πp) / 2 (Loshchilov and Hutter 2017, arXiv 1608.03983, without
    restarts). A round after the last, in which models are fine-tuned to be evaluated, has the factor of the last.
    """
    if round <= (warm_up := options.warmup_rounds):
        return round / (warm_up + 1)
    over = (min(round, options.rounds) - warm_up - 1) / (options.rounds - warm_up)
    factors = {"constant": 1.0, "linear": 1 - over, "cosine": (1 + math.cos(math.pi * over)) / 2}
    return factors[options.schedule]


def optimizer(
    options: TrainOptions, params: list[Tensor], learning_rate: float, fused: bool = False
) -> torch.optim.Optimizer:
    """Returns the optimiser of local training over leaf tensors; a new one each round: no state is carried over.

    Fused Adam makes one call a tensor instead of a dozen, which saves 4-8 % of a step of a small model; parameters and
    gradients must then have the same memory layout.
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
    """Returns the share of rows whose largest logit is that of the label."""
    return float((logits.argmax(1) == labels).double().mean())


def diverged(option: str, what: str, step: int, steps: int, sign: str) -> ModelError:
    """Returns the error that training diverged: at which step, by which sign, and the learning rate to lower."""
    return ModelError(f"{option}: {what} diverged at step {step} of {steps} ({sign}); accepted: a lower one")


def largest(tensors: Iterable[Tensor]) -> float:
    """Returns the largest absolute value in any of the tensors; NaN if one is NaN."""
    found = [tensor.detach().abs().max().double() for tensor in tensors if tensor.numel()]
    return float(torch.stack(found).max()) if found else 0.0  # one wait for a device


def minimise(
    params: Sequence[Tensor],
    loss_of: Callable[[int, np.ndarray], Tensor],
    order: Iterable[np.ndarray],
    steps: int,
    learning_rate: float,
    said: tuple[str, str],
) -> None:
    """Trains leaf tensors in place, by a step of Adam for each batch.

    Args:
        loss_of: (step, from 0, and positions of the batch) -> loss.
        order: the batches, as many as `steps`.
        said: the option of the learning rate, and what is trained, for errors.

    Raises:
        ModelError: if a loss is not finite, saying at which step, or a parameter exceeds LARGEST at the end.
    """
    adam, rate, what = torch.optim.Adam(params, lr=learning_rate), f"{said[0]} = {learning_rate:g}", said[1]
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
    """Returns the positions 0..count-1 to train on, and those to judge by, evenly between them: a share, at least one.

    Raises:
        ModelError: if there are not two images, saying for `what`.
    """
    if count < 2:
        raise ModelError(f"{what} needs at least two images, one of them to judge by; there are {count}")
    number = min(max(round(count * share), 1), count - 1)
    held = (np.arange(number) + 1) * count // number - 1
    return np.setdiff1d(np.arange(count), held), held


class BestSoFar:
    """The weights of a model that is trained, at the least error on held-out images so far; those it began with count.

    Args:
        error: of the model as it is, on images that it is not trained on; not finite counts as the worst.

    Attributes:
        first, least: the error before training, and the least so far.
    """

    def __init__(self, model: nn.Module, error: Callable[[], float]) -> None:
        self.model, self._error = model, torch.no_grad()(error)
        self.first = self.least = self._error()
        self._weights = copy.deepcopy(model.state_dict())

    def look(self) -> None:
        """Keeps the model's weights if their error is less than the least."""
        if (error := self._error()) < self.least:
            self.least, self._weights = error, copy.deepcopy(self.model.state_dict())

    def restore(self) -> None:
        """Gives the model the weights of the least error."""
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
    """Trains all parameters of `model` in place with AdamW and one cycle of the learning rate, no data augmentation.

    Args:
        inputs: positions -> input of the model, so that a large pool need not be in memory as floats.
        labels: (n,).
        name: of the stage that shows the progress and the mean loss of the epoch so far.

    Raises:
        ModelError: if it diverges: a loss is not finite, or at the end a weight exceeds LARGEST or the mean loss of the
            last epoch is more than LOST times that of guessing.
    """
    option = f"model.learning-rate = {learning_rate:g}"
    model.eval()  # no dropout, no stochastic depth: the result is a function of data and seed
    params = list(model.requires_grad_(True).parameters())
    an_epoch = -(-len(labels) // batch)
    steps = epochs * an_epoch
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
            epoch, place = divmod(step, an_epoch)
            mean += (float(loss.detach()) - mean) / (place + 1)
            if not math.isfinite(mean):
                raise diverged(option, name, step + 1, steps, f"its loss is {float(loss.detach())}")
            guessing = math.log(logits.shape[1])
            advance(step + 1, steps, f"epoch {epoch + 1} of {epochs}, loss {mean:.3f}")
    if not (reached := largest(params)) <= LARGEST:
        raise diverged(option, name, steps, steps, f"its weights reach {reached:.3g}")
    if mean > LOST * guessing:
        raise diverged(option, name, steps, steps, f"its loss is {mean:.3g}; that of guessing is {guessing:.3g}")
    model.requires_grad_(False)
