"""The built-in source `letters`: capital letters, drawn by Pillow in the font that is part of it.

A public pool for devices that hold digits: images of the same kind, of other classes. With one version of Pillow they
are always the same, and they need no file and no network.
"""

from __future__ import annotations

import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PIXELS = 32  # height and width
EACH = 60  # images of each letter
SIZES, ANGLES, SHIFTS, STROKES = (28, 36), (-15, 15), (-2, 2), (0, 2)  # lowest and highest: points, degrees, pixels


def drawn_letters() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Returns bright letters on black, uint8 (1560, 32, 32, 1), in random sizes, angles and places; labels; names."""
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
