"""Sources of labelled images: scikit-learn's digits, an .npz file, an image folder, a Hugging Face name."""

from __future__ import annotations

import os
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tapfl.data.contents import file_fingerprint, no_such_source, path_of
from tapfl.data.folders import list_images, listed
from tapfl.data.hugging_face import fingerprint_of, open_table
from tapfl.data.transform import Transform, scaled_to_bytes
from tapfl.errors import DataError, message_of
from tapfl.progress import track
from tapfl.store import cache_folder, content_hash, whole_file

MOST_CLASSES = 2**16  # of which no model has more
DIM = 16  # of 255, to which 12 of 16 bits are scaled: no source of pictures is darker throughout
# of `IMAGE_ENDINGS`; what Pillow decodes by starting another program (EPS) is none of them, whatever a file's name
FORMATS = ("JPEG", "JPEG2000", "PNG", "BMP", "DIB", "GIF", "WEBP", "AVIF", "TIFF", "PPM", "TGA")


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        images: uint8 (n, height, width, channels), channels 1 or 3.
        labels: int64 (n,), positions in `classes`.
        classes: names, in the order of the labels, in Unicode's NFC.
        owners: int64 (n,), positions in `ids`; None: it is not known whose images they are.
        ids: of the natural devices, such as users or hospitals, sorted, in Unicode's NFC.
        fingerprint: names the content of the whole source: a hash of an .npz file, of a folder's names, sizes and
            times; `subset` keeps it.
        left_out: reason -> number of files of the source that are not among the images.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    owners: np.ndarray | None = None
    ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> ImageSet:
        """Returns the images at `indices`, in that order."""
        owners = None if self.owners is None else self.owners[indices]
        return replace(self, images=self.images[indices], labels=self.labels[indices], owners=owners)

    @property
    def owner_names(self) -> tuple[str, ...]:
        """The ids of the devices that these images come from, as far as they are known."""
        return () if self.owners is None else tuple(self.ids[i] for i in np.unique(self.owners))

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
        height, width, channels = self.images.shape[1:]
        colours = "grey" if channels == 1 else "RGB"
        images = f"{len(self)} {kind} images" if kind else f"{len(self)} images"
        empty = len(self.classes) - len(np.unique(self.labels))
        classes = f"{len(self.classes)} classes{f' ({empty} without images)' if empty else ''}"
        owners = f" from {len(self.owner_names)} devices" if self.ids else ""
        line = f"{images} of {classes}{owners}, used at {height} × {width} px, {colours}"
        return f"{line}; left out: {listed(self.left_out)}" if self.left_out else line


def load_images(source: str, transform: Transform | None = None, cache: Path | None = None, ids: str = "") -> ImageSet:
    """Returns all images of a source.

    Args:
        source: `digits`, the path of an .npz file (`images`, `labels`, optionally `classes`), the path of a folder
            with one folder of images a class (both parts of the Tiny-ImageNet release too), or ``hf:NAME[:SPLIT]``.
        transform: of the backbone, which resizes and crops every image to what it takes. None: images stay as they
            are, which digits and .npz files allow.
        cache: folder for images in the transform's size, which every process memory-maps; by default tapfl's own.
        ids: array of an .npz file or column of ``hf:`` that says from which device, by its id, each image comes; with
            any name a folder has one folder a device, and in each one folder of images a class. Empty: not asked for.

    Raises:
        DataError: if the source is missing or of another kind, an image cannot be decoded, all are nearly black, a
            class has a name that cannot be printed, or there are no ids of devices.
    """
    kept = (cache or cache_folder()) / "images"
    if source == "digits":
        images = _array(_digits(), transform, kept, source)
    elif source.startswith("hf:"):
        images = _hugging_face(source.removeprefix("hf:"), _needed(transform, source), kept, ids)
    elif (path := path_of(source)).is_dir():
        images = _folder(path, _needed(transform, source), kept, bool(ids))
    elif path.suffix.lower() == ".npz":
        images = _array(_npz(path, ids), transform, kept, source)
    else:
        raise no_such_source(source)
    if ids and images.owners is None:
        raise DataError(f"data source {source!r}: has no ids of devices; accepted with them: .npz, hf:NAME or a folder")
    return _with_plain_names(images, source)


def _needed(transform: Transform | None, source: str) -> Transform:
    if transform is None:
        raise DataError(f"data source {source!r}: its images may differ in size: needs the transform of a backbone")
    return transform


def _with_plain_names(images: ImageSet, source: str) -> ImageSet:
    """Returns the images with class names in NFC. Raises DataError if one cannot be shown, or stands there twice."""
    names = tuple(unicodedata.normalize("NFC", name) for name in images.classes)
    for name in names:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):  # control characters, lone surrogates
            raise DataError(f"data source {source!r}: class {name!r:.80} has characters that cannot be shown")
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise DataError(f"data source {source!r}: two classes have the name {twice!r:.80}")
    return replace(images, classes=names)


def _owned(images: ImageSet, ids: Sequence[object] | np.ndarray, refusal: Callable[[str], DataError]) -> ImageSet:
    """Returns the images with their devices.

    Args:
        ids: the id of each image's device, text or a whole number.

    Raises:
        DataError: if an id is missing or cannot be shown.
    """
    values = np.asarray(ids)
    if values.shape != (len(images),) or values.dtype.kind not in "iuUS":
        raise refusal(f"ids of devices must be {len(images)} texts or integers, got {values.dtype} {values.shape}")
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    known, owners = np.unique(values, return_inverse=True)
    names = tuple(unicodedata.normalize("NFC", str(name)) for name in known)
    if odd := [name for name in names if not name or not name.isprintable()]:
        raise refusal(f"device id {odd[0]!r:.80} is empty or has characters that cannot be shown")
    if len(set(names)) < len(names):
        raise refusal("two ids of devices differ only in how Unicode writes their letters")
    return replace(images, owners=owners.astype(np.int64), ids=names)


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits  # costs half a second; only the embedded default needs it

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return ImageSet(images, digits.target.astype(np.int64), tuple(map(str, digits.target_names)), "digits")


# ---------------------------------------------------------------- an .npz file


def _npz(path: Path, ids: str) -> ImageSet:
    def refusal(why: object) -> DataError:
        return DataError(f"data source {str(path)!r}: {why}")

    try:
        fingerprint = file_fingerprint(path)
        with np.load(path, allow_pickle=False) as arrays:
            needed = ("images", "labels", *([ids] if ids else []))
            if lacking := [name for name in needed if name not in arrays]:
                accepted = " and ".join(f"`{name}`" for name in needed)
                raise refusal(f"has no array `{lacking[0]}`; accepted: {accepted}, has {', '.join(arrays)}")
            images, labels = np.asarray(arrays["images"]), np.asarray(arrays["labels"])
            names = np.asarray(arrays["classes"]) if "classes" in arrays else None
            owners = np.asarray(arrays[ids]) if ids else None
        if names is not None and names.dtype.kind == "S":
            names = np.char.decode(names, "utf-8")
    except DataError:
        raise
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise refusal(f"cannot be read ({error})") from None
    except Exception as error:  # a damaged header, or one that claims more than there is memory
        raise refusal(f"needs plain arrays `images` and `labels` ({message_of(error)})") from None
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype.kind == "u" and images.dtype.itemsize == 2:
        images = scaled_to_bytes(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
        accepted = "uint8 or uint16 (n, height, width[, 1 or 3])"
        raise refusal(f"`images` must be {accepted}, got {images.dtype} {images.shape}")
    if len(images) == 0:
        raise refusal("holds no images")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise refusal(f"`labels` must be {len(images)} integers, got {labels.dtype} {labels.shape}")
    if labels.min() < 0:
        raise refusal(f"`labels` must not be negative, got {labels.min()}")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise refusal(f"`classes` must be a list of names, got {names.dtype} {names.shape}")
    most = MOST_CLASSES if names is None else len(names)
    if labels.max() >= most:
        why = f"no model has more than {most} classes" if names is None else f"`classes` has {most} names"
        raise refusal(f"`labels` must lie in 0..{most - 1} as {why}, got {labels.max()}")
    classes = range(int(labels.max()) + 1) if names is None else names
    found = ImageSet(images, labels.astype(np.int64), tuple(map(str, classes)), fingerprint)
    return found if owners is None else _owned(found, owners, refusal)


def _array(source: ImageSet, transform: Transform | None, kept: Path, name: str) -> ImageSet:
    """Returns the images of an array as `transform` fits them."""
    _refuse_dim(int(source.images.max()), name)
    if transform is None or transform.keeps(source.images):
        return source

    def pictures() -> Iterable[np.ndarray]:
        for image in track(source.images, "resizing images"):
            yield transform.fit(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))

    return replace(source, images=_fitted(kept, name, source.fingerprint, transform, len(source), pictures))


# ---------------------------------------------------------------- folders and Hugging Face


def _folder(path: Path, transform: Transform, kept: Path, by_device: bool) -> ImageSet:
    listing = list_images(path, by_device)
    files = [file for each in listing.files.values() for file in each]

    def pictures() -> Iterable[np.ndarray]:
        for file in track(files, "reading images"):
            yield _decoded(f"image {str(file)!r}", partial(Image.open, file, formats=FORMATS), transform)

    content = os.fsencode(path.resolve()) + listing.fingerprint.encode()
    images = _fitted(kept, str(path), content, transform, len(files), pictures)
    labels = np.repeat(np.arange(len(listing.files)), [len(each) for each in listing.files.values()])
    found = ImageSet(images, labels, tuple(listing.files), listing.fingerprint, listing.left_out)

    def refusal(why: str) -> DataError:
        return DataError(f"data source {str(path)!r}: {why}")

    return _owned(found, listing.owners, refusal) if by_device else found


def _hugging_face(name: str, transform: Transform, kept: Path, ids: str) -> ImageSet:
    from datasets import ClassLabel  # heavy, and only this source needs it
    from datasets import Image as ImageColumn

    table, name = open_table(name), name.partition(":")[0]

    def refusal(why: object) -> DataError:
        return DataError(f"data source 'hf:{name}': {why}")

    columns = [
        [key for key, of in table.features.items() if isinstance(of, kind)] for kind in (ImageColumn, ClassLabel)
    ]
    if not all(columns):
        has = ", ".join(f"{key}: {getattr(of, 'dtype', type(of).__name__)}" for key, of in table.features.items())
        raise refusal(f"needs a column of type Image and one of type ClassLabel, has {has}")
    (image, *_), (label, *_) = columns
    unused = {f"column {key}": 1 for kind in columns for key in kind[1:]}
    if not len(table):
        raise refusal("holds no images")
    if ids and ids not in table.features:
        raise refusal(f"has no column {ids!r} of device ids (data.device-column); has {', '.join(table.features)}")
    labels = np.array([-1 if value is None else value for value in table[label]], dtype=np.int64)
    if (labels < 0).any():
        unlabelled = f"{(labels < 0).sum()} of {len(labels)} images have no label"
        raise refusal(f"{unlabelled}; give a split with labels, hf:NAME:SPLIT")

    def picture(row: int) -> Image.Image:
        made: Image.Image | None = table[row][image]
        if made is None:
            raise DataError("there is none")
        return made

    def pictures() -> Iterable[np.ndarray]:
        for row in track(range(len(table)), "reading images"):
            yield _decoded(f"data source 'hf:{name}': image {row}", partial(picture, row), transform)

    fingerprint = fingerprint_of(table)
    images = _fitted(kept, f"hf:{name}", fingerprint, transform, len(table), pictures)
    found = ImageSet(images, labels, tuple(table.features[label].names), fingerprint, unused)
    return _owned(found, list(table[ids]), refusal) if ids else found


def _decoded(what: str, open_picture: Callable[[], Image.Image], transform: Transform) -> np.ndarray:
    """Returns a picture as it is stored. Raises DataError, naming it, whatever its decoder raises."""
    try:
        # ignored: warnings of odd metadata, and of pictures of over 89 million pixels
        with warnings.catch_warnings(action="ignore"), open_picture() as picture:
            return transform.fit(picture)
    except DataError as error:
        raise DataError(f"{what}: {error}") from None
    except Exception as error:  # decoders raise SyntaxError, struct.error, DecompressionBombError and more
        raise DataError(f"{what}: cannot be decoded ({message_of(error)})") from None


def _fitted(
    kept: Path,
    name: str,
    content: bytes | str,
    transform: Transform,
    count: int,
    pictures: Callable[[], Iterable[np.ndarray]],
) -> np.ndarray:
    """Returns images as the transform fits them, memory-mapped; they are made once, one at a time.

    Args:
        name: of the source.
        content: names the pictures; with the transform's geometry it is the key of the file.
    """
    file = kept / f"{content_hash(content, transform.geometry)}.npy"
    if not file.exists():
        shape = (count, *transform.size, transform.channels)
        header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with whole_file(file) as temporary, temporary.open("wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            brightest = 0
            for picture in pictures():
                out.write(picture.tobytes())
                brightest = max(brightest, int(picture.max()))
            _refuse_dim(brightest, name)
    images: np.ndarray = np.load(file, mmap_mode="r")
    return images


def _refuse_dim(brightest: int, source: str) -> None:
    """Raises DataError if no value of a whole source is over `brightest`, and that is nearly black."""
    if 0 < brightest <= DIM:
        raise DataError(
            f"data source {source!r}: all images are nearly black, no value is over {brightest} of 255, as where 12 "
            "bits are in files of 16, or values of 0 to 1 became integers; accepted: values that use the whole range"
        )
