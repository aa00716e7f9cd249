"""The images of a federation as its two sides see them: the server's public pool, and the devices' private images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tapfl.config import DataOptions
from tapfl.data.partition import split_public
from tapfl.data.sources import ImageSet, load_images
from tapfl.data.transform import Transform
from tapfl.errors import DataError


def open_pool(options: DataOptions, transform: Transform, seed: int, cache: Path) -> ImageSet:
    """Returns the public pool: all of `public`, or else the public share of `source`.

    Images are kept at `image-size`, or else at the size that `transform` makes of them.

    Raises:
        DataError: if the source is not there, or a class has too few images to be shared out.
    """
    if options.public:
        return load_images(options.public, _size(options, transform), cache)
    source = load_images(options.source, _size(options, transform), cache)
    return source.subset(split_public(source.labels, options.public_share, seed)[0])


def open_private(options: DataOptions, transform: Transform, seed: int, cache: Path) -> ImageSet:
    """Returns all private images, of which each device opens its own part only (`tapfl.data.partition`).

    Raises:
        DataError: as `open_pool`.
    """
    source = load_images(options.source, _size(options, transform), cache)
    if options.public:
        return source
    return source.subset(split_public(source.labels, options.public_share, seed)[1])


def open_own(source: str, options: DataOptions, transform: Transform, cache: Path) -> ImageSet:
    """Returns the images of a device that has a source of its own, all of them its own; classes as the source has them.

    Raises:
        DataError: as `open_pool`.
    """
    return load_images(source, _size(options, transform), cache)


def labels_among(classes: Sequence[str], images: ImageSet, source: str) -> np.ndarray:
    """Returns the labels of `images`, int64 (n,), as positions in `classes`: classes are the same by their names.

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
    """Raises DataError unless both sides have the same classes and the pool an image of each private one."""
    if public.classes != private.classes:
        odd = sorted(set(public.classes) ^ set(private.classes)) or ["their order"]
        raise DataError(
            f"data.public = {options.public!r} and data.source differ in their classes: {', '.join(odd[:5])}"
        )
    if missing := sorted(set(np.unique(private.labels)) - set(np.unique(public.labels))):
        names = ", ".join(private.classes[label] for label in missing[:5])
        raise DataError(f"data.public = {options.public!r} has no image of {names}")


def _size(options: DataOptions, transform: Transform) -> int:
    return options.image_size or max(transform.size)
