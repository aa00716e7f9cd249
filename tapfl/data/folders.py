"""Folders of images: which files are images of which class, and which files are left out."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tapfl.errors import DataError

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
ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet's validation part, where one folder holds all classes


@dataclass
class Listing:
    """The images of a folder.

    Attributes:
        root: the folder.
        files: class -> its images. Names are in NFC, in which all systems can agree; classes and files are sorted.
        by_device: whether the folders of classes lie in one folder a device.
        left_out: reason -> number of files or folders that are no images.
    """

    root: Path
    files: dict[str, list[Path]] = field(default_factory=dict)
    by_device: bool = False
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def owners(self) -> list[str]:
        """The name, in NFC, of the device's folder in which each image lies, in the order of `files`."""
        return [
            unicodedata.normalize("NFC", file.relative_to(self.root).parts[0])
            for files in self.files.values()
            for file in files
        ]

    @property
    def fingerprint(self) -> str:
        """A hash of names, sizes and times of the images; the folder's own place does not count.

        Raises:
            DataError: if one has gone, or its folder may be listed and not entered.
        """
        digest = hashlib.sha256()
        for name, files in self.files.items():
            for file in files:
                try:
                    status = file.stat()
                except OSError as error:
                    raise DataError(f"image {str(file)!r}: cannot be read ({error.strerror})") from None
                line = f"{name} {file.relative_to(self.root)} {status.st_size} {status.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def list_images(root: Path, by_device: bool = False) -> Listing:
    """Returns the images of a folder that has one folder a class, or is Tiny-ImageNet's validation part.

    Images may lie in folders within the class's folder. Links are followed.

    Args:
        by_device: it has one folder a device, and each of them one folder a class.

    Raises:
        DataError: if it has no images, has the parts of a data set or a single folder of folders in place of classes,
            or two classes are one folder.
    """
    listing = Listing(root, by_device=by_device)
    expected = "one folder a device with one folder of images a class" if by_device else "one folder of images a class"
    try:
        if by_device:
            for device in _folders(listing, root):
                _by_class(listing, device)
        elif (root / ANNOTATIONS).is_file():
            _annotated(listing)
        else:
            _by_class(listing, root)
    except OSError as error:
        raise DataError(f"data source {str(root)!r}: cannot be read ({error.strerror}: {error.filename})") from None
    listing.files = {name: sorted(files) for name, files in sorted(listing.files.items()) if files}
    if not listing.files:
        found = f" (found {listed(listing.left_out)})" if listing.left_out else ""
        raise DataError(f"data source {str(root)!r}: holds no images; {expected} is expected{found}")
    if not by_device:
        _refuse_one_above(listing)
    return listing


def listed(left_out: Mapping[str, int]) -> str:
    """Returns what was left out in words, the most frequent first: ``hidden: 8, .txt files: 2``."""
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{reason}: {count}" for reason, count in most[:8]]
    return ", ".join([*shown, f"others: {sum(count for _, count in most[8:])}"] if most[8:] else shown)


def _kind(name: str) -> str:
    """Returns the reason for which a file of this name is no image."""
    return f"{Path(name).suffix.lower()} files" if Path(name).suffix else "files without an ending"


def _folders(listing: Listing, root: Path) -> list[Path]:
    """Returns the folders in `root`, sorted, and counts what else is there. Raises DataError if two are the same."""
    folders = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            listing.left_out["hidden"] += 1
        elif entry.name in SYSTEM_FOLDERS:
            listing.left_out["folders of the system"] += 1
        elif entry.is_dir():
            folders.append(Path(entry.path))
        elif entry.is_symlink() and not entry.is_file():
            listing.left_out["broken links"] += 1
        elif Path(entry.name).suffix.lower() in IMAGE_ENDINGS:
            listing.left_out["images outside the classes' folders"] += 1
        else:
            listing.left_out[_kind(entry.name)] += 1
    _refuse_parts(root, folders)
    _refuse_one_twice(root, folders)
    return folders


def _by_class(listing: Listing, root: Path) -> None:
    for folder in _folders(listing, root):
        held = listing.files.setdefault(unicodedata.normalize("NFC", folder.name), [])
        before = len(held)
        held.extend(_images(folder, listing.left_out, (os.path.realpath(listing.root),)))
        if len(held) == before:
            listing.left_out["folders without images"] += 1


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
    raise DataError(f"data source {str(root)!r}: has the parts {names} in place of classes; {accepted}")


def _refuse_one_twice(root: Path, folders: list[Path]) -> None:
    """Raises DataError if two folders are one, by a link: each image would be there twice."""
    names: dict[str, str] = {}
    for folder in folders:
        if (other := names.setdefault(os.path.realpath(folder), folder.name)) != folder.name:
            raise DataError(f"data source {str(root)!r}: {other!r} and {folder.name!r} are the same folder")


def _refuse_one_above(listing: Listing) -> None:
    """Raises DataError if the only class holds folders of images and no images beside them: those are the classes."""
    if len(listing.files) != 1 or (listing.root / ANNOTATIONS).is_file():
        return
    ((name, files),) = listing.files.items()
    within = {file.relative_to(listing.root).parts[1] for file in files}
    if len(within) > 1 and not any(file.parent.parent == listing.root for file in files):
        folder = str(files[0].parents[len(files[0].relative_to(listing.root).parts) - 2])
        raise DataError(
            f"data source {str(listing.root)!r}: has one folder, {name!r}, with {len(within)} folders of images in it; "
            f"if those are the classes, name {folder!r}"
        )


def _images(folder: Path, left_out: Counter[str], above: tuple[str, ...]) -> Iterator[Path]:
    """Yields the images in a folder and in folders within it.

    Args:
        above: real paths of the folders on the way here, so that a link to one of them is not followed for ever.
    """
    if (here := os.path.realpath(folder)) in above:
        left_out["links that lead in a circle"] += 1
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif entry.name in SYSTEM_FOLDERS:
            left_out["folders of the system"] += 1
        elif entry.is_dir():
            yield from _images(Path(entry.path), left_out, (*above, here))
        elif not entry.is_file():
            left_out["broken links" if entry.is_symlink() else "neither files nor folders"] += 1
        elif Path(entry.name).suffix.lower() in IMAGE_ENDINGS:
            yield Path(entry.path)
        else:
            left_out[_kind(entry.name)] += 1


def _annotated(listing: Listing) -> None:
    """Lists the images of Tiny-ImageNet's validation part by the classes that its table names."""
    table, images = listing.root / ANNOTATIONS, listing.root / "images"
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{str(table)!r}: is not UTF-8 ({error.reason})") from None
    for number, line in enumerate(lines, start=1):
        name, tab, rest = line.partition("\t")
        if not tab or not (images / name).is_file():
            raise DataError(f"{str(table)!r}: line {number} names no image and class: {line[:80]!r}")
        listing.files.setdefault(unicodedata.normalize("NFC", rest.split("\t")[0]), []).append(images / name)
    named = sum(map(len, listing.files.values()))
    if others := sum(1 for entry in os.scandir(images) if entry.is_file()) - named:
        listing.left_out[f"not in {ANNOTATIONS}"] += others
