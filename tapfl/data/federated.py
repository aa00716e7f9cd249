"""The images of a federation as its two sides see them: a public pool, and one private part a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tapfl.config import DataOptions
from tapfl.data.partition import DeviceSplit, partition, split_public
from tapfl.data.sources import ImageSet, load_images
from tapfl.data.transform import Transform
from tapfl.errors import DataError


@dataclass(frozen=True)
class FederatedImages:
    """The pool and the private images; a device opens its own part by `split`."""

    public: ImageSet
    private: ImageSet
    options: DataOptions
    seed: int

    def splits(self, devices: int) -> list[DeviceSplit]:
        """Returns the train and test positions of every device in `private`."""
        return partition(self.private.labels, self.options, devices, self.seed)


def open_images(options: DataOptions, transform: Transform, seed: int, cache: Path) -> FederatedImages:
    """Returns the images of a federation, kept at `image-size` or else at the size that `transform` makes of them.

    Raises:
        DataError: if a source is not there, two sources differ in their classes, or a class has too few images.
    """
    size = options.image_size or max(transform.size)
    source = load_images(options.source, size, cache)
    if not options.public:
        pool, private = split_public(source.labels, options.public_share, seed)
        return FederatedImages(source.subset(pool), source.subset(private), options, seed)
    public = load_images(options.public, size, cache)
    if public.classes != source.classes:
        odd = sorted(set(public.classes) ^ set(source.classes)) or ["their order"]
        raise DataError(
            f"data.public = {options.public!r} and data.source differ in their classes: {', '.join(odd[:5])}"
        )
    if missing := sorted(set(np.unique(source.labels)) - set(np.unique(public.labels))):
        names = ", ".join(source.classes[label] for label in missing[:5])
        raise DataError(f"data.public = {options.public!r} has no image of {names}")
    return FederatedImages(public, source, options, seed)
