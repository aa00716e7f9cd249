"""Random generators derived from their purpose, so that no result depends on the order of events.

A stream of random numbers is named by the run's seed and a path such as ``("train", round, device)``. Two devices, or
one device in two rounds, never share a stream, and every stream can be drawn again on its own.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

WORD = 32  # bits; numpy's SeedSequence splits numbers into words, without a separator between numbers


def _entropy(seed: int, path: tuple[str | int, ...]) -> list[int]:
    """Returns the name of a stream as a list of numbers; a text is replaced by its CRC-32.

    SeedSequence pads with zeros to four words, and does not mark where a number of several words ends. If a list could
    therefore be confused with that of another name, the number of words of each number and their count are appended.
    Only such lists end in zeros, and they have more than four words, so no two names have the same words.
    """
    numbers = [seed, *(zlib.crc32(part.encode()) if isinstance(part, str) else part for part in path)]
    lengths = [max(1, -(-number.bit_length() // WORD)) for number in numbers]
    if numbers[-1] and max(lengths) == 1:
        return numbers
    return [*numbers, *lengths, len(numbers), 0, 0]


def of_secret(secret: str) -> list[int]:
    """Returns an extension of a path that only the owner of `secret` can compute; empty without a secret."""
    return [int.from_bytes(hashlib.sha256(secret.encode()).digest())] if secret else []


def numpy_generator(seed: int, *path: str | int) -> np.random.Generator:
    """Returns the numpy generator of the stream `path` of `seed`."""
    return np.random.default_rng(_entropy(seed, path))


def torch_generator(seed: int, *path: str | int) -> torch.Generator:
    """Returns the torch (CPU) generator of the stream `path` of `seed`.

    Torch uses only the low 32 bits of a seed, so one of 2³² streams. Noise that must stay secret (`of_secret`) needs
    `numpy_generator`, whose streams are named by 128 bits.
    """
    import torch  # here, so that callers of numpy_generator do not import torch

    state = np.random.SeedSequence(_entropy(seed, path)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
