"""A pretended accelerator: tensors that claim to be on the device ``lazy:0``, but compute on the CPU.

They refuse what a GPU refuses: mixing with CPU tensors of more than 0 dims, `.numpy()`, and a CPU generator. The number
of times that the host would wait is counted. Speed, memory, rounding of kernels and determinism are not simulated.

`lazy` is a device type of torch that no installation uses. Its device guard does nothing, so that autograd works on it;
`cuda` and others need their runtime, and `meta` has no values.

    with accelerator() as counts:
        THERE.put(model)(THERE.put(x)).sum().backward()
    assert counts.waits == 0
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from tapfl.compute import Compute

THERE = Compute(torch.device("lazy", 0))
# operations with indices, which may be on the CPU
INDEXED = ("aten::index.", "aten::index_put", "aten::_index_put_impl_", "aten::copy_", "aten::_to_copy")
JOINED = ("aten::cat", "aten::stack")  # on a GPU these do not accept CPU tensors with 0 dims either
WAITS = (
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::is_nonzero"),
    *("aten::_linalg_check_errors", "aten::linalg_inv.", "aten::unique"),
)


@dataclass
class Counts:
    """Counts how often the host waits for the device, what it copies from it, and by which operations."""

    waits: int = 0
    to_host: int = 0
    by_operation: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, name: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.by_operation[f"{kind} {name}"] += 1


_counts = Counts()


class There(Tensor):
    """A tensor on the pretended device; `inner` has its values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made: There = Tensor._make_wrapper_subclass(cls, inner.size(), device=THERE.device, **layout)
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"There({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, leaves = func.name(), [*_leaves((args, kwargs))]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, There)]
    there, to = len(here) < len(tensors), _type_of(kwargs.get("device"))
    if there or to == "lazy":
        _refuse_cpu_generator(kwargs.get("generator"))
    if there:
        _check(name, args, here)
    if there and name == "aten::copy_" and not isinstance(args[0], There):
        _counts.note("to_host", name)
    inner_args, inner_kwargs = _mapped(lambda leaf: leaf.inner if isinstance(leaf, There) else leaf, (args, kwargs))
    if to == "lazy":
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if there and name == "aten::_to_copy" and to == "cpu":
        _counts.note("to_host", name)
        return result
    if not there and to != "lazy":
        return result

    def wrapped(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        own = [leaf for leaf in leaves if leaf is out or (isinstance(leaf, There) and leaf.inner is out)]
        return own[0] if own else There(out)  # in-place operations return their own argument

    return _mapped(wrapped, result)


# torch's own functions for trees take half of the time of a run, because each operation needs them several times


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | tuple | list):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(each)
    else:
        yield tree


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(change, each) for key, each in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)([_mapped(change, each) for each in tree])
    return change(tree)


def _check(name: str, args: Any, here: list[Tensor]) -> None:
    scalars_too = name.startswith(JOINED)
    if any(tensor.dim() or scalars_too for tensor in here) and not name.startswith(INDEXED):
        raise RuntimeError(f"{name}: expected all tensors on one device, but found {THERE.device} and cpu")
    indexed = name.startswith("aten::index.")
    if indexed and not isinstance(args[0], There):
        raise RuntimeError(f"{name}: indices on {THERE.device} of a tensor on cpu")
    if name.startswith(WAITS) or (indexed and any(i is not None and i.dtype == torch.bool for i in args[1])):
        _counts.note("waits", name)


def _type_of(device: Any) -> str | None:
    return None if device is None else torch.device(device).type


def _refuse_cpu_generator(generator: Any) -> None:
    if isinstance(generator, torch.Generator) and generator.device.type == "cpu":
        raise RuntimeError("Expected a device generator, but found one on cpu")


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Handles calls for which torch's argument parser would look up a real device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else None
        if func in _device_constructors() and _type_of(kwargs.get("device")) == "lazy":
            return _constructed(func, args, kwargs)
        if name == "to" and isinstance(first, Tensor):
            return _moved(func, first, args, kwargs)
        if isinstance(first, There):
            if name == "cpu":
                return _ToHost.apply(first, None)
            if name == "tolist":
                _counts.note("waits", name)
                return first.inner.tolist()
            if name == "new_tensor":
                return There(torch.tensor(args[1], dtype=first.dtype))
            if name in ("numpy", "__array__"):
                raise TypeError(f"can't convert {THERE.device} tensor to numpy; use Tensor.cpu() first")
            if func is torch.nn.functional.scaled_dot_product_attention:  # its choice of a kernel needs a real device
                return _attention(*args[:3], kwargs.get("attn_mask"), kwargs.get("scale"))
        return func(*args, **kwargs)


def _constructed(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    _refuse_cpu_generator(kwargs.get("generator"))
    gradient = kwargs.pop("requires_grad", False)
    with torch._C.DisableTorchFunction():
        made = func(*args, **{**kwargs, "device": "cpu"})
    return There(made).requires_grad_(gradient)


def _moved(func: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [*args[1:], kwargs.get("device"), kwargs.get("dtype")]
    given += [like for each in args[1:] if isinstance(each, Tensor) for like in (each.device, each.dtype)]
    target = next((_type_of(each) for each in given if isinstance(each, str | torch.device)), None)
    dtype = next((each for each in given if isinstance(each, torch.dtype)), None)
    if target == "lazy" and not isinstance(x, There):
        return _ToDevice.apply(x, dtype)
    if target == "cpu" and isinstance(x, There):
        return _ToHost.apply(x, dtype)
    if target == "lazy" or (target is None and isinstance(x, There)):
        return x if dtype in (None, x.dtype) else func(x, dtype)
    return func(*args, **kwargs)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    logits = (q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
    return (logits if mask is None else logits + mask).softmax(-1) @ v


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: Any) -> Tensor:
        return There(x.detach().to(dtype or x.dtype, copy=True))

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient.inner, None


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, dtype: Any) -> Tensor:
        _counts.note("to_host", "to")
        return x.inner.detach().to(dtype or x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return There(gradient), None


@contextlib.contextmanager
def accelerator() -> Iterator[Counts]:
    """Gives torch the device of `THERE` for the duration of the block."""
    global _counts
    from torch.optim import adam
    from torch.utils import _foreach_utils

    _counts = Counts()
    places = [
        module
        for module in (adam, _foreach_utils, sys.modules["torch.optim.optimizer"])
        if hasattr(module, "_get_fused_kernels_supported_devices")
    ]
    before = [module._get_fused_kernels_supported_devices for module in places]
    for module in places:
        module._get_fused_kernels_supported_devices = lambda: ["cpu", "lazy"]
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Functions(), _Dispatch():
            yield _counts
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        for module, function in zip(places, before, strict=True):
            module._get_fused_kernels_supported_devices = function
