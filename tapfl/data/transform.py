"""Converts pictures to the input of a backbone, as timm's evaluation transform does."""

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

WIDEST = 16  # largest aspect ratio; of longer pictures only the middle is resized, as all of it may take gigabytes
TURNS = {  # EXIF orientation -> the operation that turns the picture upright
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
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # formats in which Pillow's 32-bit mode `I` holds 16-bit values


@dataclass(frozen=True)
class Transform:
    """Pictures -> float32 (n, channels, height, width), in two deterministic steps.

    `fit` resizes and crops one picture; its result is stored. A call normalises stored images, batch by batch. Together
    they equal timm's evaluation transform (`timm.data.create_transform`) to the last bit.

    Attributes:
        size: (height, width) in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: mean of each channel, for values in [0, 1].
        std: standard deviation of each channel.
        crop: timm's `crop_pct`: the picture is resized to `size` / `crop`, and its centre of `size` is taken.
        crop_mode: timm's: `center` resizes the shorter side, `squash` both sides, `border` the longer side.
        interpolation: timm's name of the interpolation.
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
        """Everything that stored images depend on, as text."""
        fill = self.mean if self.crop_mode == "border" else ()
        return f"{self.size} {self.channels} {self.crop} {self.crop_mode} {self.interpolation} {fill}"

    def fit(self, picture: Image.Image) -> np.ndarray:
        """Returns a picture upright, resized and cropped, uint8 (height, width, channels).

        Raises:
            DataError: if the range of its values is unknown.
        """
        picture.load()  # for a TIFF, Pillow turns the picture upright here
        image = _eight_bits(picture).convert("RGB")
        if (turn := _turn(picture)) is not None:
            image = image.transpose(turn)
        if self.channels == 1:
            image = image.convert("L")
        if self.crop_mode == "center":
            image = _middle(image)
        return np.ascontiguousarray(self._resize(image).permute(1, 2, 0).numpy())

    def keeps(self, images: np.ndarray) -> bool:
        """Returns whether `fit` would leave `images`, uint8 (n, height, width, channels), unchanged."""
        scaled = tuple(int(side / self.crop) for side in self.size)
        return images.shape[1:] == (*self.size, self.channels) and scaled == self.size

    @cached_property
    def _resize(self) -> Callable[[Image.Image], Tensor]:
        from timm.data import create_transform  # imports torchvision, which takes a second

        resize: Callable[[Image.Image], Tensor] = create_transform(
            (self.channels, *self.size),
            is_training=False,
            use_prefetcher=True,  # returns uint8 (channels, height, width)
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop,
            crop_mode=self.crop_mode,
        )
        return resize

    def __call__(self, images: np.ndarray) -> Tensor:
        """Returns stored images as a batch of the backbone's input.

        Args:
            images: uint8 (n, height, width, channels), as `fit` returns them.

        Raises:
            DataError: if they have another size or number of channels.
        """
        return self.normalised(torch.from_numpy(np.array(images)))

    def normalised(self, images: Tensor) -> Tensor:
        """Returns the same for a uint8 tensor, on its device. It is elementwise, so batches do not affect any bit."""
        if tuple(images.shape[1:]) != (*self.size, self.channels):
            height, width, channels = images.shape[1:]
            raise DataError(
                f"images are {height} × {width} with {channels} channels, the backbone takes {self.size[0]} × "
                f"{self.size[1]} with {self.channels}: load_images(source, transform) makes them so"
            )
        x = images.permute(0, 3, 1, 2).contiguous().float()  # copies bytes, a quarter of the size of floats
        scale = torch.tensor([self.mean, self.std], dtype=x.dtype).to(x.device, non_blocking=True)
        mean, std = scale.view(2, 1, -1, 1, 1)
        return x.div_(255).sub_(mean).div_(std)

    def batches(self, images: ImageSet, batch: int = 256) -> Batches:
        """Returns all images in order, `batch` at a time; each batch is transformed when it is reached."""
        return Batches(self, images, batch)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """Returns the operation that turns a loaded picture upright; None if none is needed or its metadata is damaged."""
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata raises SyntaxError, struct.error and more
        return None


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Returns a 16-bit picture with its whole range scaled to 8 bits; pictures of 8 bits or fewer are unchanged.

    Raises:
        DataError: if it holds floats or 32-bit integers, because their range is unknown.
    """
    if picture.mode in SIXTEEN_BITS or (picture.mode == "I" and picture.format in SIXTEEN_BIT_FORMATS):
        grey = Image.fromarray(scaled_to_bytes(np.asarray(picture)))
        tags = getattr(picture, "tag_v2", {})  # Pillow uses PhotometricInterpretation only for 8 bits
        white_is_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO
        return ImageOps.invert(grey) if white_is_zero else grey
    if picture.mode in ("I", "F"):
        values = "floats" if picture.mode == "F" else "integers of 32 bits"
        raise DataError(f"holds {values}, whose range is unknown; accepted: pictures of 8 or 16 bits a channel")
    return picture


def scaled_to_bytes(values: np.ndarray) -> np.ndarray:
    """Returns 16-bit values as uint8, such that 65535 becomes 255, rounded to the nearest."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _middle(image: Image.Image) -> Image.Image:
    """Returns the middle of an image that is more than `WIDEST` times as long as wide, enough for the centre crop."""
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
