"""What a worker process caches between messages. Keys identify content, so any entry can be dropped at any time.

The caches are in an importable module because Ray pickles `__main__` by value, and caches in it would be empty.
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

AT_ONCE = 64  # batch size of the pass through the blocks before the first adapter

MODULE = 3000  # approximate bytes of a torch module besides its weights, which dominate in a model of the digits
T = TypeVar("T")

# images, models, and inputs of the first adapters; what was dropped is read or computed again
kept = Memo(0, lambda entry: entry.nbytes)


def _once(config: RunConfig, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
    kept.limit = config.compute.cache_mb * 2**20
    made: T = kept.once(key, make)
    return made


@lru_cache(maxsize=4)
def private_images(config: RunConfig, fingerprint: str) -> ImageSet:
    """Returns the private images of the federation that `config` describes. Raises DataError as `images_of` does."""
    images = open_private(config.data, input_transform(config.model), config.seed, cache_folder(config.cache))
    return images.require(f"data.source = {config.data.source!r}", fingerprint)


@lru_cache(maxsize=4)
def splits(config: RunConfig, devices: int, fingerprint: str) -> list[DeviceSplit]:
    """Returns the split of every device."""
    private = private_images(config, fingerprint)
    return kept_partition(private, config.data, devices, config.seed, cache_folder(config.cache))


class Owner(NamedTuple):
    """The device that images belong to.

    Attributes:
        source: images that all belong to this device; empty: it has a part of the run's `data.source`.
        fingerprint: of the images at the start of the run, or if they may change, of the present ones; empty: images
            are not compared.
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
        DataError: if the images differ from those at the start of the run, and must not change.
    """
    config, devices, partition_id, source, fingerprint = owner
    if not source:
        return private_images(config, fingerprint), splits(config, devices, fingerprint)[partition_id]
    changing, cache = config.data.changing, cache_folder(config.cache)
    cache_gb = 0.0 if changing else config.data.cache_gb  # otherwise every change would write a file of all images
    transform, ids = input_transform(config.model), config.data.ids
    images = load_images(source, transform, cache, cache_gb=cache_gb, ignore=ids, nested=changing)
    if changing:
        images = identified(images, cache)
        return images, split_changing(images, config.data, config.seed)
    images.require(f"data = {source!r}", fingerprint)
    return images, split_device(np.arange(len(images)), images.labels, config.data, config.seed, partition_id)


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one device, stored as bytes and converted to the model's input one batch at a time, on its device.

    Attributes:
        labels: int64 (n,).
        limit: largest number of bytes of images that are kept in memory.
        key: identifies the content.
    """

    images: ImageSet
    labels: Tensor
    transform: Transform
    compute: Compute
    limit: int
    key: Hashable

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes in memory once an image was used: the labels, and all images unless they exceed the limit."""
        return self.labels.nbytes + (math.prod(self.images.shape) if self._fits else 0)

    @property
    def _fits(self) -> bool:
        return math.prod(self.images.shape) <= self.limit

    @cached_property
    def _pixels(self) -> Tensor | None:
        return self._put(self.images.read()) if self._fits else None

    def _put(self, pixels: np.ndarray) -> Tensor:
        return self.compute.put(torch.from_numpy(pixels))

    def batch(self, positions: np.ndarray) -> Tensor:
        """Returns the images at these positions in the backbone's input format."""
        kept = self._pixels
        pixels = self._put(self.images.read(positions)) if kept is None else kept[self._put(positions)]
        return self.transform.normalised(pixels)

    def split(self, batch: int, /) -> Iterable[Tensor]:
        """Returns all images in order, in batches of size `batch`, as `Tensor.split` does."""
        return ahead(self.batch, in_order(len(self), batch))


def part(owner: Owner, name: str, classes: tuple[str, ...], compute: Compute) -> Part:
    """Returns the `train` or `test` part of one device, or `pooled`, the training parts of all devices of a simulation.

    Args:
        classes: the classes that labels are positions in; empty: those of the source. If images may change, those of
            other classes are left out.
    """

    def make() -> Part:
        images, split = images_of(owner)
        if name == "pooled":
            positions = np.concatenate([own.train for own in splits(config, owner.devices, owner.fingerprint)])
        else:
            positions = getattr(split, name)
        chosen = images.subset(positions)
        # the test part may have a class that no device trains on
        others = config.data.changing or (name == "test" and config.model.head in NEW_HEADS)
        labels = labels_among(classes, chosen, owner.source, others) if classes else chosen.labels
        if config.data.changing:
            chosen, labels = chosen.subset(np.flatnonzero(labels >= 0)), labels[labels >= 0]
        moved = compute.put(torch.from_numpy(labels))
        return Part(chosen, moved, input_transform(config.model), compute, kept.limit, key)

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
    """A model of a device as a function of its adapters.

    Attributes:
        layout: of the adapters.
        adapted: the model.
        start: initial values of the tensors of w that the server does not send: frozen and private factors, computed
            from the run's seed as on the server, and a private head, which is that of the device's model. With
            references, which start from them, initial values of all of w.
        private: names of the tensors that are trained and never sent.
        nbytes: approximate memory of the model, `start` and `layout`.
        key: identifies the model.
    """

    layout: Layout
    adapted: AdaptedModel
    start: Params
    private: tuple[str, ...]
    nbytes: int
    key: Hashable


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
    """Returns the dense backbone with adapters of a device's rank, for training that shares nothing."""

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
    start: Params = {}
    if needed := list(layout) if config.personalize.references else staying:
        initial = rules.initial(options, shapes, layers, dense, torch_generator(config.seed, "adapters"))
        start = rules.untrained({name: layout[name] for name in needed}, initial, model)
    trained = rules.trained(options, layout, 1) | rules.trained(options, layout, 2)
    private = tuple(name for name in staying if name in trained)
    nbytes = sum(tensor.nbytes for tensor in (*model.parameters(), *start.values()))
    nbytes += sum(place.nbytes for place in layout.values()) + MODULE * len([*model.modules()])
    adapted = AdaptedModel(model, layout, options.scale, compute.reduced)
    return AdaptedDevice(layout, adapted, start, private, nbytes, key)


@dataclass(frozen=True, eq=False)
class Arriving:
    """The inputs of a model's first adapter for the images of a part, which are the same in every round."""

    labels: Tensor
    stream: Any  # tensors (n, …)

    @classmethod
    def of(cls, part: Part, model: AdaptedModel) -> Arriving:
        """Returns the inputs, computed in batches that depend only on the part, so that they have the same bits."""
        stream: Any = None
        for positions, images in zip(in_order(len(part), AT_ONCE), part.split(AT_ONCE), strict=True):
            batch = model.before(images)
            if stream is None:
                stream = tree_map_only(Tensor, lambda x: x.new_empty((len(part), *x.shape[1:])), batch)
            for whole, rows in zip(tensors_in(stream), tensors_in(batch), strict=True):
                whole[positions[0] : positions[-1] + 1] = rows
        return cls(part.labels, stream)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_in(self.stream))

    def batch(self, positions: np.ndarray) -> Any:
        """Returns the inputs for the images at these positions."""
        index = torch.from_numpy(positions).to(self.labels.device, non_blocking=True)
        return tree_map_only(Tensor, lambda tensor: tensor[index], self.stream)

    def split(self, batch: int, /) -> Iterable[Any]:
        """Returns all images in order, in batches of size `batch`, as `Tensor.split` does."""
        return map(self.batch, in_order(len(self), batch))


Inputs = Part | Arriving


def inputs(own: AdaptedDevice, part: Part, name: str, config: RunConfig) -> tuple[AdaptedModel, Inputs]:
    """Returns a model and its inputs for a part of the images: either the images, or the inputs of its first adapter.

    The latter are cached instead of computed anew in each round, if blocks come before the first adapter
    (`adapters.blocks`) and they fit `compute.cache-mb`. This is done for test images, and for training images if they
    are not augmented and a round uses at least as many images as there are. The choice must follow from the options,
    because it changes the last bits of a result.

    Args:
        name: `train`, `test` or `pooled`.
    """
    limit, train = config.compute.cache_mb * 2**20, config.train
    whole = name == "train" and train.augment == "none" and images_seen(len(part), train) >= len(part)
    if not (config.adapters.blocks and (name == "test" or whole)):
        return own.adapted, part
    if len(part) * own.adapted.bytes_before > limit:
        return own.adapted, part
    return own.adapted.beyond, _once(config, (own.key, part.key), lambda: Arriving.of(part, own.adapted))
