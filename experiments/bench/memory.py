"""Peak memory of a piece of work: of its tensors, exactly, and of the process, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages(TorchDispatchMode):
    """Follows the memory of every tensor that an operation gives back, until nobody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        output = func(*args, **(kwargs or {}))
        theirs = {storage.data_ptr() for storage in given if storage not in self.known}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known and storage.data_ptr() not in theirs:
                    self.known.add(storage)
                    self.held += storage.nbytes()
                    weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return output

    def _release(self, count: int) -> None:
        self.held -= count


def peak_tensor_bytes(work: Callable[[], object]) -> int:
    """Returns the most bytes that tensors made by `work` had at once; without the workspaces of single operations."""
    with _Storages() as storages:
        work()
    return storages.peak


def peak_process_bytes(work: Callable[[], object]) -> int | None:
    """Returns by how many bytes the process grew at most while `work` ran; None where Linux does not tell.

    What was freed before is given back to the system first, so that it is not used again unseen.
    """
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        work()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
