"""Interleaved timing of variants of the same work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np


def side_by_side(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median CPU seconds of each variant; they take turns, so that a busy machine is busy for all."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, work in variants.items():
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}
