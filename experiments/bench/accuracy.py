"""Accuracy by processor and precision: backbones that are pruned with `tap` and trained for two rounds.

The problems are a ViT on scikit-learn's digits and, if weights and images are available, a backbone with these weights
on devices that have a few classes each. Neither Flower nor Ray nor a network is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from experiments.bench.local_training import DIGITS, Device, model_of, with_adapters
from tapfl.compute import Compute
from tapfl.config import PruningOptions
from tapfl.data.sources import load_images
from tapfl.models.backbone import BackboneSpec
from tapfl.models.forward import image_features, transform_of
from tapfl.models.new_head import fill_with_prototypes
from tapfl.models.weights import load_weights
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.seeds import numpy_generator
from tapfl.training import Params, accuracy, predict, train_dense

EPOCHS, ROUNDS, BATCH = 8, 2, 32


@dataclass(frozen=True)
class Problem:
    """A dense model, and images with labels.

    Attributes:
        inputs: the images, in the model's input format.
        train: number of training images, the first ones; the others are test images.
        metric: size of the metric set, the first images.
        prototypes: whether the heads of the dense and the pruned model are prototypes of the training images.
    """

    dense: nn.Module
    spec: BackboneSpec
    inputs: Tensor
    labels: Tensor
    train: int
    metric: int
    prototypes: bool = False

    def with_prototypes(self, model: nn.Module, inputs: Tensor) -> nn.Module:
        """Returns the model with prototypes of the training images, the first of `inputs`, as its head."""
        features = image_features(model, inputs[: self.train].split(64))
        return fill_with_prototypes(model, features, self.labels[: self.train].numpy())


def digits() -> Problem:
    """Returns the digits, in an order that mixes the writers, with a model that was trained on the CPU."""
    found, order = load_digits(), numpy_generator(0, "digits").permutation(1797)
    inputs = torch.from_numpy(found.images[order]).float()[:, None] / 8 - 1
    made = Problem(model_of(DIGITS), DIGITS, inputs, torch.from_numpy(found.target[order]).long(), 1200, 256)
    options = {"epochs": EPOCHS, "batch": BATCH, "learning_rate": 1e-3, "generator": numpy_generator(0, "dense")}
    labels = made.labels[: made.train]
    train_dense(made.dense, lambda index: inputs[torch.from_numpy(index)], labels, **options)  # type: ignore[arg-type]
    return made


def pictures(
    source: str, weights: Path, spec: BackboneSpec, devices: int = 3, images: int = 40, cache: Path | None = None
) -> Iterator[Problem]:
    """Yields a problem for each device, which has its own `spec.num_classes` classes of the source.

    Each class has `images` images; three quarters of them are training images.
    """
    everything = load_images(source, transform_of(model_of(spec)), cache)
    for i in range(devices):
        order = numpy_generator(0, "pictures", i).permutation(len(everything))
        own = everything.labels[order] - i * spec.num_classes
        by_class = [order[own == label][:images] for label in range(spec.num_classes)]
        chosen = np.stack(by_class, 1).flatten()  # the classes alternate, so that the first images have all of them
        labels = torch.arange(spec.num_classes).repeat(len(by_class[0]))
        dense, train = model_of(spec), len(chosen) * 3 // 4
        load_weights(dense, weights, everything.classes, None)
        inputs = transform_of(dense)(everything.subset(chosen).read())
        made = Problem(dense, spec, inputs, labels, train, min(96, train), prototypes=True)
        yield replace(made, dense=made.with_prototypes(dense, inputs))


def accuracies(problem: Problem, compute: Compute) -> Iterator[tuple[str, float]]:
    """Yields the accuracy of the pruned model on the test images: without training, and after each round."""
    dense, metric_set = compute.put(problem.dense), compute.put(problem.inputs[: problem.metric])
    task = pruning_task(dense, metric_set, 0.5, PruningOptions(criterion="tap"), min(64, problem.metric))
    made = prune_model(replace(task, compute=compute), problem.spec)
    adapted, params = with_adapters(problem.dense, made, compute)
    x, y, train = compute.put(problem.inputs), compute.put(problem.labels), problem.train
    if problem.prototypes:
        own = problem.with_prototypes(compute.put(made.model), x)
        params |= {name: theta.detach() for name, theta in own.named_parameters() if name in params}

    def measured(params: Params) -> float:
        with compute.forward():
            return accuracy(predict(lambda images: adapted(params, images), x[train:]), y[train:])

    yield "after the cut", measured(params)
    device = Device(adapted, params, x[:train], y[:train])
    for round in range(1, ROUNDS + 1):
        device = replace(device, start=replace(device, seed=round).round("fedavg", BATCH))
        yield f"after round {round}", measured(device.start)
