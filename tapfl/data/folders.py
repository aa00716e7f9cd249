"""Folders of images: finds the images and their classes, and counts the files that are left out."""

from __future__ import annotations

import hashlib
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from tapfl.errors import DataError, NoImagesError
from tapfl.memo import recent

# formats that Pillow decodes without other programs; of an animation, the first picture is used
IMAGE_ENDINGS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".bmp", ".dib", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
}
# folders that file servers and archives add: thumbnails, deleted files, metadata
SYSTEM_FOLDERS = {
    "@eaDir",
    "#recycle",
    "@Recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "__MACOSX",
    "lost+found",
}
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # parts of a data set, not classes
MANY, FRESH = 100_000, 60.0  # the listing of a source with more images than MANY is cached for FRESH seconds
BESIDE = "images outside the classes' folders"
ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet's validation part, where one folder holds all classes


class Names:
    """Relative paths, stored in one bytes object instead of a Python object each: a million of them take 50 MB."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, at: int) -> str:
        return os.fsdecode(self._bytes[self._ends[at] : self._ends[at + 1]])

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Attributes:
        root: the folder.
        classes: names, sorted and in NFC, which is the same on all systems; empty if the images are directly in `root`.
        counts: number of images of each class, int64.
        names: paths of the images relative to `root`, class by class, sorted.
        left_out: reason -> number of files or folders that are not images.
    """

    root: Path
    classes: tuple[str, ...]
    counts: np.ndarray
    names: Names
    left_out: Mapping[str, int]

    @property
    def labels(self) -> np.ndarray:
        """The position in `classes` of each image, int64 (n,); -1 if there are no classes."""
        if not self.classes:
            return np.full(len(self.names), -1, dtype=np.int64)
        return np.repeat(np.arange(len(self.classes)), self.counts)

    @property
    def owners(self) -> list[str]:
        """The name, in NFC, of the device's folder that each image is in."""
        return [sys.intern(unicodedata.normalize("NFC", name.split("/", 1)[0])) for name in self.names]

    def file(self, position: int) -> str:
        """Returns the path of an image."""
        return os.path.join(self.root, self.names[position])  # noqa: PTH118 (a million times)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images' names, sizes and times. It does not depend on the path of the folder.

        Raises:
            DataError: if an image has disappeared, or its folder can be listed but not entered.
        """
        digest = hashlib.sha256()
        parts = zip(self.classes, self.counts, strict=True) if self.classes else [("", len(self.names))]
        classes = (name for name, count in parts for _ in range(count))
        for position, (name, path) in enumerate(zip(classes, self.names, strict=True)):
            file = self.file(position)
            try:
                status = os.stat(file)  # noqa: PTH116
            except OSError as error:
                raise DataError(f"image {file!r}: cannot be read ({error.strerror})") from None
            line = f"{name} {path} {status.st_size} {status.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


@dataclass
class _Found:
    """The images found so far.

    Attributes:
        files: class -> paths relative to `root`.
        beside: names of images that are outside the classes' folders.
        left_out: as in `Listing`.
    """

    root: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


@recent(FRESH, keep=lambda listing: len(listing.names) > MANY)
def list_images(root: Path, by_device: bool = False, flat: bool = False, nested: bool = False) -> Listing:
    """Returns the images of a folder that has one folder per class, or is Tiny-ImageNet's validation part.

    Images may be in folders within the class's folder. Links are followed.

    Args:
        by_device: the folder has one folder per device, and each of these one folder per class.
        flat: accept images directly in the folder as images without classes, if its subfolders have no images.
        nested: accept one class that contains only folders of images.

    Raises:
        NoImagesError: if there are no images.
        DataError: if the folder contains the parts of a data set, or without `nested` a single folder of folders,
            instead of classes, or if two classes are the same folder.
    """
    found = _Found(root)
    expected = ("one folder per device with " if by_device else "") + "one folder of images per class"
    try:
        if by_device:
            for device in _folders(found, root):
                _by_class(found, device)
        elif (root / ANNOTATIONS).is_file():
            _annotated(found)
        else:
            _by_class(found, root)
    except OSError as error:
        raise DataError(f"data source {str(root)!r}: cannot be read ({error.strerror}: {error.filename})") from None
    files = {name: sorted(paths, key=_parts) for name, paths in sorted(found.files.items()) if paths}
    if flat and found.beside and not files:
        del found.left_out[BESIDE]
        return Listing(root, (), np.zeros(0, np.int64), Names(sorted(found.beside)), found.left_out)
    if not files:
        others = f" (found {listed(found.left_out)})" if found.left_out else ""
        raise NoImagesError(f"data source {str(root)!r}: holds no images; {expected} is expected{others}")
    if not by_device and not nested and not (root / ANNOTATIONS).is_file():
        _refuse_one_above(root, files)
    counts = np.array([len(paths) for paths in files.values()])
    return Listing(root, tuple(files), counts, Names(chain(*files.values())), found.left_out)


def _parts(path: str) -> list[str]:
    return path.split("/")


def listed(left_out: Mapping[str, int]) -> str:
    """Returns what was left out as text, the most frequent reason first: ``hidden: 8, .txt files: 2``."""
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{reason}: {count}" for reason, count in most[:8]]
    return ", ".join([*shown, f"others: {sum(count for _, count in most[8:])}"] if most[8:] else shown)


def _entries(folder: str | Path, left_out: Counter[str]) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """Yields the folders and images in a folder, each with whether it is a folder. Counts everything else."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif entry.name in SYSTEM_FOLDERS:
            left_out["system folders"] += 1
        elif entry.is_dir():
            yield entry, True
        elif not entry.is_file():
            left_out["broken links" if entry.is_symlink() else "neither files nor folders"] += 1
        elif (ending := os.path.splitext(entry.name)[1].lower()) in IMAGE_ENDINGS:  # noqa: PTH122 (a million times)
            yield entry, False
        else:
            left_out[f"{ending} files" if ending else "files without an extension"] += 1


def _folders(found: _Found, root: Path) -> list[Path]:
    """Returns the folders in `root`, sorted, and notes everything else in `found`.

    Raises:
        DataError: if the folders are the parts of a data set, or two of them are the same.
    """
    folders = []
    for entry, is_folder in sorted(_entries(root, found.left_out), key=lambda item: item[0].name):
        if is_folder:
            folders.append(Path(entry.path))
        else:
            found.left_out[BESIDE] += 1
            found.beside.append(entry.name)
    _refuse_parts(root, folders)
    _refuse_one_twice(root, folders)
    return folders


def _by_class(found: _Found, root: Path) -> None:
    for folder in _folders(found, root):
        held = found.files.setdefault(unicodedata.normalize("NFC", folder.name), [])
        before = len(held)
        below = folder.relative_to(found.root).as_posix()
        held.extend(_images(str(folder), below, found.left_out, (os.path.realpath(found.root),)))
        if len(held) == before:
            found.left_out["folders without images"] += 1


def _refuse_parts(root: Path, folders: list[Path]) -> None:
    """Raises DataError if the folders are the parts of a data set."""
    if len(folders) < 2 or any(folder.name.lower() not in PARTS for folder in folders):
        return
    with_classes = [folder for folder in folders if any(child.is_dir() for child in folder.iterdir())]
    which = "another as the public pool (data.public)" if len(with_classes) > 1 else "leave the others out"
    accepted = (
        f"name one of them, such as {str(with_classes[0])!r} (data.source), and {which}"
        if with_classes
        else "one folder of images per class is expected"
    )
    names = " and ".join(folder.name for folder in folders)
    raise DataError(f"data source {str(root)!r}: has the folders {names} instead of classes; {accepted}")


def _refuse_one_twice(root: Path, folders: list[Path]) -> None:
    """Raises DataError if two folders are the same by a link, because each image would be counted twice."""
    names: dict[str, str] = {}
    for folder in folders:
        if (other := names.setdefault(os.path.realpath(folder), folder.name)) != folder.name:
            raise DataError(f"data source {str(root)!r}: {other!r} and {folder.name!r} are the same folder")


def _refuse_one_above(root: Path, files: Mapping[str, Sequence[str]]) -> None:
    """Raises DataError if there is one class and it contains only folders of images: these are probably the classes."""
    if len(files) != 1:
        return
    ((name, paths),) = files.items()
    parts = [_parts(path) for path in paths]
    if len({part[1] for part in parts}) > 1 and all(len(part) > 2 for part in parts):
        within, folder = len({part[1] for part in parts}), str(root / parts[0][0])
        raise DataError(
            f"data source {str(root)!r}: has one folder, {name!r}, with {within} folders of images in it; "
            f"if those are the classes, name {folder!r}"
        )


def _images(folder: str, below: str, left_out: Counter[str], above: tuple[str, ...]) -> Iterator[str]:
    """Yields the images in a folder and its subfolders, as paths that begin with `below`.

    Args:
        above: real paths of the parent folders, so that a link to one of them is not followed forever.
    """
    if (real := os.path.realpath(folder)) in above:
        left_out["circular links"] += 1
        return
    for entry, is_folder in _entries(folder, left_out):
        if is_folder:
            yield from _images(entry.path, f"{below}/{entry.name}", left_out, (*above, real))
        else:
            yield f"{below}/{entry.name}"


def _annotated(found: _Found) -> None:
    """Lists the images of Tiny-ImageNet's validation part by the classes that its table names."""
    table, images = found.root / ANNOTATIONS, found.root / "images"
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{str(table)!r}: is not UTF-8 ({error.reason})") from None
    for number, line in enumerate(lines, start=1):
        name, tab, rest = line.partition("\t")
        if not tab or not (images / name).is_file():
            raise DataError(f"{str(table)!r}: line {number} names no image and class: {line[:80]!r}")
        found.files.setdefault(unicodedata.normalize("NFC", rest.split("\t")[0]), []).append(f"images/{name}")
    named = sum(map(len, found.files.values()))
    if others := sum(1 for entry in os.scandir(images) if entry.is_file()) - named:
        found.left_out[f"not in {ANNOTATIONS}"] += others
