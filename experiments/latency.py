"""How long one pass takes, on one thread, of several models in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

WARM_UP = 2


@torch.no_grad()
def latencies_ms(models: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> dict[str, float]:
    """Returns the median milliseconds of one pass of `x`; they take turns, so that a busy machine is busy for all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(WARM_UP + repeats):
            for name, model in models.items():
                start = time.perf_counter()
                model(x)
                seconds[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {name: float(np.median(values[WARM_UP:])) * 1e3 for name, values in seconds.items()}
