"""Images as they lie: in an array, in a file that is mapped into memory, or in files that are decoded when needed."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from tapfl.data.folders import listed
from tapfl.errors import DataError
from tapfl.store import Pieces

AT_ONCE = 256  # images that are read together where all of them are read


class Images(Protocol):
    """All images of a source, in one size. They stay where they are; what is read is a copy.

    Attributes:
        shape: height, width, channels.
        key: names their content without an image being read; empty: only their bytes do.
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
    """Images of an array in memory, or of one that is mapped: what was read of it counts as no memory of the process.

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
        found: np.ndarray = np.asarray(self.array[positions])
        forget(self.array)
        return found


def forget(array: np.ndarray) -> None:
    """Gives the pages of a mapped array back; the system keeps the file's content as long as it has room."""
    mapped = getattr(array, "_mmap", None)  # of np.memmap
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def in_order(count: int, batch: int) -> Iterator[np.ndarray]:
    """Yields the positions 0..count-1 in order, `batch` at a time."""
    for start in range(0, count, batch):
        yield np.arange(start, min(start + batch, count))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images, usually with labels: a view of a source, which holds positions and labels and no image.

    Attributes:
        images: all images of the source.
        labels: int64 (n,), positions in `classes`; -1 everywhere if the images have no labels.
        classes: names, in the order of the labels, in Unicode's NFC; none if the images have no labels.
        owners: int64 (n,), positions in `ids`; None: it is not known whose images they are.
        ids: of the natural devices, such as users or hospitals, sorted, in Unicode's NFC.
        identity: int64 (n,), of each image's pixels (`tapfl.data.changing`); None: not asked for.
        fingerprint: names the content of the whole source: a hash of an .npz file, of a folder's names, sizes and
            times; `subset` keeps it.
        left_out: reason -> number of files of the source that are not among the images.
        positions: int64 (n,) in `images`; None: all of them, in order.
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
        """Number of images, height, width, channels."""
        return len(self), *self.images.shape

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, chosen: np.ndarray | Sequence[int] | None = None) -> np.ndarray:
        """Returns the images at these positions of the set, or all, uint8 (n, height, width, channels)."""
        return self.images.read(self._at(np.arange(len(self)) if chosen is None else np.asarray(chosen)))

    def subset(self, chosen: np.ndarray) -> ImageSet:
        """Returns the images at these positions of the set, in that order; no image is read or copied."""
        owners, identity = (None if each is None else each[chosen] for each in (self.owners, self.identity))
        labels, positions = self.labels[chosen], self._at(chosen)
        return replace(self, labels=labels, positions=positions, owners=owners, identity=identity)

    @property
    def held(self) -> tuple[str, ...]:
        """The names of the classes that have images, sorted."""
        return tuple(sorted(self.count_by_class()))

    def count_by_class(self) -> dict[str, int]:
        """Returns the number of images of each class that has any, by name."""
        found, counts = np.unique(self.labels, return_counts=True)
        return {self.classes[label]: count for label, count in zip(found, counts.tolist(), strict=True) if label >= 0}

    @property
    def owner_names(self) -> tuple[str, ...]:
        """The ids of the devices that these images come from, as far as they are known."""
        return () if self.owners is None else tuple(self.ids[i] for i in np.unique(self.owners))

    def _at(self, chosen: np.ndarray) -> np.ndarray:
        return chosen if self.positions is None else self.positions[chosen]

    def content(self) -> list[Pieces]:
        """Returns what `content_hash` knows the images by, without labels: their bytes, or, where the source has a
        key, that and their positions."""
        if not self.images.key:
            return [Pieces(int(np.prod(self.shape)), self._pieces())]
        positions = np.arange(len(self)) if self.positions is None else self.positions
        key = self.images.key.encode()
        return [Pieces(len(key), (key,)), Pieces(positions.nbytes, (np.ascontiguousarray(positions),))]

    def _pieces(self) -> Iterator[np.ndarray]:
        for part in in_order(len(self), AT_ONCE):
            yield np.ascontiguousarray(self.read(part))

    def require(self, name: str, fingerprint: str) -> ImageSet:
        """Returns the images. Raises DataError if they are not those of `fingerprint`; empty: whatever they are."""
        if fingerprint and fingerprint != self.fingerprint:  # which the message must not tell: it reaches the server
            raise DataError(f"{name}: the images changed since this run began")
        return self

    def described(self, kind: str = "") -> str:
        """Returns in a line how many images of how many classes there are, of which size, and what was left out.

        Args:
            kind: a word for these images, such as `private`.
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
