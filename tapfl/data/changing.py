"""Devices whose images change during a run (`data.changing`): their folders, and the part that each image is in.

Whether an image is in the training or the test part depends only on its pixels and the run's seed. When images are
added or removed, all others stay in their part, so a test image never becomes a training image, nor the reverse. A copy
of an image is in the same part, whatever its name and on any device. The price is that the test share is met only on
average, and not class by class.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tapfl.config import DataOptions
from tapfl.data.contents import path_of
from tapfl.data.federated import DeviceSplit
from tapfl.data.folders import list_images
from tapfl.data.images import AT_ONCE, ImageSet, in_order
from tapfl.errors import ConfigError
from tapfl.store import content_hash, read_tensors, write_tensors


def identities(images: ImageSet) -> np.ndarray:
    """Returns the first 64 bits of the SHA-256 of each image's pixels, int64 (n,)."""
    digests = (
        hashlib.sha256(image.tobytes()).digest()[:8]
        for part in in_order(len(images), AT_ONCE)
        for image in images.read(part)
    )
    return np.frombuffer(bytearray(b"".join(digests)), dtype="<i8")


def identified(images: ImageSet, cache: Path) -> ImageSet:
    """Returns the images with their identities. Those of a folder or a table are stored in `cache` until it changes."""
    if not images.images.key:
        return replace(images, identity=identities(images))
    file = cache / "identities" / f"{content_hash(*images.content())}.safetensors"
    if not file.exists():
        write_tensors(file, {"identities": torch.from_numpy(identities(images))})
    return replace(images, identity=read_tensors(file)["identities"].numpy())


def drawn(images: ImageSet, share: float, seed: int, purpose: str) -> np.ndarray:
    """Returns which of the identified images are drawn, each with probability `share`, bool (n,).

    Args:
        purpose: draws for different purposes are independent.
    """
    assert images.identity is not None
    stream = hashlib.sha256(f"{seed} {purpose} ".encode())

    def number(image: int) -> int:
        own = stream.copy()
        own.update(image.to_bytes(8, "little", signed=True))
        return int.from_bytes(own.digest()[:8], "little")

    return np.array([number(image) < share * 2**64 for image in images.identity.tolist()], dtype=bool)


def split_changing(images: ImageSet, options: DataOptions, seed: int) -> DeviceSplit:
    """Returns the two parts of a device's images by their identities; compare `tapfl.data.federated.split_device`."""
    tested = drawn(images, options.test_share, seed, "test")
    if options.evaluate == "test":
        return DeviceSplit(np.flatnonzero(~tested), np.flatnonzero(tested))
    chosen = drawn(images, options.test_share, seed, "validation")
    return DeviceSplit(np.flatnonzero(~tested & ~chosen), np.flatnonzero(~tested & chosen))


def device_folders(options: DataOptions) -> list[Path]:
    """Returns the folders of natural devices whose images may change, sorted by name. Each is one device's own source.

    Raises:
        ConfigError: if the devices have no folders of their own.
        DataError: if the source is missing or contains no images.
    """
    root = path_of(options.source)
    if options.partition not in ("natural", "NaturalIdPartitioner") or not options.public or not root.is_dir():
        raise ConfigError(
            "data.changing = true: needs devices with images of their own; accepted: nodes with data='…' in their "
            "configuration, or data.partition = natural with a folder as data.source and another source as data.public"
        )
    held = Counter(name.split("/", 1)[0] for name in list_images(root, by_device=True).names)
    enough = [name for name, count in held.items() if count >= options.min_images]
    return [root / name for name in sorted(enough, key=lambda name: unicodedata.normalize("NFC", name))]
