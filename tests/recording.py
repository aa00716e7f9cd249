"""Recorded calls without a GPU: the operations of a call are replayed on the same tensors without its Python code.

Like a CUDA graph, a recording only replays these operations: what the code decides, reads or rebinds stays as it was
during the recording. Recording changes no existing tensor. What a GPU refuses while recording is refused here, too:
reading a value, and creating a tensor from numbers on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::lift_fresh", "aten::is_nonzero")


class Operations(TorchDispatchMode):
    """Records the operations inside the block, with the tensors that they take and return."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # existing storages: a tensor and a copy
        self._own: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith(REFUSED):
            raise RuntimeError(f"{func.name()}: not permitted when a stream is capturing")
        for each in _tensors((args, kwargs)):
            place = each.untyped_storage().data_ptr()
            if place not in self._own and place not in self._before:
                self._before[place] = each, _all_of(each).clone()
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        new = [each for each in _tensors(result) if each.untyped_storage().data_ptr() not in given]
        self._own |= {each.untyped_storage().data_ptr() for each in new}
        if new or func._schema.is_mutable:
            self.made.append((func, args, kwargs or {}, _tensors(result) if new else []))
        return result

    def undo(self) -> None:
        """Restores all tensors that existed before."""
        for each, copy in self._before.values():
            _all_of(each).copy_(copy)


class Recording:
    """A recorder on the CPU (`tapfl.compute.Recorder`)."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def aside(self, call: Callable[[], Tensor]) -> Tensor:
        return call()

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        with Operations() as operations:
            found = call()
        operations.undo()

        @torch.no_grad()
        def again() -> Tensor:
            self.replayed += 1
            for func, args, kwargs, outputs in operations.made:
                result = func(*args, **kwargs)
                for old, new in zip(outputs, _tensors(result) if outputs else [], strict=True):
                    old.copy_(new)
            return found

        return again


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


def _all_of(tensor: Tensor) -> Tensor:
    """Returns the whole storage of a tensor, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
