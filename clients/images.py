"""The images of one device, their training and test parts, and the names of their classes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from flwr.common.logger import log

from clients import caches
from clients.storage import IMAGES_FILE, DeviceStorage
from tapfl.adapters.lora import AdaptedModel
from tapfl.compute import Compute, home
from tapfl.config import NEW_HEADS, RunConfig
from tapfl.data.changing import device_folders, drawn
from tapfl.data.contents import content_of, fingerprints, path_of
from tapfl.data.federated import DeviceSplit, require_enough
from tapfl.data.images import ImageSet
from tapfl.errors import ConfigError, NoImagesError
from tapfl.models.new_head import numbered
from tapfl.personalize.held_out import FEWEST, hold_out
from tapfl.seeds import numpy_generator


@dataclass(frozen=True)
class OwnImages:
    """The images of one device, which are kept in the worker's caches.

    Attributes:
        source: images that all belong to this device; empty: it has a part of the run's `data.source`.
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
            DataError: if the images differ from those at the start of the run, or if they may change and are too few
                at the start.
        """
        if self.config.data.changing:
            return self._begin_changing()
        option = ("data", self.source) if self.source else ("data.source", self.config.data.source)
        self.storage.begin(fingerprints([option], ids="" if self.source else self.config.data.ids))
        return len(self._divided[1].train)

    def _begin_changing(self) -> int:
        if self.storage.begun:
            with suppress(NoImagesError):
                return len(self._divided[1].train)
            return 0
        split = self._divided[1]
        require_enough(split, self.config.data, self.partition_id)
        if self.keeps_names:
            self.storage.save_classes(self.names)
        in_source = Path(self.source).parent == path_of(self.config.data.source)
        self.storage.begin_changing(Path(self.source).name if in_source else "")
        return len(split.train)

    @cached_property
    def present(self) -> np.ndarray:
        """The numbers of training and test images, for a reply, float64 (2,); (0,) if images cannot change.

        Both are 0 if there are too few images: the device then skips the round.
        """
        if not self.config.data.changing:
            return np.zeros(0)
        with suppress(NoImagesError):
            train, test = self.part("train"), self.part("test")
            enough = DeviceSplit(np.arange(len(train)), np.arange(len(test))).enough
            if enough and len(self._divided[0]) >= self.config.data.min_images:  # all images, as in `device_folders`
                return np.array([len(train), len(test)], dtype=np.float64)
        return np.zeros(2)

    @property
    def too_few(self) -> bool:
        return bool(len(self.present)) and not self.present.any()

    def note(self, classes: Sequence[str], train: Sequence[int], test: Sequence[int]) -> None:
        """Stores the numbers of training and test images of each class, and of images of other classes.

        Logs a warning if images are left out because their class is not among `classes`.
        """
        others: dict[str, int] = {}
        if self.config.data.changing:
            counts_now = self._divided[0].count_by_class()
            others = {name: count for name, count in counts_now.items() if name not in classes}
        if others:
            named = ", ".join(f"{name}: {count}" for name, count in others.items())
            log(logging.WARNING, "device %d: images of unknown classes are left out: %s", self.partition_id, named)
        counts = {"classes": list(classes), "train": list(train), "test": list(test)}
        more = {"ids": list(self.natural_ids), "left_out": others}
        self.storage.note(IMAGES_FILE, counts | {name: of for name, of in more.items() if of})

    def part(self, name: str) -> caches.Part:
        """Returns the `train` or `test` part, or `pooled`, the training parts of all devices of a simulation.

        Raises:
            ConfigError: for `pooled`, if the device has images of its own.
        """
        if name == "pooled" and self.source:
            accepted = "only a simulation has; this device has images of its own"
            raise ConfigError(f"personalize.method = 'pooled': needs the images of all devices, which {accepted}")
        classes = self.names if self.keeps_names else self.storage.classes if self.source or self.names else ()
        return caches.part(self._owner, name, classes, self.compute)

    def inputs(self, name: str, model: caches.AdaptedDevice) -> tuple[AdaptedModel, caches.Inputs]:
        """Returns a model, and a part of the images in the form that it takes (`caches.inputs`)."""
        return caches.inputs(model, self.part(name), name, self.config)

    @property
    def natural_ids(self) -> tuple[str, ...]:
        """The natural ids (such as writers or cameras) of the images, if they were divided among devices by these."""
        if self.storage.own_folder:
            return (self.storage.own_folder,)
        if self.source or self.config.data.divided_by != "device":
            return ()
        images, split = self._divided
        return images.subset(split.train).owner_names

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes of its training images, which a new head has rows for; empty with the backbone's own head."""
        if self.config.model.head not in NEW_HEADS:
            return ()
        if self.config.data.changing and self.keeps_names and self.storage.begun:
            return self.storage.classes  # rows keep their classes for the whole run
        images, split = self._divided
        return images.subset(split.train).held

    @property
    def keeps_names(self) -> bool:
        """Whether class names stay on the device, because its classifier is personal."""
        return self.config.model.head in NEW_HEADS and self.config.adapters.head == "personal"

    @property
    def reported(self) -> Sequence[str]:
        """The class names to report to the server; if names stay on the device, numbers in their place."""
        return numbered(self.names) if self.keeps_names else self.names

    @cached_property
    def trained_and_held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the training part of the images to train on, and of the held-out images, which choose α."""
        train, options, seed = self.part("train"), self.config.personalize, self.config.seed
        if not options.holds_out or options.held_out_share * len(train) < FEWEST:
            return np.arange(len(train)), np.arange(0)
        if self.config.data.changing:
            chosen = drawn(train.images, options.held_out_share, seed, "held-out")
            return np.flatnonzero(~chosen), np.flatnonzero(chosen)
        generator = numpy_generator(seed, "held-out", self.partition_id)
        return hold_out(home(train.labels).numpy(), options.held_out_share, generator)

    def weighing(self, round: int) -> list[np.ndarray]:
        """Returns positions in the training part, in batches, of the images that `Method.weigh` uses."""
        options, (trained, held_out) = self.config.personalize, self.trained_and_held_out
        if options.method != "fedala":
            return [held_out[first : first + 256] for first in range(0, len(held_out), 256)]
        drawn = numpy_generator(self.config.seed, "weigh", round, self.partition_id).permutation(trained)
        drawn = drawn[: math.ceil(options.ala_share * len(drawn))]
        return np.array_split(drawn, -(-len(drawn) // self.config.train.batch))

    @property
    def _divided(self) -> tuple[ImageSet, DeviceSplit]:
        return caches.images_of(self._owner)

    @cached_property
    def _owner(self) -> caches.Owner:
        if self.config.data.changing:
            known = content_of("data", self.source, nested=True)  # the device may have one class left
        else:
            known = next(iter(self.storage.source.values()), "")
        return caches.Owner(self.config, self.devices, self.partition_id, self.source, known)


def natural_folder(config: RunConfig, device: int, storage: DeviceStorage) -> str:
    """Returns the folder of a simulated device whose images may change: the one that it had at the start of the run.

    Raises:
        ConfigError: as for `device_folders`, or if there are too few folders.
    """
    if storage.own_folder:
        return str(path_of(config.data.source) / storage.own_folder)
    folders = device_folders(config.data)
    if device >= len(folders):
        raise ConfigError(f"device {device}: data.source = {config.data.source!r} has {len(folders)} folders")
    return str(folders[device])
