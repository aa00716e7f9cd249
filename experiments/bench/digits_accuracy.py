"""Whether a device and a precision cost accuracy: a ViT of the digits, cut by `tap` and trained for two rounds.

It needs neither Flower nor Ray nor a network; scikit-learn has the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from experiments.bench.local_training import DIGITS, METHODS, RATE, model_of, with_adapters
from tapfl.compute import Compute
from tapfl.config import PruningOptions, TrainOptions
from tapfl.personalize.together import LocalTask
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.seeds import numpy_generator
from tapfl.training import Params, accuracy, batches, predict, train_dense

TRAINED, METRIC, EPOCHS, ROUNDS, BATCH = 1200, 256, 8, 2, 32


def digits() -> tuple[Tensor, Tensor]:
    """Returns images (n, 1, 8, 8) and labels, in an order that mixes the writers."""
    found, order = load_digits(), numpy_generator(0, "digits").permutation(1797)
    return torch.from_numpy(found.images[order]).float()[:, None] / 8 - 1, torch.from_numpy(found.target[order]).long()


def trained(inputs: Tensor, labels: Tensor) -> nn.Module:
    """Returns the dense model, trained on the CPU."""
    model, order = model_of(DIGITS), numpy_generator(0, "dense")
    options = {"epochs": EPOCHS, "batch": BATCH, "learning_rate": 1e-3}
    train_dense(model, lambda index: inputs[torch.from_numpy(index)], labels, generator=order, **options)  # type: ignore[arg-type]
    return model


def accuracies(dense: nn.Module, inputs: Tensor, labels: Tensor, compute: Compute) -> Iterator[tuple[str, float]]:
    """Yields the accuracy on images that nothing was trained on: of the smaller model, and after each round."""
    given = compute.put(dense), compute.put(inputs[:METRIC])
    task = pruning_task(*given, 0.5, PruningOptions(criterion="tap"), 64)
    made = prune_model(replace(task, at_once=compute.at_once, passing=compute.forward), DIGITS)
    adapted, params = with_adapters(dense, made, compute)
    x, y = compute.put(inputs), compute.put(labels)

    def measured(params: Params) -> float:
        with compute.forward():
            return accuracy(predict(lambda images: adapted(params, images), x[TRAINED:]), y[TRAINED:])

    yield "after the cut", measured(params)
    for round in range(1, ROUNDS + 1):
        order = [torch.from_numpy(index) for index in batches(TRAINED, BATCH, 1, numpy_generator(0, "train", round))]
        train = TrainOptions(batch=BATCH, steps=len(order), learning_rate=RATE)
        data = ((x[index], y[index]) for index in order)
        own = LocalTask(METHODS["fedavg"], adapted, params, None, data, train, frozenset(params), 0)
        params = own.alone().upload or {}
        yield f"after round {round}", measured(params)
