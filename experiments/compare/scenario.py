"""What cells of a comparison share: data, backbone and public pool, and the view of one device with its test images."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from strategies.round_zero import PublicPool, describe_pool, pool_of, task_images
from tapfl.compute import Compute
from tapfl.config import NEW_HEADS, MetricOptions, PruningOptions, RunConfig
from tapfl.data.federated import DeviceSplit, check_pool, kept_partition, labels_among, open_pool, open_private
from tapfl.data.images import ImageSet
from tapfl.data.transform import Transform
from tapfl.errors import ConfigError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.models.forward import image_features, input_transform
from tapfl.models.new_head import agreed_classes, fill_with_prototypes, with_new_head
from tapfl.pruning.basis import in_basis, turned_on_pool
from tapfl.pruning.budget import Budget
from tapfl.pruning.criteria.criterion import PruningTask
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.pipeline import pruning_task
from tapfl.pruning.recovery import FineTuneSet, fine_tune_set, labels_of
from tapfl.seeds import numpy_generator
from tapfl.store import cache_folder
from tapfl.summary.metric_set import cached_features
from tapfl.summary.mixture import GaussianSummary, device_mixture
from tapfl.training import predict


@dataclass(frozen=True)
class Scenario:
    """Data, public pool and dense backbone, which all cells of one seed share.

    With a new head (`tapfl.models.new_head`), the private labels are positions in its classes, the devices' classes.
    """

    config: RunConfig
    pool: PublicPool
    private: ImageSet
    splits: list[DeviceSplit]
    spec: BackboneSpec
    model: nn.Module
    compute: Compute
    new_head: nn.Module | None = None  # the backbone with the devices' classifier, if that is different

    @classmethod
    def of(cls, config: RunConfig) -> Scenario:
        cache, transform = cache_folder(config.cache), input_transform(config.model)
        images = open_pool(config.data, transform, config.seed, cache)
        private = open_private(config.data, transform, config.seed, cache)
        check_pool(config.data, images, private, other_classes=config.model.head in NEW_HEADS)
        splits = kept_partition(private, config.data, config.devices.count, config.seed, cache)
        compute = Compute.of(config.compute)
        old = dense_backbone(config.model, images, config.seed, DenseCache(cache), compute)
        (_, spec, model), new_head = old, None
        pool = describe_pool(config, images, model, compute)
        if config.model.head in NEW_HEADS:
            classes = agreed_classes(private.subset(split.train).held for split in splits)
            labels = labels_among(classes, private, config.data.source, other_classes=True)
            private = replace(private, labels=labels, classes=classes)
            _, spec, new_head = with_new_head(config.model, old, classes, DenseCache(cache))
            new_head = compute.put(new_head)
        return cls(config, pool, private, splits, spec, compute.put(model), compute, new_head)

    def lacking(self, device: int, share: float) -> Scenario:
        """Returns the scenario with a pool from which the images of a share of the device's classes are removed.

        Descriptors and mixture of the pool are computed again; the dense backbone is the same.

        Raises:
            ConfigError: if the pool has no images of these classes anyway.
        """
        if not share:
            return self
        classes, images = np.unique(self.private.labels[self.splits[device].train]), self.pool.images
        gone = classes_that_lack(classes, share, self.config.seed, device)
        names = {self.private.classes[label] for label in gone}
        if names and not names & set(images.classes):
            raise ConfigError(f"pool-lacks = {share}: the public pool has none of the devices' classes; accepted: 0")
        stay = np.flatnonzero(~_among(names, images))
        cache = cache_folder(self.config.cache)
        features = cached_features(self.model, self.spec, images, self.transform, cache, self.compute)
        return replace(self, pool=pool_of(self.config, images.subset(stay), features[stay]))

    @property
    def transform(self) -> Transform:
        return input_transform(self.config.model)

    @cached_property
    def turned(self) -> nn.Module:
        """The backbone in the canonical basis, computed on the whole pool, so that it is the same for all devices."""
        return turned_on_pool(self.model, self.pool.images, self.transform, self.config.seed)


@dataclass(frozen=True)
class DeviceView:
    """One device of a scenario: its mixture and its test images."""

    scenario: Scenario
    device: int
    summary: GaussianSummary
    train: ImageSet
    inputs: Tensor
    labels: Tensor
    classes: Tensor

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
        return cls(scenario, device, summary, mine, inputs, labels, classes)

    @cached_property
    def dense(self) -> tuple[float, float]:
        """The accuracies of the dense model on the test images."""
        dense = self.own(self.scenario.new_head or self.scenario.model)
        return shares(hits(dense, self.inputs, self.labels, self.classes))

    def own(self, model: nn.Module) -> nn.Module:
        """Returns a model, pruned or dense, as this device uses it before any training."""
        if self.scenario.config.model.head != "prototypes":
            return model
        features = image_features(model, self.scenario.transform.batches(self.train))
        return fill_with_prototypes(model, features, self.train.labels)

    def public_images(self, options: MetricOptions, size: int, oracle: bool = False) -> ImageSet:
        """Returns the metric set: `size` images chosen for the device, the best first; see `task_images`.

        Args:
            oracle: draw them at random from the device's own training images, at most as many as it has.
        """
        seed, pool = self.scenario.config.seed, self.scenario.pool
        if oracle:
            count = min(size, len(self.train))  # scores ignore a rest that fills no batch
            drawn = numpy_generator(seed, "metric", self.device).permutation(len(self.train))
            return self.train.subset(drawn[:count])
        return pool.images.subset(task_images(pool, self.summary, options, seed, self.device, size))

    def coverage(self, images: ImageSet) -> tuple[float | str, float | str]:
        """Returns the share of `images` in the device's classes, and the share of these classes that they cover.

        Both are empty if `images` have no labels.
        """
        own = set(self.train.held)
        if not images.classes:
            return "", ""
        return float(_among(own, images).mean()), len(own & set(images.held)) / len(own)

    def task(self, images: ImageSet, budget: Budget, options: PruningOptions, batch: int) -> PruningTask:
        """Returns the pruning task, the input of every criterion."""
        scenario = self.scenario
        model = in_basis(scenario.model, resolved(options).basis, lambda: scenario.turned)
        compute = scenario.compute
        inputs, labels = compute.put(scenario.transform(images.read())), compute.put(labels_of(images, options))
        seed, new_head = scenario.config.seed, scenario.new_head
        return pruning_task(model, inputs, budget, options, batch, labels, seed, new_head, compute)

    def fine_tune_set(self, metric: MetricOptions, options: PruningOptions, oracle: bool = False) -> FineTuneSet | None:
        """Returns the images for recovery, or None if they are the metric set."""
        return fine_tune_set(lambda size: self.public_images(metric, size, oracle), self.scenario.transform, options)


def _among(names: Collection[str], images: ImageSet) -> np.ndarray:
    """Returns which of `images` are of a class with one of these names, bool (n,)."""
    positions = [position for position, name in enumerate(images.classes) if name in names]
    return np.isin(images.labels, positions)


def classes_that_lack(classes: np.ndarray, share: float, seed: int, device: int) -> np.ndarray:
    """Returns the classes to remove from a device's pool, int64: a share of its own classes, rounded to whole classes.

    They are drawn for each device. A larger share removes the classes of a smaller share, and more.
    """
    drawn: np.ndarray = numpy_generator(seed, "pool-lacks", device).permutation(classes)
    return drawn[: round(share * len(classes))]


def hits(model: nn.Module, inputs: Tensor, labels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which images a model classifies correctly, bool (n,): among all classes, and among the device's own."""
    logits = predict(model, inputs)
    own = torch.full_like(logits, -torch.inf)
    own[:, classes] = logits[:, classes]
    return logits.argmax(1) == labels, own.argmax(1) == labels


def shares(hits: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Returns the two accuracies of `hits`."""
    among_all, among_own = (float(part.double().mean()) for part in hits)
    return among_all, among_own
