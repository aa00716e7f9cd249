"""Images in an array, in a memory-mapped file, or in files that are decoded when needed; and labelled views of them."""

from __future__ import annotations

import mmap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from tapfl.data.folders import listed
from tapfl.errors import DataError
from tapfl.store import Pieces

AT_ONCE = 256  # images per read when all images are read
LONGEST_NAME = 200  # most characters of a class name
ORDERING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they change the order of the text after them


def is_plain(name: str) -> bool:
    """Returns whether a class name can be shown: of 1 to LONGEST_NAME characters, none of which controls the screen."""
    hidden = (unicodedata.category(letter) in ("Cc", "Cs") or letter in ORDERING for letter in name)
    return 0 < len(name) <= LONGEST_NAME and not any(hidden)


class Images(Protocol):
    """All images of a source, in the same size. `read` returns copies.

    Attributes:
        shape: (height, width, channels).
        key: identifies the content without reading an image; empty if only the bytes of the images do.
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def key(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Returns the images at these positions, in that order, uint8 (n, height, width, channels)."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images of an array in memory, or of a memory-mapped one, whose pages are released after each read.

    Attributes:
        array: uint8 (n, height, width, channels).
        key: as in `Images`.
    """

    array: np.ndarray
    key: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.array.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self.array)

    def read(self, positions: np.ndarray) -> np.ndarray:
        images: np.ndarray = np.asarray(self.array[positions])
        forget(self.array)
        return images


def forget(array: np.ndarray) -> None:
    """Releases the pages of a memory-mapped array from this process; the system may keep them in its page cache."""
    mapped = getattr(array, "_mmap", None)  # an attribute of np.memmap
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def in_order(count: int, batch: int) -> Iterator[np.ndarray]:
    """Yields the positions 0..count-1 in order, `batch` at a time."""
    for start in range(0, count, batch):
        yield np.arange(start, min(start + batch, count))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of a source, usually with labels. It is a view that stores positions and labels, but no images.

    Attributes:
        images: all images of the source.
        labels: positions in `classes`, int64 (n,); all -1 if the images have no labels.
        classes: class names in the order of the labels, in Unicode's NFC; empty if the images have no labels.
        owners: natural device of each image as a position in `ids`, int64 (n,); None if unknown.
        ids: names of the natural devices, such as users or hospitals, sorted, in Unicode's NFC.
        identity: hash of each image's pixels (`tapfl.data.changing`), int64 (n,); None if not needed.
        fingerprint: identifies the content of the whole source: a hash of an .npz file, or of a folder's names, sizes
            and times. `subset` keeps it.
        left_out: reason -> number of files of the source that are not among the images.
        positions: positions in `images`, int64 (n,); None for all of them in order.
    """

    images: Images
    labels: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    positions: np.ndarray | None = None
    owners: np.ndarray | None = None
    ids: tuple[str, ...] = ()
    identity: np.ndarray | None = None

    @classmethod
    def of(cls, array: np.ndarray, labels: np.ndarray, classes: Sequence[str], fingerprint: str = "") -> ImageSet:
        """Returns the images of an array, uint8 (n, height, width, channels), channels 1 or 3."""
        return cls(ArrayImages(array), labels, tuple(classes), fingerprint)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(number of images, height, width, channels)."""
        return len(self), *self.images.shape

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, chosen: np.ndarray | Sequence[int] | None = None) -> np.ndarray:
        """Returns the images at these positions of the set, or all, uint8 (n, height, width, channels)."""
        return self.images.read(self._at(np.arange(len(self)) if chosen is None else np.asarray(chosen)))

    def subset(self, chosen: np.ndarray) -> ImageSet:
        """Returns the images at these positions of the set, in that order; no image is read or copied."""
        owners, identity = (None if column is None else column[chosen] for column in (self.owners, self.identity))
        labels, positions = self.labels[chosen], self._at(chosen)
        return replace(self, labels=labels, positions=positions, owners=owners, identity=identity)

    @property
    def held(self) -> tuple[str, ...]:
        """The names of the classes that have images, sorted."""
        return tuple(sorted(self.count_by_class()))

    def count_by_class(self) -> dict[str, int]:
        """Returns the number of images of each class that has any, by name."""
        labels, counts = np.unique(self.labels, return_counts=True)
        return {self.classes[label]: count for label, count in zip(labels, counts.tolist(), strict=True) if label >= 0}

    @property
    def owner_names(self) -> tuple[str, ...]:
        """The ids of the natural devices that these images come from; empty if unknown."""
        return () if self.owners is None else tuple(self.ids[i] for i in np.unique(self.owners))

    def _at(self, chosen: np.ndarray) -> np.ndarray:
        return chosen if self.positions is None else self.positions[chosen]

    def content(self) -> list[Pieces]:
        """Returns what identifies the images, without labels, for `content_hash`.

        This is the key of the source and the positions, or if the source has no key, the bytes of the images.
        """
        if not self.images.key:
            return [Pieces(int(np.prod(self.shape)), self._pieces())]
        positions = np.arange(len(self)) if self.positions is None else self.positions
        key = self.images.key.encode()
        return [Pieces(len(key), (key,)), Pieces(positions.nbytes, (np.ascontiguousarray(positions),))]

    def _pieces(self) -> Iterator[np.ndarray]:
        for part in in_order(len(self), AT_ONCE):
            yield np.ascontiguousarray(self.read(part))

    def require(self, name: str, fingerprint: str) -> ImageSet:
        """Returns the images. Raises DataError if they have another fingerprint, unless `fingerprint` is empty."""
        if fingerprint and fingerprint != self.fingerprint:  # not in the message, because it reaches the server
            raise DataError(f"{name}: the images changed since this run began")
        return self

    def described(self, kind: str = "") -> str:
        """Returns a line with the number of images and classes, the image size, and what was left out.

        Args:
            kind: an adjective for these images, such as `private`.
        """
        height, width, channels = self.images.shape
        colours = "grey" if channels == 1 else "RGB"
        images = f"{len(self)} {kind} images" if kind else f"{len(self)} images"
        empty = len(self.classes) - len(np.unique(self.labels))
        classes = f" of {len(self.classes)} classes{f' ({empty} without images)' if empty else ''}"
        classes = classes if self.classes else " without labels"
        owners = f" from {len(self.owner_names)} devices" if self.ids else ""
        line = f"{images}{classes}{owners}, used at {height} × {width} px, {colours}"
        return f"{line}; left out: {listed(self.left_out)}" if self.left_out else line
