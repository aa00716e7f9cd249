"""From stored images to the input of a backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tapfl.errors import DataError


@dataclass(frozen=True)
class Transform:
    """uint8 (n, height, width, channels) -> float32 (n, `channels`, `size`, `size`), normalised. No randomness."""

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: np.ndarray) -> Tensor:
        """Returns a batch as input of the backbone. Raises DataError if the channels cannot be matched."""
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
        if x.shape[1] == 1 and self.channels == 3:
            x = x.expand(-1, 3, -1, -1)
        if x.shape[1] != self.channels:
            accepted = f"images of {self.channels}, or another in_chans in model.args"
            raise DataError(f"images have {x.shape[1]} channels, the backbone takes {self.channels}: give {accepted}")
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return ((x - mean) / std).contiguous()

    def batches(self, images: np.ndarray, batch: int = 256) -> Batches:
        """Returns all images in order, `batch` at a time, each batch transformed when it is reached."""
        return Batches(self, images, batch)


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of images in the backbone's input format; can be iterated any number of times."""

    transform: Transform
    images: np.ndarray
    batch: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.images), self.batch):
            yield self.transform(self.images[start : start + self.batch])
