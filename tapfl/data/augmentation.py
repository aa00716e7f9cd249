"""Random changes of training images. All randomness comes from a generator, so the same seed gives the same images."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SMALLEST = 0.5  # share of an image's area that a crop keeps at least
LONGEST = 4 / 3  # of a crop's width over its height, relative to the image's; the shortest is 3 / 4


def augmented(images: Tensor, how: str, generator: np.random.Generator) -> Tensor:
    """Returns a batch of normalised images, each changed at random.

    Args:
        images: float32 (n, channels, height, width).
        how: `none`; `flip`: half of the images are mirrored, left for right; `crop`: each is also replaced by a random
            part, scaled to the whole size (Szegedy et al. 2015, arXiv 1409.4842, with a larger smallest area).
    """
    if how == "none":
        return images
    from torchvision.transforms.v2 import functional as vision  # a second, which runs without augmentation save

    n, _, height, width = images.shape
    mirrored = torch.from_numpy(generator.random(n) < 0.5).to(images.device)
    images = torch.where(mirrored.view(-1, 1, 1, 1), vision.horizontal_flip(images), images)
    if how == "flip":
        return images
    parts = [_part(height, width, generator) for _ in range(n)]
    return torch.stack(
        [
            vision.resized_crop(image, *part, size=[height, width], antialias=True)
            for image, part in zip(images, parts, strict=True)
        ]
    )


def _part(height: int, width: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Returns top, left, height and width of a random part of an image."""
    area, ratio = generator.uniform(SMALLEST, 1), LONGEST ** generator.uniform(-1, 1)
    tall = min(height, max(1, round(height * math.sqrt(area / ratio))))
    wide = min(width, max(1, round(width * math.sqrt(area * ratio))))
    return int(generator.integers(height - tall + 1)), int(generator.integers(width - wide + 1)), tall, wide
