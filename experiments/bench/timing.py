"""Code shared by the benchmarks: options, interleaved timing, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from torch.profiler import profile

from tapfl.errors import ConfigError

Row = dict[str, str]
Models = Annotated[list[str], typer.Option("--model", help="timm names, or `digits`")]
Sizes = Annotated[list[int], typer.Option("--size", help="image sizes, pixels per side")]
Repeats = Annotated[int, typer.Option(min=1, help="turns; results are their medians")]
Counts = Annotated[list[int], typer.Option(min=1, help="numbers of devices")]
Set = Annotated[list[str], typer.Option("--set", help="key=value, further options of the runs")]


def chosen(option: str, names: Collection[str], known: Sequence[str]) -> list[str]:
    """Returns the names in the order of `known`, or all if none is given. Raises ConfigError for an unknown name."""
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{option} {unknown[0]}: accepted: {', '.join(known)}")
    return [name for name in known if name in names or not names]


def cpu_seconds(work: Callable[[], object]) -> float:
    """Returns the CPU seconds of this process during `work`."""
    start = time.process_time()
    work()
    return time.process_time() - start


def turns(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """Returns wall and CPU seconds of each turn of each variant, (repeats, 2).

    The variants take turns, so that other load on the machine affects all of them.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, work in variants.items():
            start = time.perf_counter()
            cpu = cpu_seconds(work)
            taken[name].append((time.perf_counter() - start, cpu))
    return {name: np.array(seconds) for name, seconds in taken.items()}


def side_by_side(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median CPU seconds of each variant in its turns."""
    return {name: float(np.median(taken[:, 1])) for name, taken in turns(variants, repeats).items()}


def peak_tensor_bytes(work: Callable[[], object]) -> int:
    """Returns the peak bytes of the tensors that `work` creates, as torch's profiler counts them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it logs its start and end to standard error
    with profile(profile_memory=True) as seen:
        work()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    found = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())), default=0)


def peak_process_bytes(work: Callable[[], object]) -> int | None:
    """Returns the largest growth of the process during `work`, in bytes; None if Linux does not report it.

    Memory that was freed before is returned to the system first, so that its reuse does not hide growth.
    """
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        work()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
