"""Folders of images: which files are images of which class, and which files are left out."""

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

# what Pillow decodes without further programs; of an animation the first picture is used
IMAGE_ENDINGS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".bmp", ".dib", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
}
# what file servers and archives put beside pictures: thumbnails, deleted files, metadata
SYSTEM_FOLDERS = {
    "@eaDir",
    "#recycle",
    "@Recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "__MACOSX",
    "lost+found",
}
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # of a data set, not classes
MANY, FRESH = 100_000, 60.0  # images, seconds: a larger source is looked at again after that time
BESIDE = "images outside the classes' folders"
ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet's validation part, where one folder holds all classes


class Names:
    """Paths below a folder, as bytes without a Python object each: a million of them take 50 MB."""

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
        classes: names in NFC, in which all systems can agree, sorted; none if the images lie in the folder itself.
        counts: int64, the number of images of each class.
        names: paths of the images below `root`, class by class, sorted.
        left_out: reason -> number of files or folders that are no images.
    """

    root: Path
    classes: tuple[str, ...]
    counts: np.ndarray
    names: Names
    left_out: Mapping[str, int]

    @property
    def labels(self) -> np.ndarray:
        """The position in `classes` of each image, int64 (n,); -1 where there are none."""
        if not self.classes:
            return np.full(len(self.names), -1, dtype=np.int64)
        return np.repeat(np.arange(len(self.classes)), self.counts)

    @property
    def owners(self) -> list[str]:
        """The name, in NFC, of the device's folder in which each image lies."""
        return [sys.intern(unicodedata.normalize("NFC", name.split("/", 1)[0])) for name in self.names]

    def file(self, position: int) -> str:
        """Returns the path of an image."""
        return os.path.join(self.root, self.names[position])  # noqa: PTH118 (a million times)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names, sizes and times of the images; the folder's own place does not count.

        Raises:
            DataError: if one has gone, or its folder may be listed and not entered.
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
    """What was found so far: class -> paths below `root`, and images beside the folders of the classes."""

    root: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


@recent(FRESH, keep=lambda listing: len(listing.names) > MANY)
def list_images(root: Path, by_device: bool = False, flat: bool = False) -> Listing:
    """Returns the images of a folder that has one folder a class, or is Tiny-ImageNet's validation part.

    Images may lie in folders within the class's folder. Links are followed.

    Args:
        by_device: it has one folder a device, and each of them one folder a class.
        flat: accept images that lie in the folder itself as images without classes, if no folder in it has any.

    Raises:
        NoImagesError: if it has none.
        DataError: if it has the parts of a data set or a single folder of folders in place of classes,
            or two classes are one folder.
    """
    found = _Found(root)
    expected = "one folder a device with one folder of images a class" if by_device else "one folder of images a class"
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
        there = f" (found {listed(found.left_out)})" if found.left_out else ""
        raise NoImagesError(f"data source {str(root)!r}: holds no images; {expected} is expected{there}")
    if not by_device and not (root / ANNOTATIONS).is_file():
        _refuse_one_above(root, files)
    counts = np.array([len(paths) for paths in files.values()])
    return Listing(root, tuple(files), counts, Names(chain(*files.values())), found.left_out)


def _parts(path: str) -> list[str]:
    return path.split("/")


def listed(left_out: Mapping[str, int]) -> str:
    """Returns what was left out in words, the most frequent first: ``hidden: 8, .txt files: 2``."""
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{reason}: {count}" for reason, count in most[:8]]
    return ", ".join([*shown, f"others: {sum(count for _, count in most[8:])}"] if most[8:] else shown)


def _entries(folder: str | Path, left_out: Counter[str]) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """Yields the folders and the images in a folder, and whether each is a folder; counts what else is there."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif entry.name in SYSTEM_FOLDERS:
            left_out["folders of the system"] += 1
        elif entry.is_dir():
            yield entry, True
        elif not entry.is_file():
            left_out["broken links" if entry.is_symlink() else "neither files nor folders"] += 1
        elif (ending := os.path.splitext(entry.name)[1].lower()) in IMAGE_ENDINGS:  # noqa: PTH122 (a million times)
            yield entry, False
        else:
            left_out[f"{ending} files" if ending else "files without an ending"] += 1


def _folders(found: _Found, root: Path) -> list[Path]:
    """Returns the folders in `root`, sorted, and counts what else is there. Raises DataError if two are the same."""
    folders = []
    for entry, is_folder in sorted(_entries(root, found.left_out), key=lambda each: each[0].name):
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
        else "one folder of images a class is expected"
    )
    names = " and ".join(folder.name for folder in folders)
    raise DataError(f"data source {str(root)!r}: has the folders {names} instead of classes; {accepted}")


def _refuse_one_twice(root: Path, folders: list[Path]) -> None:
    """Raises DataError if two folders are one, by a link: each image would be there twice."""
    names: dict[str, str] = {}
    for folder in folders:
        if (other := names.setdefault(os.path.realpath(folder), folder.name)) != folder.name:
            raise DataError(f"data source {str(root)!r}: {other!r} and {folder.name!r} are the same folder")


def _refuse_one_above(root: Path, files: Mapping[str, Sequence[str]]) -> None:
    """Raises DataError if the only class holds folders of images and no images beside them: those are the classes."""
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
    """Yields the images in a folder and in folders within it, as paths that begin with `below`.

    Args:
        above: real paths of the folders on the way here, so that a link to one of them is not followed for ever.
    """
    if (here := os.path.realpath(folder)) in above:
        left_out["links that lead in a circle"] += 1
        return
    for entry, is_folder in _entries(folder, left_out):
        if is_folder:
            yield from _images(entry.path, f"{below}/{entry.name}", left_out, (*above, here))
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
