"""Sources of labelled images: scikit-learn's digits, an .npz file, an image folder, a Hugging Face name."""

from __future__ import annotations

import hashlib
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from tapfl.errors import DataError
from tapfl.progress import track
from tapfl.store import cache_folder

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
ACCEPTED = "accepted: digits, a .npz file, an image folder, or hf:NAME"


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        images: uint8 (n, height, width, channels), channels 1 or 3.
        labels: int64 (n,), positions in `classes`.
        classes: names, in the order of the labels.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> ImageSet:
        """Returns the images at `indices`, in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes)


def load_images(source: str, size: int = 224, cache: Path | None = None) -> ImageSet:
    """Returns all images of a source.

    Args:
        source: `digits`, the path of an .npz file (`images`, `labels`, optionally `classes`), the path of a folder
            with one folder of images a class (both parts of the Tiny-ImageNet release too), or ``hf:NAME[:SPLIT]``.
        size: pixels a side to which decoded images are scaled and centre-cropped (folders and Hugging Face).
        cache: folder for decoded image folders, which every process memory-maps; by default tapfl's own.

    Raises:
        DataError: if the source is missing or of another kind, or a class has a name that cannot be printed.
    """
    images = _load(source, size, cache)
    for name in images.classes:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):  # control characters, lone surrogates
            raise DataError(f"data source {source!r}: class {name!r:.80} has characters that cannot be shown")
    return images


def _load(source: str, size: int, cache: Path | None) -> ImageSet:
    if source == "digits":
        return _digits()
    if source.startswith("hf:"):
        return _hugging_face(source.removeprefix("hf:"), size)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, size, cache or cache_folder())
    if path.suffix == ".npz":
        return _npz(path)
    raise DataError(f"data source {source!r}: there is no such file or folder; {ACCEPTED}")


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits  # costs half a second; only the embedded default needs it

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return ImageSet(images, digits.target.astype(np.int64), tuple(str(name) for name in digits.target_names))


def _npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = np.asarray(arrays["images"]), np.asarray(arrays["labels"])
            names = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"data source {str(path)!r}: cannot be read ({error})") from None
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"data source {str(path)!r}: needs plain arrays `images` and `labels` ({error})") from None
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(
            f"data source {str(path)!r}: `images` must be uint8 (n, height, width[, 1 or 3]), "
            f"got {images.dtype} {images.shape}"
        )
    if len(images) == 0:
        raise DataError(f"data source {str(path)!r}: holds no images")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"data source {str(path)!r}: `labels` must be {len(images)} integers, got {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0:
        raise DataError(f"data source {str(path)!r}: `labels` must not be negative, got {labels.min()}")
    if names is not None and labels.max() >= len(names):
        raise DataError(
            f"data source {str(path)!r}: `labels` must lie in 0..{len(names) - 1} as `classes` has {len(names)} names, "
            f"got {labels.max()}"
        )
    classes = tuple(names or map(str, range(int(labels.max()) + 1)))
    return ImageSet(images, labels.astype(np.int64), classes)


def _folder(path: Path, size: int, cache: Path) -> ImageSet:
    held = _annotated(path) or {child.name: _image_files(child) for child in sorted(path.iterdir()) if child.is_dir()}
    classes = [name for name, files in held.items() if files]  # a folder without images is no class
    listing = [(index, file) for index, name in enumerate(classes) for file in held[name]]
    if not listing:
        raise DataError(f"data source {str(path)!r}: holds no images; one folder of images a class is expected")
    digest = hashlib.sha256(f"{path.resolve()} {size}".encode(errors="surrogateescape"))
    for _, file in listing:
        status = file.stat()
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape"))
    kept = cache / "images" / f"{digest.hexdigest()[:16]}.npy"
    if not kept.exists():
        images = np.stack([_decode(file, size) for _, file in track(listing, "reading images")])
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{np.random.SeedSequence().entropy}.tmp.npy")
        np.save(temporary, images)
        temporary.replace(kept)
    labels = np.array([index for index, _ in listing], dtype=np.int64)
    return ImageSet(np.load(kept, mmap_mode="r"), labels, tuple(classes))


def _annotated(path: Path) -> dict[str, list[Path]]:
    """Returns the files by class of Tiny-ImageNet's validation part, where one folder holds all classes."""
    table = path / "val_annotations.txt"
    held: dict[str, list[Path]] = {}
    if table.is_file():
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
            name, tab, rest = line.partition("\t")
            if not tab or not (path / "images" / name).is_file():
                raise DataError(f"{str(table)!r}: line {number} names no image and class: {line[:80]!r}")
            held.setdefault(rest.split("\t")[0], []).append(path / "images" / name)
    return dict(sorted(held.items()))


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS)


def _decode(file: Path, size: int) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return _fit(image, size)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"image {str(file)!r}: cannot be decoded ({error})") from None


def _fit(image: Image.Image, size: int) -> np.ndarray:
    """Shorter side scaled to `size`, centre cropped, three channels."""
    rgb = image.convert("RGB")
    scale = size / min(rgb.size)
    rgb = rgb.resize(
        (max(size, round(rgb.width * scale)), max(size, round(rgb.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (rgb.width - size) // 2, (rgb.height - size) // 2
    return np.asarray(rgb.crop((left, top, left + size, top + size)))


def _hugging_face(name: str, size: int) -> ImageSet:
    from datasets import ClassLabel, load_dataset  # heavy, and only this source needs it

    name, _, split = name.partition(":")
    try:
        table = load_dataset(name, split=split or "train")
    except Exception as error:
        raise DataError(f"data source 'hf:{name}': cannot be loaded ({type(error).__name__}: {error})") from None
    image_columns = [key for key, feature in table.features.items() if type(feature).__name__ == "Image"]
    label_columns = [key for key, feature in table.features.items() if isinstance(feature, ClassLabel)]
    if not image_columns or not label_columns:
        raise DataError(f"data source 'hf:{name}': needs an image and a class-label column, has {list(table.features)}")
    images = np.stack([_fit(image, size) for image in track(table[image_columns[0]], "reading images")])
    labels = np.array(table[label_columns[0]], dtype=np.int64)
    return ImageSet(images, labels, tuple(table.features[label_columns[0]].names))
