"""Random generators derived from their purpose, so that no result depends on the order of events.

A stream is named by the run's seed and a path such as ``("train", round, device)``: two devices, or one device in two
rounds, never share numbers, and any of them can be drawn again alone.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def _entropy(seed: int, path: tuple[str | int, ...]) -> list[int]:
    return [seed, *(zlib.crc32(part.encode()) if isinstance(part, str) else part for part in path)]


def of_secret(secret: str) -> list[int]:
    """Returns an extension of a path that only the owner of `secret` can compute; empty without a secret."""
    return [int.from_bytes(hashlib.sha256(secret.encode()).digest())] if secret else []


def numpy_generator(seed: int, *path: str | int) -> np.random.Generator:
    """Returns the numpy generator of the stream `path` of `seed`."""
    return np.random.default_rng(_entropy(seed, path))


def torch_generator(seed: int, *path: str | int) -> torch.Generator:
    """Returns the torch (CPU) generator of the stream `path` of `seed`."""
    import torch  # here, so that callers of numpy_generator alone need no torch

    state = np.random.SeedSequence(_entropy(seed, path)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
