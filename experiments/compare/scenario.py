"""What the cells of a comparison share: data, backbone and public pool, and one device with its test images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from strategies.round_zero import PublicPool, describe_pool, pool_of, task_images
from tapfl.compute import Compute
from tapfl.config import MetricOptions, PruningOptions, RunConfig
from tapfl.data.federated import DeviceSplit, check_classes, kept_partition, open_pool, open_private
from tapfl.data.images import ImageSet
from tapfl.data.transform import Transform
from tapfl.models.backbone import BackboneSpec
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.models.forward import image_features, input_transform
from tapfl.pruning.basis import in_basis, turned_on_pool
from tapfl.pruning.budget import Budget
from tapfl.pruning.criteria.criterion import PruningTask
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.pipeline import FineTuneSet, fine_tune_set, labels_of, pruning_task
from tapfl.seeds import numpy_generator
from tapfl.store import cache_folder
from tapfl.summary.metric_set import cached_features
from tapfl.summary.mixture import GaussianSummary, device_mixture
from tapfl.training import accuracy, predict


@dataclass(frozen=True)
class Scenario:
    """Data, public pool and dense backbone, which all cells of one seed share."""

    config: RunConfig
    pool: PublicPool
    private: ImageSet
    splits: list[DeviceSplit]
    spec: BackboneSpec
    model: nn.Module
    compute: Compute

    @classmethod
    def of(cls, config: RunConfig) -> Scenario:
        cache, transform = cache_folder(config.cache), input_transform(config.model)
        images = open_pool(config.data, transform, config.seed, cache)
        private = open_private(config.data, transform, config.seed, cache)
        check_classes(config.data, images, private)
        splits = kept_partition(private, config.data, config.devices.count, config.seed, cache)
        compute = Compute.of(config.compute)
        _, spec, model = dense_backbone(config.model, images, config.seed, DenseCache(cache), compute)
        pool = describe_pool(config, images, model, compute)
        return cls(config, pool, private, splits, spec, compute.put(model), compute)

    def lacking(self, device: int, share: float) -> Scenario:
        """Returns the scenario with a pool that has no images of a share of the device's classes.

        The pool is described anew; the dense backbone is the same.
        """
        if not share:
            return self
        classes, images = np.unique(self.private.labels[self.splits[device].train]), self.pool.images
        gone = classes_that_lack(classes, share, self.config.seed, device)
        stay = np.flatnonzero(~np.isin(images.labels, gone))
        cache = cache_folder(self.config.cache)
        features = cached_features(self.model, self.spec, images, self.transform, cache, self.compute)
        return replace(self, pool=pool_of(self.config, images.subset(stay), features[stay]))

    @property
    def transform(self) -> Transform:
        return input_transform(self.config.model)

    @cached_property
    def turned(self) -> nn.Module:
        """The backbone in the canonical basis of its heads, computed from the whole pool: the same for all devices."""
        return turned_on_pool(self.model, self.pool.images, self.transform, self.config.seed)


@dataclass(frozen=True)
class DeviceView:
    """One device of a scenario: its mixture, its test images, and the accuracy of the dense model on them."""

    scenario: Scenario
    device: int
    summary: GaussianSummary
    train: ImageSet
    inputs: Tensor
    labels: Tensor
    classes: Tensor
    dense: tuple[float, float]

    @classmethod
    def of(cls, scenario: Scenario, device: int) -> DeviceView:
        config, split, transform = scenario.config, scenario.splits[device], scenario.transform
        mine, test = scenario.private.subset(split.train), scenario.private.subset(split.test)
        with scenario.compute.forward():
            points = scenario.pool.projection(image_features(scenario.model, transform.batches(mine)))
        summary = device_mixture(points, config.summary, config.seed, device)
        put = scenario.compute.put
        inputs, labels = put(transform(test.read())), put(torch.from_numpy(test.labels))
        classes = torch.from_numpy(np.unique(mine.labels))
        dense = score(scenario.model, inputs, labels, classes)
        return cls(scenario, device, summary, mine, inputs, labels, classes, dense)

    def public_images(self, options: MetricOptions, size: int, instead: str = "") -> ImageSet:
        """Returns the metric set: the `size` images that represent the device's task, best first; see `task_images`.

        Args:
            instead: ``oracle`` draws them evenly from the device's own training images, at most as many as it has;
                ``shared`` draws them from the whole pool, the same for every device.
        """
        seed, pool = self.scenario.config.seed, self.scenario.pool
        if instead == "oracle":
            count = min(size, len(self.train))  # a rest that fills no batch is no use to scores
            drawn = numpy_generator(seed, "metric", self.device).permutation(len(self.train))
            return self.train.subset(drawn[:count])
        summary = None if instead == "shared" else self.summary
        return pool.images.subset(task_images(pool, summary, options, seed, self.device, size))

    def coverage(self, images: ImageSet) -> tuple[float, float]:
        """Returns the share of `images` of the device's classes, and the share of these classes that they cover."""
        return float(np.isin(images.labels, self.classes).mean()), float(np.isin(self.classes, images.labels).mean())

    def task(self, images: ImageSet, budget: Budget, options: PruningOptions, batch: int) -> PruningTask:
        """Returns the input of every criterion."""
        scenario = self.scenario
        model = in_basis(scenario.model, resolved(options).basis, lambda: scenario.turned)
        compute = scenario.compute
        inputs, labels = compute.put(scenario.transform(images.read())), compute.put(labels_of(images, options))
        task = pruning_task(model, inputs, budget, options, batch, labels, scenario.config.seed)
        return replace(task, at_once=compute.at_once, passing=compute.forward)

    def fine_tune_set(self, metric: MetricOptions, options: PruningOptions, instead: str = "") -> FineTuneSet | None:
        """Returns the images of recovery, or None where they are the metric set."""
        return fine_tune_set(lambda size: self.public_images(metric, size, instead), self.scenario.transform, options)


def classes_that_lack(classes: np.ndarray, share: float, seed: int, device: int) -> np.ndarray:
    """Returns the classes to remove from a device's pool: a share of its own classes, rounded, int64.

    They are drawn for each device. A larger share removes the classes of a smaller one, and more.
    """
    drawn: np.ndarray = numpy_generator(seed, "pool-lacks", device).permutation(classes)
    return drawn[: round(share * len(classes))]


def score(model: nn.Module, inputs: Tensor, labels: Tensor, classes: Tensor) -> tuple[float, float]:
    """Returns the accuracy among all classes, and among the device's own classes only."""
    logits = predict(model, inputs)
    own = torch.full_like(logits, -torch.inf)
    own[:, classes] = logits[:, classes]
    return accuracy(logits, labels), accuracy(own, labels)
