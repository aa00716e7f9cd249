"""Opens sources of images: built-in ones (digits, letters), an .npz file, an image folder, or a Hugging Face name."""

from __future__ import annotations

import math
import os
import unicodedata
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from tapfl.data.contents import file_fingerprint, no_such_source, path_of
from tapfl.data.decoded import DecodedCache, DecodedImages, refuse_dim
from tapfl.data.folders import list_images
from tapfl.data.hugging_face import fingerprint_of, open_table
from tapfl.data.images import LONGEST_NAME, ArrayImages, Images, ImageSet, is_plain
from tapfl.data.transform import Transform, scaled_to_bytes
from tapfl.errors import DataError, message_of
from tapfl.store import cache_folder, content_hash

MOST_CLASSES = 2**16  # no model has more
# the formats of `IMAGE_ENDINGS`; EPS, which Pillow decodes by starting another program, is refused under any file name
FORMATS = ("JPEG", "JPEG2000", "PNG", "BMP", "DIB", "GIF", "WEBP", "AVIF", "TIFF", "PPM", "TGA")


def load_images(
    source: str,
    transform: Transform | None = None,
    cache: Path | None = None,
    ids: str = "",
    cache_gb: float = math.inf,
    unlabelled: bool = False,
    ignore: str = "",
    nested: bool = False,
) -> ImageSet:
    """Returns all images of a source.

    Args:
        source: `digits`, `letters`, the path of an .npz file (`images`, `labels`, optionally `classes`), the path of a
            folder with one folder of images per class (including both parts of the Tiny-ImageNet release), or
            ``hf:NAME[:SPLIT]``.
        transform: of the backbone; resizes and crops every image to its input size. None leaves images unchanged, which
            is possible for built-in sources and .npz files.
        cache: folder for images in the transform's size, which every process memory-maps; by default tapfl's own.
        ids: name of the array of an .npz file, or of the column of a ``hf:`` table, that has the id of each image's
            natural device. For a folder, any name: it then has one folder per device with one folder of images per
            class. Empty: devices are not read.
        cache_gb: gigabytes that a source may take in the cache; see `tapfl.data.decoded`.
        unlabelled: also accept a source without labels: a folder of images without class folders, an .npz file without
            `labels`, or a table that has only images or in which no image has a label.
        ignore: name of a column of a ``hf:`` table that is not used, even if its type is ClassLabel.
        nested: accept a folder with one class that contains only folders of images; otherwise these are probably the
            classes, and it is refused.

    Raises:
        DataError: if the source is missing or of another kind, an image cannot be decoded, all are nearly black, a
            class has a name that cannot be printed, or device ids are missing.
    """
    kept = DecodedCache((cache or cache_folder()) / "images", cache_gb * 1e9)
    if source in BUILT_IN:
        images = _array(BUILT_IN[source](), transform, kept, source)
    elif source.startswith("hf:"):
        images = _hugging_face(source.removeprefix("hf:"), _needed(transform, source), kept, ids, unlabelled, ignore)
    elif (path := path_of(source)).is_dir():
        images = _folder(path, _needed(transform, source), kept, bool(ids), unlabelled, nested)
    elif path.is_file() and path.suffix.lower() == ".npz":
        images = _array(_npz(path, ids, unlabelled), transform, kept, source)
    else:
        raise no_such_source(source)
    if ids and images.owners is None:
        raise DataError(f"data source {source!r}: has no device ids; .npz, hf:NAME and folders can have them")
    return _with_plain_names(images, source)


def _refusal_of(source: str) -> Callable[[str], DataError]:
    return lambda why: DataError(f"data source {source!r}: {why}")


def _needed(transform: Transform | None, source: str) -> Transform:
    if transform is None:
        raise DataError(f"data source {source!r}: its images may differ in size; pass the transform of a backbone")
    return transform


def _with_plain_names(images: ImageSet, source: str) -> ImageSet:
    """Returns the images with class names in NFC. Raises DataError if a name cannot be shown or occurs twice."""
    names = tuple(unicodedata.normalize("NFC", name) for name in images.classes)
    for name in names:
        if not is_plain(name):
            what = f"characters that cannot be shown, or not 1 to {LONGEST_NAME} of them"
            raise DataError(f"data source {source!r}: class {name!r:.80} has {what}")
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise DataError(f"data source {source!r}: two classes have the name {twice!r:.80}")
    return replace(images, classes=names)


def _text(values: np.ndarray, what: str, refusal: Callable[[str], DataError]) -> np.ndarray:
    """Returns values with bytes converted to text. Raises DataError if they are not UTF-8."""
    if values.dtype.kind != "S":
        return values
    try:
        return np.char.decode(values, "utf-8")
    except UnicodeDecodeError as error:
        raise refusal(f"{what} are not UTF-8 ({error.reason})") from None


def _owned(images: ImageSet, ids: Sequence[object] | np.ndarray, refusal: Callable[[str], DataError]) -> ImageSet:
    """Returns the images with their natural devices.

    Args:
        ids: the id of each image's device, text or an integer.

    Raises:
        DataError: if an id is missing, is not UTF-8, or cannot be shown.
    """
    values = np.asarray(ids)
    if values.shape != (len(images),) or values.dtype.kind not in "iuUS":
        raise refusal(f"device ids must be {len(images)} texts or integers, got {values.dtype} {values.shape}")
    values = _text(values, "device ids", refusal)
    known, owners = np.unique(values, return_inverse=True)
    names = tuple(unicodedata.normalize("NFC", str(name)) for name in known)
    if odd := [name for name in names if not name or not name.isprintable()]:
        raise refusal(f"device id {odd[0]!r:.80} is empty or has characters that cannot be shown")
    if len(set(names)) < len(names):
        raise refusal("two device ids differ only in their Unicode form (NFC, NFD)")
    return replace(images, owners=owners.astype(np.int64), ids=names)


@lru_cache(maxsize=1)  # a run opens its source several times; nothing changes the arrays, because reads are copies
def _digits() -> ImageSet:
    from sklearn.datasets import load_digits  # takes half a second, and only this source needs it

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return ImageSet.of(images, digits.target.astype(np.int64), tuple(map(str, digits.target_names)), "digits")


@lru_cache(maxsize=1)
def _letters() -> ImageSet:
    from tapfl.data.letters import drawn_letters

    images, labels, names = drawn_letters()
    return ImageSet.of(images, labels, names, "letters")


BUILT_IN: Mapping[str, Callable[[], ImageSet]] = {"digits": _digits, "letters": _letters}


# ---------------------------------------------------------------- an .npz file


def _npz(path: Path, ids: str, unlabelled: bool) -> ImageSet:
    refusal = _refusal_of(str(path))
    try:
        fingerprint = file_fingerprint(path)
        if not zipfile.is_zipfile(path):
            raise refusal("is not an .npz file, as numpy.savez writes")
        with np.load(path, allow_pickle=False) as arrays:
            needed = ("images", *([] if unlabelled else ["labels"]), *([ids] if ids else []))
            if missing := [name for name in needed if name not in arrays]:
                accepted = " and ".join(f"`{name}`" for name in needed)
                raise refusal(f"has no array `{missing[0]}`; accepted: {accepted}, has {', '.join(arrays)}")
            images = np.asarray(arrays["images"])
            labels = np.asarray(arrays["labels"]) if "labels" in arrays else None
            names = np.asarray(arrays["classes"]) if "classes" in arrays else None
            owners = np.asarray(arrays[ids]) if ids else None
        if names is not None:
            names = _text(names, "`classes`", refusal)
    except DataError:
        raise
    except OSError as error:
        raise refusal(f"cannot be read ({error.strerror})") from None
    except Exception as error:  # damaged, objects instead of plain arrays, or out of memory
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
    if labels is None:
        return ImageSet.of(images, np.full(len(images), -1), (), fingerprint)
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
    result = ImageSet.of(images, labels.astype(np.int64), tuple(map(str, classes)), fingerprint)
    return result if owners is None else _owned(result, owners, refusal)


def _array(source: ImageSet, transform: Transform | None, cache: DecodedCache, name: str) -> ImageSet:
    """Returns the images of an array, resized and cropped by `transform`."""
    array = cast(ArrayImages, source.images).array
    refuse_dim(int(array.max()), name)
    if transform is None or transform.keeps(array):
        return source

    def fitted(position: int) -> np.ndarray:
        image = array[position]
        return transform.fit(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))

    return replace(source, images=_kept(cache, name, source.fingerprint, transform, len(source), fitted))


# ---------------------------------------------------------------- folders and Hugging Face


def _folder(
    path: Path, transform: Transform, cache: DecodedCache, by_device: bool, unlabelled: bool, nested: bool
) -> ImageSet:
    listing = list_images(path, by_device, flat=unlabelled, nested=nested)

    def decode(position: int) -> np.ndarray:
        file = listing.file(position)
        return _decoded(f"image {file!r}", partial(Image.open, file, formats=FORMATS), transform)

    content = os.fsencode(path.resolve()) + listing.fingerprint.encode()
    images = _kept(cache, str(path), content, transform, len(listing.names), decode)
    result = ImageSet(images, listing.labels, listing.classes, listing.fingerprint, listing.left_out)
    return _owned(result, listing.owners, _refusal_of(str(path))) if by_device else result


def _hugging_face(
    name: str, transform: Transform, cache: DecodedCache, ids: str, unlabelled: bool, ignore: str
) -> ImageSet:
    from datasets import ClassLabel  # slow to import, and only this source needs it
    from datasets import Image as ImageColumn

    table, name = open_table(name), name.partition(":")[0]
    refusal = _refusal_of(f"hf:{name}")
    columns = [
        [key for key, of in table.features.items() if isinstance(of, kind) and key not in (ids, ignore)]
        for kind in (ImageColumn, ClassLabel)
    ]
    if not columns[0] or not (columns[1] or unlabelled):
        has = ", ".join(f"{key}: {getattr(of, 'dtype', type(of).__name__)}" for key, of in table.features.items())
        more = "" if unlabelled else " and one of type ClassLabel (Dataset.class_encode_column makes one)"
        more += f" besides {ids!r} of device ids" if ids else ""
        raise refusal(f"needs a column of type Image{more}, has {has}")
    image, label = columns[0][0], next(iter(columns[1]), None)
    unused = {f"column {key}": 1 for kind in columns for key in kind[1:]}
    if not len(table):
        raise refusal("holds no images")
    if ids and ids not in table.features:
        raise refusal(f"has no column {ids!r} of device ids (data.device-column); has {', '.join(table.features)}")
    labels, classes = np.full(len(table), -1), ()
    if label is not None:
        labels = np.array([-1 if value is None else value for value in table[label]], dtype=np.int64)
        classes = () if unlabelled and (labels < 0).all() else tuple(table.features[label].names)
    if classes and (labels < 0).any():
        without = f"{(labels < 0).sum()} of {len(labels)} images have no label"
        raise refusal(f"{without}; give a split with labels, hf:NAME:SPLIT")

    def picture(row: int) -> Image.Image:
        opened: Image.Image | None = table[row][image]
        if opened is None:
            raise DataError("there is none")
        return opened

    def decode(row: int) -> np.ndarray:
        return _decoded(f"data source 'hf:{name}': image {row}", partial(picture, row), transform)

    fingerprint = fingerprint_of(table)
    images = _kept(cache, f"hf:{name}", fingerprint, transform, len(table), decode)
    result = ImageSet(images, labels, classes, fingerprint, unused)
    if not ids:
        return result
    owners = list(table[ids])
    if isinstance(table.features[ids], ClassLabel):  # numbers of names; -1 or None is a missing id
        names = table.features[ids].names
        owners = ["" if number is None or number < 0 else names[number] for number in owners]
    return _owned(result, owners, refusal)


def _kept(
    cache: DecodedCache,
    name: str,
    content: bytes | str,
    transform: Transform,
    count: int,
    decode: Callable[[int], np.ndarray],
) -> Images:
    """Returns cached images, resized and cropped by the transform.

    Args:
        name: of the source, for messages.
        content: identifies the pictures; with the transform's geometry it identifies the images.
        count: number of pictures.
        decode: maps a position to an image.
    """
    key = content_hash(content, transform.geometry)
    return cache.keep(DecodedImages(decode, count, (*transform.size, transform.channels), key), name)


def _decoded(what: str, open_picture: Callable[[], Image.Image], transform: Transform) -> np.ndarray:
    """Returns a decoded picture, resized and cropped. Raises DataError, naming it, if its decoder raises anything."""
    try:
        with open_picture() as picture:
            return transform.fit(picture)
    except DataError as error:
        raise DataError(f"{what}: {error}") from None
    except Exception as error:  # decoders raise SyntaxError, struct.error, DecompressionBombError and more
        raise DataError(f"{what}: cannot be decoded ({message_of(error)})") from None
