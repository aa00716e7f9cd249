"""Who holds which image: the public pool, the private images, and the train and test part of each device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tapfl.config import DataOptions
from tapfl.data.sources import ImageSet, load_images
from tapfl.data.transform import Transform
from tapfl.errors import DataError
from tapfl.seeds import numpy_generator

MIN_TRAIN, MIN_TEST, MIN_PUBLIC_PER_CLASS = 8, 2, 2


def open_pool(options: DataOptions, transform: Transform, seed: int, cache: Path) -> ImageSet:
    """Returns the public pool: all of `public`, or otherwise the public share of `source`.

    Raises:
        DataError: if the source is missing, or a class has too few images to be divided.
    """
    if options.public:
        return load_images(options.public, transform, cache)
    source = load_images(options.source, transform, cache)
    return source.subset(split_public(source.labels, options.public_share, seed, source.classes)[0])


def open_private(options: DataOptions, transform: Transform, seed: int, cache: Path) -> ImageSet:
    """Returns all private images; each device uses its own part only (`partition`).

    Raises:
        DataError: as `open_pool`.
    """
    source = load_images(options.source, transform, cache)
    if options.public:
        return source
    return source.subset(split_public(source.labels, options.public_share, seed, source.classes)[1])


def labels_among(classes: Sequence[str], images: ImageSet, source: str) -> np.ndarray:
    """Returns the labels of `images`, int64 (n,), as positions in `classes`: classes are matched by name.

    Raises:
        DataError: if there is an image of a class that is not in `classes`.
    """
    position = {name: index for index, name in enumerate(classes)}
    if unknown := [name for label in np.unique(images.labels) if (name := images.classes[label]) not in position]:
        raise DataError(
            f"data source {source!r}: the public pool has no class {', '.join(unknown[:5])}; "
            f"it has {', '.join(classes[:10])}{', …' if len(classes) > 10 else ''}"
        )
    return np.array([position.get(name, -1) for name in images.classes], dtype=np.int64)[images.labels]


def check_classes(options: DataOptions, public: ImageSet, private: ImageSet) -> None:
    """Raises DataError unless both sides have the same classes and the pool an image of each private class."""
    if public.classes != private.classes:
        odd = sorted(set(public.classes) ^ set(private.classes)) or ["their order"]
        raise DataError(
            f"data.public = {options.public!r} and data.source differ in their classes: {', '.join(odd[:5])}"
        )
    if missing := sorted(set(np.unique(private.labels)) - set(np.unique(public.labels))):
        names = ", ".join(private.classes[label] for label in missing[:5])
        raise DataError(f"data.public = {options.public!r} has no image of {names}")


def found(options: DataOptions, public: ImageSet, private: ImageSet) -> list[str]:
    """Returns a line for each source: what was found there, and what was left out."""
    if options.public:
        return [
            f"data.source = {options.source!r}: {private.described()}",
            f"data.public = {options.public!r}: {public.described()}",
        ]
    return [f"data.source = {options.source!r}: {len(public)} public and {private.described('private')}"]


@dataclass(frozen=True)
class DeviceSplit:
    """Positions of a device's images in the private source: `train` for fitting and training, `test` for reports."""

    train: np.ndarray
    test: np.ndarray


def split_public(
    labels: np.ndarray, share: float, seed: int, classes: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted positions (public, private); `share` of the images of each class are public.

    Args:
        labels: int64 (n,).
        classes: their names, for messages.

    Raises:
        DataError: if a class has too few images for both sides.
    """
    generator = numpy_generator(seed, "public")
    public: list[np.ndarray] = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        taken = round(share * len(members))
        if taken < MIN_PUBLIC_PER_CLASS or taken == len(members):
            name = classes[label] if classes else label
            raise DataError(
                f"class {name} has {len(members)} images: too few for data.public-share = {share}; "
                f"the pool needs at least {MIN_PUBLIC_PER_CLASS} of each class and the devices one"
            )
        public.append(members[:taken])
    pool = np.sort(np.concatenate(public))
    return pool, np.setdiff1d(np.arange(len(labels)), pool)


def partition(labels: np.ndarray, options: DataOptions, devices: int, seed: int) -> list[DeviceSplit]:
    """Divides the private images among `devices` devices with a flwr-datasets partitioner, and splits each part.

    Args:
        labels: int64 (n,), classes of the private images.

    Returns:
        One split for each device; positions refer to `labels`.

    Raises:
        DataError: if there are too few images for that many devices.
    """
    from datasets import Dataset  # with pyarrow and pandas: seconds, once a process

    _check_enough(labels, options, devices)
    partitioner = _partitioner(options, devices, int(numpy_generator(seed, "partition").integers(2**31)))
    order = numpy_generator(seed, "order").permutation(len(labels))
    partitioner.dataset = Dataset.from_dict({"label": labels[order].tolist(), "position": order.tolist()})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # with few devices some classes belong to none, as intended
            parts = [np.array(partitioner.load_partition(i)["position"], dtype=np.int64) for i in range(devices)]
    except ValueError as error:
        raise DataError(f"data.partition = {options.partition!r} for {devices} devices: {error}") from None
    return [split_device(np.sort(part), labels, options, seed, i) for i, part in enumerate(parts)]


def _check_enough(labels: np.ndarray, options: DataOptions, devices: int) -> None:
    most, classes = len(labels) // (MIN_TRAIN + MIN_TEST), len(np.unique(labels))
    if devices > most:
        raise DataError(f"devices.count = {devices}: {len(labels)} private images serve at most {most} devices")
    if options.partition == "shard" and devices * options.shards_per_device > len(labels):
        raise DataError(
            f"data.shards-per-device = {options.shards_per_device}: {len(labels)} private images make at most "
            f"{len(labels) // devices} shards for each of {devices} devices"
        )
    if options.partition == "class-blocks" and devices * options.classes_per_device > classes:
        raise DataError(
            f"data.classes-per-device = {options.classes_per_device}: {classes} classes make at most "
            f"{classes // options.classes_per_device} disjoint blocks for {devices} devices"
        )


def _partitioner(options: DataOptions, devices: int, seed: int) -> Any:
    from flwr_datasets import partitioner as flwr

    by_label = {"num_partitions": devices, "partition_by": "label", "seed": seed}
    match options.partition:
        case "iid":
            return flwr.IidPartitioner(num_partitions=devices)
        case "class-blocks":
            return flwr.GroupedNaturalIdPartitioner(
                partition_by="label", group_size=options.classes_per_device, sort_unique_ids=True
            )
        case "shard":
            return flwr.ShardPartitioner(**by_label, num_shards_per_partition=options.shards_per_device)
        case "dirichlet":
            smallest = MIN_TRAIN + MIN_TEST
            return flwr.DirichletPartitioner(**by_label, alpha=options.dirichlet_alpha, min_partition_size=smallest)
        case "pathological":
            return flwr.PathologicalPartitioner(
                **by_label,
                num_classes_per_partition=options.classes_per_device,
                class_assignment_mode="deterministic",
                shuffle=True,
            )


def split_device(part: np.ndarray, labels: np.ndarray, options: DataOptions, seed: int, device: int) -> DeviceSplit:
    """Returns the two parts of one device's images: the one it trains on, and the one it reports on.

    With `data.evaluate` = `validation` both come from its training part: a choice made by what is reported has then not
    used the test part.

    Args:
        part: sorted positions of its images in the source that `labels`, int64 (n,), belong to.

    Raises:
        DataError: if there are too few.
    """
    split = _stratified(part, labels, options.test_share, numpy_generator(seed, "test", device))
    if options.evaluate == "validation":
        split = _stratified(split.train, labels, options.test_share, numpy_generator(seed, "validation", device))
    if len(split.train) < MIN_TRAIN or len(split.test) < MIN_TEST:
        raise DataError(
            f"device {device} would get {len(split.train)} training and {len(split.test)} {options.evaluate} images, "
            f"it needs {MIN_TRAIN} and {MIN_TEST}: fewer devices (devices.count), another data.partition, "
            f"another data.test-share, or more images"
        )
    return split


def _stratified(part: np.ndarray, labels: np.ndarray, share: float, generator: np.random.Generator) -> DeviceSplit:
    """Splits `part`: `share` of the images of each class go to `test`, up to rounding."""
    test: list[int] = []
    due = 0.0
    for label in np.unique(labels[part]):
        members = generator.permutation(part[labels[part] == label])
        due += share * len(members)
        taken = min(round(due), len(members))
        due -= taken
        test.extend(members[:taken].tolist())
    return DeviceSplit(np.setdiff1d(part, test), np.sort(np.array(test, dtype=np.int64)))
