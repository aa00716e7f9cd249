"""Divides images into the public pool, the private images, and the training and test part of each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from tapfl.config import DataOptions
from tapfl.data.contents import path_of
from tapfl.data.images import ImageSet
from tapfl.data.partitions import MIN_TEST, MIN_TRAIN, divide
from tapfl.data.sources import BUILT_IN, load_images
from tapfl.data.transform import Transform
from tapfl.errors import DataError
from tapfl.seeds import numpy_generator
from tapfl.store import content_hash, read_tensors, write_tensors

MIN_PUBLIC_PER_CLASS = 2


def open_pool(options: DataOptions, transform: Transform, seed: int, cache: Path) -> ImageSet:
    """Returns the public pool: all of `public`, or otherwise the public share of `source`.

    Raises:
        DataError: if the source is missing, or a class has too few images to divide.
    """
    if options.public:
        ids = options.ids  # of devices, in another split of the same table: not the classes
        return load_images(options.public, transform, cache, cache_gb=options.cache_gb, unlabelled=True, ignore=ids)
    source = load_images(options.source, transform, cache, options.ids, options.cache_gb)
    return source.subset(split_public(source.labels, options.public_share, seed, source.classes)[0])


def open_private(options: DataOptions, transform: Transform, seed: int, cache: Path) -> ImageSet:
    """Returns all private images. Each device uses only its own part (`partition`).

    Raises:
        DataError: as for `open_pool`.
    """
    source = load_images(options.source, transform, cache, options.ids, options.cache_gb)
    if not options.public:
        source = source.subset(split_public(source.labels, options.public_share, seed, source.classes)[1])
    return _of_large_devices(source, options)


def _of_large_devices(images: ImageSet, options: DataOptions) -> ImageSet:
    """Returns the images without those of natural devices that have fewer than `min_images` images."""
    if images.owners is None:
        return images
    counts = np.bincount(images.owners, minlength=len(images.ids))
    stay = np.flatnonzero(counts >= max(1, options.min_images))
    if not len(stay):
        raise DataError(
            f"data.min-images = {options.min_images}: the largest of {len(counts)} devices has {counts.max()} private "
            "images; accepted: a smaller number"
        )
    chosen = np.isin(images.owners, stay)
    few = int(counts[counts < options.min_images].sum())
    reason = f"images of devices with fewer than {options.min_images} (data.min-images)"
    return replace(
        images.subset(np.flatnonzero(chosen)),
        owners=np.searchsorted(stay, images.owners[chosen]),
        ids=tuple(images.ids[i] for i in stay),
        left_out={**images.left_out, reason: few} if few else images.left_out,
    )


def labels_among(classes: Sequence[str], images: ImageSet, source: str, other_classes: bool = False) -> np.ndarray:
    """Returns the labels of `images`, int64 (n,), as positions in `classes`. Classes are matched by name.

    Args:
        other_classes: accept images of other classes, and give them the label -1.

    Raises:
        DataError: if an image has another class and this is not accepted.
    """
    position = {name: index for index, name in enumerate(classes)}
    unknown = [name for label in np.unique(images.labels) if (name := images.classes[label]) not in position]
    if unknown and not other_classes:
        raise DataError(
            f"data source {source!r}: the public pool has no class {', '.join(unknown[:5])}; "
            f"it has {', '.join(classes[:10])}{', …' if len(classes) > 10 else ''}"
        )
    return np.array([position.get(name, -1) for name in images.classes], dtype=np.int64)[images.labels]


def check_pool(options: DataOptions, public: ImageSet, private: ImageSet, other_classes: bool = False) -> None:
    """Raises DataError if the public pool cannot be used with the private images.

    The two must have different images; otherwise the backbone would be trained on test images of the devices. Equal
    sources are noticed, and a folder inside the other; copies of some images are not. Unless `other_classes` is set,
    both need the same classes, and the pool needs an image of each private class.
    """
    if not options.public:
        return
    name = f"data.public = {options.public!r}"
    if public.fingerprint == private.fingerprint or _overlap(options.source, options.public):
        raise DataError(
            f"{name}: has images of data.source, of which devices keep some for testing; accepted: other "
            "images, or none: the pool is then data.public-share of data.source"
        )
    if other_classes:
        return
    if public.classes != private.classes:
        different = sorted(set(public.classes) ^ set(private.classes)) or ["their order"]
        raise DataError(
            f"{name} and data.source differ in their classes: {', '.join(different[:5])}; "
            "accepted: the same classes, or model.head = 'new'"
        )
    if missing := sorted(set(np.unique(private.labels)) - set(np.unique(public.labels))):
        names = ", ".join(private.classes[label] for label in missing[:5])
        raise DataError(f"{name} has no image of {names}; model.head = 'new' allows it")


def _overlap(source: str, public: str) -> bool:
    """Returns whether two sources are folders of which one is or contains the other."""
    folders = [path_of(name).resolve() for name in (source, public) if name not in BUILT_IN and path_of(name).is_dir()]
    if len(folders) < 2:
        return False
    one, other = folders
    return one.is_relative_to(other) or other.is_relative_to(one)


def found(options: DataOptions, public: ImageSet, private: ImageSet) -> list[str]:
    """Returns a line of text for each source: the images that were found, and what was left out."""
    if options.public:
        return [
            f"data.source = {options.source!r}: {private.described()}",
            f"data.public = {options.public!r}: {public.described()}",
        ]
    return [f"data.source = {options.source!r}: {len(public)} public and {private.described('private')}"]


@dataclass(frozen=True)
class DeviceSplit:
    """Positions of a device's images in the private source: `train` for training, `test` for evaluation."""

    train: np.ndarray
    test: np.ndarray

    @property
    def enough(self) -> bool:
        """Whether these are enough images to train and to evaluate."""
        return len(self.train) >= MIN_TRAIN and len(self.test) >= MIN_TEST


def split_public(
    labels: np.ndarray, share: float, seed: int, classes: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted positions of the public and of the private images; a `share` of each class is public.

    Args:
        labels: int64 (n,).
        classes: names of the classes, for messages.

    Raises:
        DataError: if a class has too few images for both.
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


def partition(
    labels: np.ndarray, options: DataOptions, devices: int, seed: int, owners: np.ndarray | None = None
) -> list[DeviceSplit]:
    """Divides the private images among `devices` devices with a flwr-datasets partitioner, and splits each part.

    Args:
        labels: int64 (n,), classes of the private images.
        devices: number of devices; 0: as many as the partitioner makes, if it determines that.
        owners: natural device of each image, int64 (n,), if it is known.

    Returns:
        One split for each device; positions refer to `labels`.

    Raises:
        DataError: if there are too few images for that many devices, or the partitioner makes a different number.
    """
    parts = divide(labels, options, devices, seed, owners)
    return [split_device(part, labels, options, seed, i) for i, part in enumerate(parts)]


def kept_partition(images: ImageSet, options: DataOptions, devices: int, seed: int, cache: Path) -> list[DeviceSplit]:
    """Returns the `partition` of private images. The first process on a machine stores it, and the others read it."""
    chosen = options.model_dump_json(exclude={"source", "public", "cache_gb"})
    owners = b"" if images.owners is None else images.owners.tobytes()
    version = metadata.version("flwr-datasets")
    key = content_hash(images.labels.tobytes(), owners, chosen, f"{devices} {seed} {version}")
    file = cache / "splits" / f"{key}.safetensors"
    if not file.exists():
        splits = partition(images.labels, options, devices, seed, images.owners)
        parts = [part for split in splits for part in (split.train, split.test)]
        ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        write_tensors(file, {"positions": torch.from_numpy(np.concatenate(parts)), "ends": ends})
    kept = {name: tensor.numpy() for name, tensor in read_tensors(file).items()}
    parts = np.split(kept["positions"], kept["ends"][:-1])
    return [DeviceSplit(train, test) for train, test in zip(parts[::2], parts[1::2], strict=True)]


def split_device(part: np.ndarray, labels: np.ndarray, options: DataOptions, seed: int, device: int) -> DeviceSplit:
    """Returns the split of one device's images into those it trains on and those it is evaluated on.

    With ``data.evaluate = validation`` both come from the training part, so that choices made by the reported accuracy
    do not use the test part.

    Args:
        part: sorted positions of the device's images in the source.
        labels: of all images of the source, int64 (n,).

    Raises:
        DataError: if there are too few images.
    """
    split = _stratified(part, labels, options.test_share, numpy_generator(seed, "test", device))
    if options.evaluate == "validation":
        split = _stratified(split.train, labels, options.test_share, numpy_generator(seed, "validation", device))
    require_enough(split, options, device)
    return split


def require_enough(split: DeviceSplit, options: DataOptions, device: int) -> None:
    """Raises DataError if a device has too few images for a federation."""
    if not split.enough:
        ways = "data.min-images, which leaves such devices out" if options.ids else "fewer devices (devices.count)"
        raise DataError(
            f"device {device} would get {len(split.train)} training and {len(split.test)} {options.evaluate} images, "
            f"it needs {MIN_TRAIN} and {MIN_TEST}: {ways}, another data.partition, "
            f"another data.test-share, or more images"
        )


def _stratified(part: np.ndarray, labels: np.ndarray, share: float, generator: np.random.Generator) -> DeviceSplit:
    """Returns `part` split so that a `share` of each class is in `test`, up to rounding."""
    test: list[int] = []
    due = 0.0
    for label in np.unique(labels[part]):
        members = generator.permutation(part[labels[part] == label])
        due += share * len(members)
        taken = min(round(due), len(members))
        due -= taken
        test.extend(members[:taken].tolist())
    return DeviceSplit(np.setdiff1d(part, test), np.sort(np.array(test, dtype=np.int64)))
