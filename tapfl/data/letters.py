"""The built-in source `letters`: capital letters, drawn by Pillow in its own font.

It is a public pool for devices with digits: similar images of other classes. With a given version of Pillow the images
are always the same. They need no file and no network.
"""

from __future__ import annotations

import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PIXELS = 32  # height and width
EACH = 60  # images of each letter
SIZES, ANGLES, SHIFTS, STROKES = (28, 36), (-15, 15), (-2, 2), (0, 2)  # (min, max) in points, degrees and pixels


def drawn_letters() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Returns images of bright letters on black, their labels, and the class names.

    The images are uint8 (1560, 32, 32, 1); sizes, angles and positions of the letters are random.
    """
    names, generator = tuple(string.ascii_uppercase), np.random.default_rng(0)
    images = [_drawn(letter, generator) for letter in names for _ in range(EACH)]
    return np.stack(images)[..., None], np.repeat(np.arange(len(names)), EACH), names


def _drawn(letter: str, generator: np.random.Generator) -> np.ndarray:
    size, angle, right, down, stroke = (
        int(generator.integers(low, high, endpoint=True)) for low, high in (SIZES, ANGLES, SHIFTS, SHIFTS, STROKES)
    )
    picture, middle = Image.new("L", (PIXELS, PIXELS)), PIXELS // 2
    font = ImageFont.load_default(size)
    ImageDraw.Draw(picture).text((middle, middle), letter, 255, font, anchor="mm", stroke_width=stroke)
    turned = picture.rotate(angle, Image.Resampling.BICUBIC, translate=(right, down))
    return np.asarray(turned)
