"""From pictures to the input of a backbone, as timm's evaluation transform has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from tapfl.data.decoded import ahead
from tapfl.data.images import ImageSet, in_order
from tapfl.errors import DataError

WIDEST = 16  # times as long as wide: of a longer picture only the middle is scaled, which else may take gigabytes
TURNS = {  # EXIF's orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WHITE_IS_ZERO = 0  # a TIFF's PhotometricInterpretation
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # files in which Pillow's 32-bit mode `I` holds values of 16 bits


@dataclass(frozen=True)
class Transform:
    """Pictures -> float32 (n, `channels`, `size`, `size`), in two steps without randomness.

    `fit` resizes and crops one picture to what is stored, once; a call normalises stored images, batch by batch.
    Together they are timm's evaluation transform (`timm.data.create_transform`), to the last bit.

    Attributes:
        size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: of each channel, of values in [0, 1].
        std: of each channel.
        crop: timm's `crop_pct`: the picture is scaled to the size over `crop`, and its centre is taken.
        crop_mode: timm's: `center` scales the shorter side, `squash` both, `border` the longer side.
        interpolation: timm's name of it.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    @property
    def geometry(self) -> str:
        """What stored images depend on, as text."""
        fill = self.mean if self.crop_mode == "border" else ()
        return f"{self.size} {self.channels} {self.crop} {self.crop_mode} {self.interpolation} {fill}"

    def fit(self, picture: Image.Image) -> np.ndarray:
        """Returns a picture as it is stored: upright, resized and cropped, uint8 (height, width, channels).

        Raises:
            DataError: if the range of its values is unknown.
        """
        picture.load()  # a TIFF turns itself upright
        image = _eight_bits(picture).convert("RGB")
        if (turn := _turn(picture)) is not None:
            image = image.transpose(turn)
        if self.channels == 1:
            image = image.convert("L")
        if self.crop_mode == "center":
            image = _middle(image)
        return np.ascontiguousarray(self._resize(image).permute(1, 2, 0).numpy())

    def keeps(self, images: np.ndarray) -> bool:
        """Returns whether `fit` would change nothing in `images`, uint8 (n, height, width, channels)."""
        scaled = tuple(int(side / self.crop) for side in self.size)
        return images.shape[1:] == (*self.size, self.channels) and scaled == self.size

    @cached_property
    def _resize(self) -> Callable[[Image.Image], Tensor]:
        from timm.data import create_transform  # with torchvision: a second

        made: Callable[[Image.Image], Tensor] = create_transform(
            (self.channels, *self.size),
            is_training=False,
            use_prefetcher=True,  # leaves bytes, (channels, height, width)
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop,
            crop_mode=self.crop_mode,
        )
        return made

    def __call__(self, images: np.ndarray) -> Tensor:
        """Returns stored images as a batch of the backbone's input.

        Args:
            images: uint8 (n, height, width, channels), as `fit` returns them.

        Raises:
            DataError: if they are of another size or number of channels.
        """
        return self.normalised(torch.from_numpy(np.array(images)))

    def normalised(self, images: Tensor) -> Tensor:
        """Returns the same of a tensor, on its device; each value is computed alone, so batches change no bit."""
        if tuple(images.shape[1:]) != (*self.size, self.channels):
            height, width, channels = images.shape[1:]
            raise DataError(
                f"images are {height} × {width} with {channels} channels, the backbone takes {self.size[0]} × "
                f"{self.size[1]} with {self.channels}: load_images(source, transform) makes them so"
            )
        x = images.permute(0, 3, 1, 2).contiguous().float()  # bytes are turned round: they are a quarter
        mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return x.div_(255).sub_(mean).div_(std)

    def batches(self, images: ImageSet, batch: int = 256) -> Batches:
        """Returns all images in order, `batch` at a time, each batch transformed when it is reached."""
        return Batches(self, images, batch)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """Returns what turns a loaded picture upright; None if nothing, or if its metadata is damaged and says nothing."""
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # SyntaxError, struct.error and more
        return None


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Returns a picture of 16 bits with its whole range scaled to 8; others, which have 8 bits or fewer, unchanged.

    Raises:
        DataError: if it holds floats, or integers of 32 bits: their range is unknown.
    """
    if picture.mode in SIXTEEN_BITS or (picture.mode == "I" and picture.format in SIXTEEN_BIT_FORMATS):
        grey = Image.fromarray(scaled_to_bytes(np.asarray(picture)))
        tags = getattr(picture, "tag_v2", {})  # which Pillow heeds for 8 bits alone
        white_is_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO
        return ImageOps.invert(grey) if white_is_zero else grey
    if picture.mode in ("I", "F"):
        values = "floats" if picture.mode == "F" else "integers of 32 bits"
        raise DataError(f"holds {values}, whose range is unknown; accepted: pictures of 8 or 16 bits a channel")
    return picture


def scaled_to_bytes(values: np.ndarray) -> np.ndarray:
    """Returns 16-bit values as uint8: 65535 becomes 255, rounded to the nearest."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _middle(image: Image.Image) -> Image.Image:
    """Returns the middle of an image that is over `WIDEST` times as long as wide: the centre crop needs no more."""
    short, long = sorted(image.size)
    if (spare := (long - WIDEST * short) // 2) <= 0:
        return image
    inset = [spare if side == long else 0 for side in image.size]
    return ImageOps.crop(image, (*inset, *inset))


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of images in the backbone's input format; can be iterated any number of times."""

    transform: Transform
    images: ImageSet
    batch: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        parts = in_order(len(self.images), self.batch)
        yield from ahead(lambda part: self.transform(self.images.read(part)), parts)
