"""The images of one device, their parts, and the names of their classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clients import caches
from clients.storage import DeviceStorage
from tapfl.compute import Compute, home
from tapfl.config import NEW_HEADS, RunConfig
from tapfl.data.contents import fingerprints
from tapfl.data.federated import DeviceSplit
from tapfl.data.images import ImageSet
from tapfl.errors import ConfigError
from tapfl.personalize.held_out import hold_out
from tapfl.seeds import numpy_generator


@dataclass(frozen=True)
class OwnImages:
    """The images of one device; the worker's caches hold them.

    Attributes:
        source: images that all belong to this device; empty: its part of the run's `data.source`.
    """

    config: RunConfig
    devices: int
    partition_id: int
    source: str
    storage: DeviceStorage
    compute: Compute

    def begin(self) -> int:
        """Returns the number of training images.

        Raises:
            DataError: if the images are not those that the run began with.
        """
        option = ("data", self.source) if self.source else ("data.source", self.config.data.source)
        self.storage.begin(fingerprints([option], ids="" if self.source else self.config.data.ids))
        return len(self._divided[1].train)

    def part(self, name: str) -> caches.Part:
        """Returns the `train` or `test` part, or `pooled`, the training parts of all devices of a simulation.

        Raises:
            ConfigError: if the device has images of its own, and those of all are asked for.
        """
        if name == "pooled" and self.source:
            accepted = "only a simulation has; this device has images of its own"
            raise ConfigError(f"personalize.method = 'pooled': needs the images of all devices, which {accepted}")
        classes = self.names if self.keeps_names else self.storage.classes if self.source or self.names else ()
        owner = (self.config, self.devices, self.partition_id)
        return caches.part(*owner, name, self.source, self._fingerprint, classes, self.compute)

    @property
    def natural_ids(self) -> tuple[str, ...]:
        """Of whom the images are, where they were divided by that."""
        if self.source or self.config.data.divided_by != "device":
            return ()
        images, split = self._divided
        return images.subset(split.train).owner_names

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of its classes, of which the classifier has a row each; none if that is the backbone's own."""
        if self.config.model.head not in NEW_HEADS:
            return ()
        images, split = self._divided
        return images.subset(split.train).held

    @property
    def keeps_names(self) -> bool:
        """Whether the names stay here: the classifier is personal, and so is which row stands for which class."""
        return bool(self.names) and self.config.adapters.head == "personal"

    @property
    def reported(self) -> Sequence[str]:
        """What the server learns of the names: nothing, or their number, where it needs none."""
        return sorted(map(str, range(len(self.names)))) if self.keeps_names else self.names

    @cached_property
    def trained_and_held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the training part: of the images that are trained on, and of those that choose α."""
        labels = self.part("train").labels
        if not self.config.personalize.holds_out:
            return np.arange(len(labels)), np.arange(0)
        generator = numpy_generator(self.config.seed, "held-out", self.partition_id)
        return hold_out(home(labels).numpy(), self.config.personalize.held_out_share, generator)

    def weighing(self, round: int) -> list[np.ndarray]:
        """Positions in the training part, by batches, of the images by which a method weighs v against w."""
        options, (trained, held_out) = self.config.personalize, self.trained_and_held_out
        if options.method != "fedala":
            return [held_out[first : first + 256] for first in range(0, len(held_out), 256)]
        drawn = numpy_generator(self.config.seed, "weigh", round, self.partition_id).permutation(trained)
        drawn = drawn[: math.ceil(options.ala_share * len(drawn))]
        return np.array_split(drawn, -(-len(drawn) // self.config.train.batch))

    @property
    def _divided(self) -> tuple[ImageSet, DeviceSplit]:
        return caches.images_of(self.config, self.devices, self.partition_id, self.source, self._fingerprint)

    @cached_property
    def _fingerprint(self) -> str:
        """Of the images that the run began with; empty if they are built in."""
        return next(iter(self.storage.source.values()), "")
