"""Who holds which image: the public pool, the devices, and each device's train and test part."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from tapfl.config import DataOptions
from tapfl.errors import DataError
from tapfl.seeds import numpy_generator

MIN_TRAIN, MIN_TEST, MIN_PUBLIC_PER_CLASS = 8, 2, 2


@dataclass(frozen=True)
class DeviceSplit:
    """Positions of a device's images in the private source: fitted and trained on `train`, reported on `test`."""

    train: np.ndarray
    test: np.ndarray


def split_public(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted positions (public, private); each class gives `share` of its images to the pool.

    Raises:
        DataError: if a class has too few images to serve both sides.
    """
    generator = numpy_generator(seed, "public")
    public: list[np.ndarray] = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        taken = round(share * len(members))
        if taken < MIN_PUBLIC_PER_CLASS or taken == len(members):
            raise DataError(
                f"class {label} has {len(members)} images: too few for data.public-share = {share}; "
                f"the pool needs at least {MIN_PUBLIC_PER_CLASS} of each class and the devices one"
            )
        public.append(members[:taken])
    pool = np.sort(np.concatenate(public))
    return pool, np.setdiff1d(np.arange(len(labels)), pool)


def partition(labels: np.ndarray, options: DataOptions, devices: int, seed: int) -> list[DeviceSplit]:
    """Deals the private images out to `devices` devices with a flwr-datasets partitioner, and splits each part.

    Args:
        labels: int64 (n,), classes of the private images.

    Returns:
        One split a device; positions refer to `labels`.

    Raises:
        DataError: if the images do not reach for that many devices.
    """
    from datasets import Dataset  # with pyarrow and pandas: seconds, paid once a process
    from flwr_datasets import partitioner as flwr_partitioners

    common = {"num_partitions": devices, "partition_by": "label"}
    most = len(labels) // (MIN_TRAIN + MIN_TEST)
    if devices > most:
        raise DataError(f"devices.count = {devices}: {len(labels)} private images serve at most {most} devices")
    if options.partition == "shard" and devices * options.shards_per_device > len(labels):
        raise DataError(
            f"data.shards-per-device = {options.shards_per_device}: {len(labels)} private images make at most "
            f"{len(labels) // devices} shards for each of {devices} devices"
        )
    if options.partition == "class-blocks" and devices * options.classes_per_device > len(np.unique(labels)):
        raise DataError(
            f"data.classes-per-device = {options.classes_per_device}: {len(np.unique(labels))} classes make at most "
            f"{len(np.unique(labels)) // options.classes_per_device} disjoint blocks for {devices} devices"
        )
    drawn = int(numpy_generator(seed, "partition").integers(2**31))
    if options.partition == "iid":
        partitioner = flwr_partitioners.IidPartitioner(num_partitions=devices)
    elif options.partition == "pathological":
        partitioner = flwr_partitioners.PathologicalPartitioner(
            **common,
            num_classes_per_partition=options.classes_per_device,
            class_assignment_mode="deterministic",
            shuffle=True,
            seed=drawn,
        )
    elif options.partition == "class-blocks":
        partitioner = flwr_partitioners.GroupedNaturalIdPartitioner(
            partition_by="label", group_size=options.classes_per_device, sort_unique_ids=True
        )
    elif options.partition == "shard":
        partitioner = flwr_partitioners.ShardPartitioner(
            **common, num_shards_per_partition=options.shards_per_device, seed=drawn
        )
    else:
        partitioner = flwr_partitioners.DirichletPartitioner(
            **common, alpha=options.dirichlet_alpha, min_partition_size=MIN_TRAIN + MIN_TEST, seed=drawn
        )
    order = numpy_generator(seed, "order").permutation(len(labels))
    partitioner.dataset = Dataset.from_dict({"label": labels[order].tolist(), "position": order.tolist()})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # few devices leave classes to nobody: that is what was asked
            parts = [np.array(partitioner.load_partition(i)["position"], dtype=np.int64) for i in range(devices)]
    except ValueError as error:
        raise DataError(f"data.partition = {options.partition!r} for {devices} devices: {error}") from None
    return [split_device(np.sort(part), labels, options, seed, i) for i, part in enumerate(parts)]


def split_device(part: np.ndarray, labels: np.ndarray, options: DataOptions, seed: int, device: int) -> DeviceSplit:
    """Returns the two parts of one device's images: what it trains on, and what is reported.

    With `data.evaluate` = `validation` both come from its training part: whoever chooses by what is reported has then
    not seen the test part.

    Args:
        part: sorted positions of its images in the source that `labels`, int64 (n,), belong to.

    Raises:
        DataError: if they are too few.
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
    """Splits `part`: every class gives `share` of its images to `test`, as far as they allow."""
    test: list[int] = []
    due = 0.0
    for label in np.unique(labels[part]):
        members = generator.permutation(part[labels[part] == label])
        due += share * len(members)
        taken = min(round(due), len(members))
        due -= taken
        test.extend(members[:taken].tolist())
    return DeviceSplit(np.setdiff1d(part, test), np.sort(np.array(test, dtype=np.int64)))
