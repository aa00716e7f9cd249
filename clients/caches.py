"""Caches of a worker process between messages, keyed by content: any entry can be dropped at any time.

They are in an importable module, because Ray pickles `__main__` by value and its caches would be empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tapfl.adapters import rules
from tapfl.adapters.layout import Layout, device_layout, global_shapes, last_blocks
from tapfl.adapters.lora import AdaptedModel
from tapfl.compute import Compute
from tapfl.config import NEW_HEADS, RunConfig
from tapfl.data.changing import identified, split_changing
from tapfl.data.decoded import ahead
from tapfl.data.federated import DeviceSplit, kept_partition, labels_among, open_private, split_device
from tapfl.data.images import ImageSet, in_order
from tapfl.data.sources import load_images
from tapfl.data.transform import Transform
from tapfl.memo import Memo
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.dense import DenseCache
from tapfl.models.forward import input_transform
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer
from tapfl.profiles import max_rank
from tapfl.pruning.plan import PruningPlan, require_device
from tapfl.pruning.surgery import load_plan, load_pruned
from tapfl.seeds import torch_generator
from tapfl.store import cache_folder
from tapfl.training import Params, images_seen, tensors_in

AT_ONCE = 64  # images that pass the blocks before the first adapter together

MODULE = 3000  # bytes that a module of torch takes besides its weights: most of a model of the digits
T = TypeVar("T")

# images and models of devices, and what arrives at adapters; what was dropped is read or computed again
kept = Memo(0, lambda each: each.nbytes)


def _once(config: RunConfig, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
    kept.limit = config.compute.cache_mb * 2**20
    made: T = kept.once(key, make)
    return made


@lru_cache(maxsize=4)
def private_images(config: RunConfig, fingerprint: str) -> ImageSet:
    """Returns the private images of the federation that `config` describes. Raises DataError as `images_of`."""
    images = open_private(config.data, input_transform(config.model), config.seed, cache_folder(config.cache))
    return images.require(f"data.source = {config.data.source!r}", fingerprint)


@lru_cache(maxsize=4)
def splits(config: RunConfig, devices: int, fingerprint: str) -> list[DeviceSplit]:
    """Returns the split of each device."""
    private = private_images(config, fingerprint)
    return kept_partition(private, config.data, devices, config.seed, cache_folder(config.cache))


class Owner(NamedTuple):
    """Whose images.

    Attributes:
        source: images that all belong to this device; empty: its part of the run's `data.source`.
        fingerprint: of the images that the run began with; empty: any. If they may change, of those that are there.
    """

    config: RunConfig
    devices: int
    partition_id: int
    source: str = ""
    fingerprint: str = ""


@lru_cache(maxsize=4)
def images_of(owner: Owner) -> tuple[ImageSet, DeviceSplit]:
    """Returns the images that a device's split refers to, and the split.

    Raises:
        DataError: if the images are others now, and must not change.
    """
    config, devices, partition_id, source, fingerprint = owner
    if not source:
        return private_images(config, fingerprint), splits(config, devices, fingerprint)[partition_id]
    changing, cache = config.data.changing, cache_folder(config.cache)
    kept = 0.0 if changing else config.data.cache_gb  # which would be a file of all images for each change
    images = load_images(source, input_transform(config.model), cache, cache_gb=kept)
    if changing:
        images = identified(images, cache)
        return images, split_changing(images, config.data, config.seed)
    images.require(f"data = {source!r}", fingerprint)
    return images, split_device(np.arange(len(images)), images.labels, config.data, config.seed, partition_id)


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one device: bytes, which become the input of its model a batch at a time, where the model is."""

    images: ImageSet
    labels: Tensor  # int64 (n,)
    transform: Transform
    compute: Compute
    limit: int  # bytes that may be kept
    key: Hashable  # of the content

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """What it keeps once an image was used: the labels, and all images unless they are over the limit."""
        return self.labels.nbytes + (math.prod(self.images.shape) if self._fits else 0)

    @property
    def _fits(self) -> bool:
        return math.prod(self.images.shape) <= self.limit

    @cached_property
    def _near(self) -> Tensor | None:
        return self._put(self.images.read()) if self._fits else None

    def _put(self, pixels: np.ndarray) -> Tensor:
        return self.compute.put(torch.from_numpy(pixels))

    def batch(self, positions: np.ndarray) -> Tensor:
        """Returns the images at these positions in the backbone's input format."""
        near = self._near
        pixels = self._put(self.images.read(positions)) if near is None else near[torch.from_numpy(positions)]
        return self.transform.normalised(pixels)

    def split(self, batch: int, /) -> Iterable[Tensor]:
        """Returns all images in order, so many at a time, as `Tensor.split` does."""
        return ahead(self.batch, in_order(len(self), batch))


def part(owner: Owner, name: str, classes: tuple[str, ...], compute: Compute) -> Part:
    """Returns the `train` or `test` part of one device, or `pooled`, the training parts of all of a simulation.

    Args:
        classes: of which labels are positions; none: those of the source. Images that may change are left out if they
            are of another class.
    """

    def make() -> Part:
        images, split = images_of(owner)
        everybody = splits(config, owner.devices, owner.fingerprint) if name == "pooled" else []
        chosen = images.subset(
            np.concatenate([each.train for each in everybody]) if everybody else getattr(split, name)
        )
        may_lack = name == "test" and config.model.head in NEW_HEADS  # images of a class that nobody trains on
        labels = (
            labels_among(classes, chosen, owner.source, may_lack or config.data.changing) if classes else chosen.labels
        )
        if config.data.changing:
            chosen, labels = chosen.subset(np.flatnonzero(labels >= 0)), labels[labels >= 0]
        put = compute.put(torch.from_numpy(labels))
        return Part(chosen, put, input_transform(config.model), compute, kept.limit, key)

    config, key = owner.config, (owner, name, classes, compute)
    return _once(config, key, make)


@lru_cache(maxsize=2)
def dense(cache: Path, key: str, spec: str, compute: Compute) -> nn.Module:
    """Returns the dense backbone with this key; `spec` is a BackboneSpec as JSON."""
    return compute.put(DenseCache(cache).load(key, BackboneSpec.from_json(spec)))


@lru_cache(maxsize=2)
def skeleton(spec: str) -> tuple[nn.Module, list[PrunableLayer]]:
    """Returns a backbone with arbitrary weights, and its layers; `spec` is a BackboneSpec as JSON."""
    model = build(BackboneSpec.from_json(spec)).requires_grad_(False)
    return model, prunable_layers(model)


class AdaptedDevice(NamedTuple):
    """A model of a device: the layout of its adapters, and the model as a function of them."""

    layout: Layout
    adapted: AdaptedModel
    # initial values of what the server does not send of w: frozen and private factors, computed from the run's seed as
    # on the server, and a private head, that of the device's model; of the whole of w where references begin with it
    start: Params
    private: tuple[str, ...]  # the names in `start` that are trained and not sent
    nbytes: int  # of the model, and of these
    key: Hashable  # of the model


def pruned(folder: Path, device: int, rank: int, config: RunConfig, compute: Compute) -> AdaptedDevice:
    """Returns the model in a device's storage. Raises PlanError if it is missing, damaged or another device's."""
    plan, checksum = load_plan(folder)
    require_device(plan, device, f"{folder}: is the model")

    def make() -> AdaptedDevice:
        spec = plan.backbone.model_dump_json()
        model = load_pruned(folder, skeleton(spec)[0])
        return _adapted(compute.put(model), spec, plan, rank, config, compute, key)

    key = (folder, checksum, rank, config, compute)
    return _once(config, key, make)


def unpruned(cache: Path, key: str, spec: str, rank: int, config: RunConfig, compute: Compute) -> AdaptedDevice:
    """Returns the dense backbone with adapters of a device's rank, which are not shared with anyone."""

    def make() -> AdaptedDevice:
        return _adapted(dense(cache, key, spec, compute), spec, None, rank, config, compute, own)

    own = (cache, key, rank, config, compute)
    return _once(config, own, make)


def _adapted(
    model: nn.Module, spec: str, plan: PruningPlan | None, rank: int, config: RunConfig, compute: Compute, key: Hashable
) -> AdaptedDevice:
    (dense, layers), options = skeleton(spec), config.adapters
    layers = last_blocks(layers, options.blocks)
    shapes = global_shapes(dense, layers, max_rank(config.devices))
    layout = device_layout(shapes, layers, plan, rank)
    staying = [name for name in layout if name not in rules.down(options, layout)]
    made: Params = {}
    if wanted := list(layout) if config.personalize.references else staying:
        initial = rules.initial(options, shapes, layers, dense, torch_generator(config.seed, "adapters"))
        made = rules.untrained({name: layout[name] for name in wanted}, initial, model)
    moving = rules.trained(options, layout, 1) | rules.trained(options, layout, 2)
    private = tuple(name for name in staying if name in moving)
    nbytes = sum(each.nbytes for each in (*model.parameters(), *made.values()))
    nbytes += sum(place.nbytes for place in layout.values()) + MODULE * len([*model.modules()])
    adapted = AdaptedModel(model, layout, options.scale, compute.reduced)
    return AdaptedDevice(layout, adapted, made, private, nbytes, key)


@dataclass(frozen=True, eq=False)
class Arriving:
    """The images of a part as they arrive at the first adapter of a model, which is the same in every round."""

    labels: Tensor
    stream: Any  # tensors (n, …)

    @classmethod
    def of(cls, part: Part, model: AdaptedModel) -> Arriving:
        """Computes them in batches that follow from the part alone, so that they have the same bits each time."""
        stream: Any = None
        for place, batch in zip(in_order(len(part), AT_ONCE), part.split(AT_ONCE), strict=True):
            found = model.before(batch)
            if stream is None:
                stream = tree_map_only(Tensor, lambda each: each.new_empty((len(part), *each.shape[1:])), found)
            for whole, each in zip(tensors_in(stream), tensors_in(found), strict=True):
                whole[place[0] : place[-1] + 1] = each
        return cls(part.labels, stream)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in tensors_in(self.stream))

    def batch(self, positions: np.ndarray) -> Any:
        """Returns what arrives of the images at these positions."""
        index = torch.from_numpy(positions)
        return tree_map_only(Tensor, lambda each: each[index], self.stream)

    def split(self, batch: int, /) -> Iterable[Any]:
        """Returns all images in order, so many at a time, as `Tensor.split` does."""
        return map(self.batch, in_order(len(self), batch))


Inputs = Part | Arriving


def inputs(own: AdaptedDevice, part: Part, name: str, config: RunConfig) -> tuple[AdaptedModel, Inputs]:
    """Returns a model and the inputs that it takes of a part: images, or what of them never changes.

    That is kept where blocks before the first adapter are passed anew in each round: with `adapters.blocks`, of test
    images, and of training images that nothing changes and of which a round uses as many as there are; if it fits
    `compute.cache-mb`. Which of the two it is has to follow from options, for it changes the last bits of a result.

    Args:
        name: of the part.
    """
    limit, train = config.compute.cache_mb * 2**20, config.train
    whole = name == "train" and train.augment == "none" and images_seen(len(part), train) >= len(part)
    if not (config.adapters.blocks and (name == "test" or whole)):
        return own.adapted, part
    if len(part) * own.adapted.bytes_before > limit:
        return own.adapted, part
    return own.adapted.beyond, _once(config, (own.key, part.key), lambda: Arriving.of(part, own.adapted))
