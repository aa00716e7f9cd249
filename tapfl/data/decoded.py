"""Pictures in the size of a backbone: decoded once into a file that all processes map, or each time they are read.

A source that fits the limit is decoded completely when it is first opened, so that a damaged picture is reported before
anything else happens. Of a larger source, only a sample is decoded at first. Evenly spaced images of it have a place in
the file, where they are stored when they are first read. All others are decoded each time.

Pictures are decoded in threads, not by torch's DataLoader. Pillow releases the GIL while it decodes and scales, so
threads are as fast, and avoid processes that would each import torch, in every worker and again for every device.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tapfl.data.images import ArrayImages, Images, forget, in_order
from tapfl.errors import DataError
from tapfl.progress import stage
from tapfl.store import remove_leftovers, whole_file

DIM = 16  # of 255; the largest value of 12-bit data in 16-bit files; no source of 8-bit pictures is darker throughout
AT_ONCE = 64  # pictures decoded between two writes
DAY = 86400.0  # seconds; a temporary file that has not changed for so long is that of a killed process
SAMPLE = 256  # pictures of a source beyond the limit that are checked when it is first opened

T = TypeVar("T")


def cores() -> int:
    """Returns the number of threads to use: OMP_NUM_THREADS, which Ray sets to the CPUs of a worker, or all cores."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) else len(os.sched_getaffinity(0))


def ahead(read: Callable[[np.ndarray], T], batches: Iterable[np.ndarray]) -> Iterator[T]:
    """Yields ``read(batch)`` for each batch of positions. With more than one core, it reads the next batch ahead."""
    if cores() == 1:
        yield from map(read, batches)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as reader:
        waiting: deque[Future[T]] = deque()
        for batch in batches:
            waiting.append(reader.submit(read, batch))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """Images that are decoded each time they are read.

    Attributes:
        decode: maps a position to an image, uint8 of `shape`; called from several threads.
        count: number of images.
        shape: (height, width, channels).
        key: as in `Images`; also the name of their file in the cache.
    """

    decode: Callable[[int], np.ndarray]
    count: int
    shape: tuple[int, int, int]
    key: str

    def __len__(self) -> int:
        return self.count

    def read(self, positions: np.ndarray) -> np.ndarray:
        images = np.empty((len(positions), *self.shape), np.uint8)
        several = cores() > 1 and len(positions) > 1
        # ignored are warnings about unusual metadata
        with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(cores()) as threads:
            for i, image in enumerate((threads.map if several else map)(self.decode, positions.tolist())):
                images[i] = image
        return images


@dataclass(frozen=True, eq=False)
class PartlyKept:
    """Images of which some, evenly spaced, have a place in a file and are written there when they are first read.

    A place holds the pixels and their checksum, so any number of processes may write, and may be killed while writing.
    """

    decoded: DecodedImages
    file: Path
    places: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.decoded.shape

    @property
    def key(self) -> str:
        return self.decoded.key

    def __len__(self) -> int:
        return len(self.decoded)

    def read(self, positions: np.ndarray) -> np.ndarray:
        images, places = np.empty((len(positions), *self.shape), np.uint8), self._places(positions)
        missing = np.ones(len(positions), bool)
        records = np.load(self.file, mmap_mode="r")
        for i in np.flatnonzero(places >= 0):
            record = records[places[i]]
            images[i] = record["pixels"]
            missing[i] = not record["sum"] or zlib.crc32(images[i]) != record["sum"]
        forget(records)
        if missing.any():
            images[missing] = self.decoded.read(positions[missing])
            self._write(images[missing], places[missing])
        return images

    def _places(self, positions: np.ndarray) -> np.ndarray:
        """Returns the place of each image in the file, int64 (n,), or -1 if it has none."""
        count, most = len(self), max(self.places, 1)
        near = positions * self.places // count
        return np.where((near * count + most - 1) // most == positions if self.places else False, near, -1)

    def _write(self, images: np.ndarray, places: np.ndarray) -> None:
        kind = _record(self.shape)
        with suppress(OSError):  # if the disk is full or not writable, the images are decoded again next time
            start = self.file.stat().st_size - self.places * kind.itemsize
            file = os.open(self.file, os.O_WRONLY)
            try:
                for i in np.flatnonzero(places >= 0):
                    record = np.array((zlib.crc32(images[i]), images[i]), kind)
                    os.pwrite(file, record.tobytes(), start + int(places[i]) * kind.itemsize)
            finally:
                os.close(file)


def _record(shape: tuple[int, int, int]) -> np.dtype[Any]:
    return np.dtype([("sum", "<u4"), ("pixels", "u1", shape)])


@dataclass(frozen=True)
class DecodedCache:
    """A folder of decoded pictures, shared by all runs and processes on a machine.

    Attributes:
        limit: largest size of the file of one source, in bytes.
    """

    folder: Path
    limit: float

    def keep(self, decoded: DecodedImages, source: str) -> Images:
        """Returns the same images backed by a file, as far as they fit in it. The file is made if it does not exist.

        Args:
            source: name of the source, for messages.

        Raises:
            DataError: if a picture that is checked cannot be decoded, or if all of them are nearly black.
        """
        whole = self.folder / f"{decoded.key}.npy"
        kind = _record(decoded.shape)
        if not whole.exists():
            size = int(np.prod(decoded.shape))
            if len(decoded) * size > self.limit:
                return self._part(decoded, int(self.limit // kind.itemsize), source)
            _write_whole(whole, decoded, source)
        return ArrayImages(np.load(whole, mmap_mode="r"), decoded.key)

    def _part(self, decoded: DecodedImages, places: int, source: str) -> Images:
        file = self.folder / f"{decoded.key}-{places}.npy"
        if not file.exists():
            spread = np.unique(np.linspace(0, len(decoded) - 1, SAMPLE).astype(np.int64))
            refuse_dim(int(decoded.read(spread).max()), source)
            remove_leftovers(self.folder, DAY)
            with whole_file(file) as temporary:
                np.lib.format.open_memmap(temporary, "w+", _record(decoded.shape), (places,))
        return PartlyKept(decoded, file, places)


def _write_whole(file: Path, decoded: DecodedImages, source: str) -> None:
    count = len(decoded)
    header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": (count, *decoded.shape)}
    remove_leftovers(file.parent, DAY)
    with whole_file(file) as temporary, temporary.open("wb") as out, stage("reading images") as advance:
        np.lib.format.write_array_header_1_0(out, header)
        advance(0, count)
        brightest = 0
        for part in in_order(count, AT_ONCE):
            images = decoded.read(part)
            out.write(images.data)
            brightest = max(brightest, int(images.max()))
            advance(int(part[-1]) + 1, count)
        refuse_dim(brightest, source)


def refuse_dim(brightest: int, source: str) -> None:
    """Raises DataError if `brightest`, the largest value of a whole source, is nearly black."""
    if 0 < brightest <= DIM:
        raise DataError(
            f"data source {source!r}: all images are nearly black (no value is above {brightest} of 255), as "
            "12-bit values in 16-bit files are, or 0 to 1 as integers; accepted: values that use the whole range"
        )
