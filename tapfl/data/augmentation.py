"""Random augmentation of training images. All randomness comes from a generator, so results follow from the seed."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SMALLEST = 0.5  # smallest fraction of an image's area that a crop keeps
LONGEST = 4 / 3  # largest aspect ratio of a crop, relative to the image's; the smallest is 3 / 4


def augmented(images: Tensor, how: str, generator: np.random.Generator) -> Tensor:
    """Returns a batch of normalised images, each changed at random.

    Args:
        images: float32 (n, channels, height, width).
        how: `none`; `flip`: each image is mirrored horizontally with probability 1/2; `crop`: each is also replaced by
            a random crop, resized to the full size (Szegedy et al. 2015, arXiv 1409.4842, with a larger minimum area).
    """
    if how == "none":
        return images
    from torchvision.transforms.v2 import functional as vision  # takes a second, which other runs need not spend

    n, _, height, width = images.shape
    mirrored = torch.from_numpy(generator.random(n) < 0.5).to(images.device, non_blocking=True)
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
    """Returns (top, left, height, width) of a random crop of an image."""
    area, ratio = generator.uniform(SMALLEST, 1), LONGEST ** generator.uniform(-1, 1)
    tall = min(height, max(1, round(height * math.sqrt(area / ratio))))
    wide = min(width, max(1, round(width * math.sqrt(area * ratio))))
    return int(generator.integers(height - tall + 1)), int(generator.integers(width - wide + 1)), tall, wide
