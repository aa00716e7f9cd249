"""The device that a process computes on (CPU or GPU), its precision, and the transfers to and from it.

Only this file names a type of accelerator. All other code takes the device from its tensors, or has a `Compute`: `put`
moves models, images and adapters to the device, and `home` moves tensors back that are sent, stored, hashed or ranked.

The same seed gives the same bits on devices of the same `kind` with the same precision; on a GPU, only with
`deterministic`.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from traceback import clear_frames
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tapfl.config import ComputeOptions
from tapfl.errors import ConfigError, RunError

R = TypeVar("R")
T = TypeVar("T", bound=Tensor | nn.Module | Mapping[str, Tensor] | None)

KEPT = 2**29  # bytes of freed memory that the process keeps
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h


@dataclass(frozen=True)
class AtOnce:
    """Sizes of the chunks of long computations. They depend on the kind of device and affect only rounding.

    The defaults keep a chunk in a CPU's cache. A GPU has larger chunks, so that it does not wait for launches.

    Attributes:
        channels: number of channels of a layer that are scored at once (`tapfl.pruning.scores.terms`).
        strip: number of rows of a kernel matrix that are computed at once there.
        stream: number of floats of the residual stream per pass in KL probes (16 images of DeiT-T at 224 px).
    """

    channels: int = 128
    strip: int = 16
    stream: int = 600_000


CPU = torch.device("cpu")
OF_CPU, OF_GPU = AtOnce(), AtOnce(channels=1536, strip=64, stream=2**24)


@dataclass(frozen=True)
class Compute:
    """A device and a precision.

    Attributes:
        device: the device of all tensors in use.
        precision: `exact` is float32 everywhere. `fast` uses bfloat16 for products with frozen weights, and for passes
            whose result is only used to rank (docs/compute.md has the errors).
        deterministic: whether only deterministic operations are used.
        graphs: whether steps of local training are recorded as CUDA graphs, see `recorder`.
    """

    device: torch.device = CPU
    precision: str = "exact"
    deterministic: bool = False
    graphs: bool = False

    @classmethod
    def of(cls, options: ComputeOptions) -> Compute:
        """Returns the device and precision that the options name, on this machine.

        Raises:
            ConfigError: if this machine does not have them.
        """
        name = options.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            why = "finds no usable GPU" if torch.version.cuda else "was built without CUDA"
            raise ConfigError(f"compute.device = 'cuda': torch {why}; accepted: auto, cpu")
        if name == "cuda" and options.precision == "fast" and not torch.cuda.is_bf16_supported(False):
            raise ConfigError(
                f"compute.precision = 'fast': {torch.cuda.get_device_name()} does not compute in bfloat16; "
                "accepted: exact"
            )
        if name == "cpu" and options.graphs:
            raise ConfigError(f"compute.graphs = true: compute.device = {options.device!r} is the CPU; accepted: false")
        device = torch.device("cuda", 0) if name == "cuda" else CPU
        return cls(device, options.precision, options.deterministic, options.graphs)

    def prepare(self, share: float = 1.0) -> None:
        """Sets torch's global options in this process: one thread, and on a GPU full float32 and the choice of kernels.

        A worker uses one thread. More threads would compete for the cores and change the last bits of results.

        Args:
            share: fraction of the GPU's memory that tensors of this process may take.
        """
        torch.set_num_threads(1)
        _keep_freed_memory()
        if self.device.type == "cpu":  # all operations used here are deterministic on a CPU
            return
        # products in float32; torch's default for convolutions is TF32. These flags, because torch's exporters read
        # them and fail if `torch.backends.fp32_precision` of torch 2.9 and later was set instead
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False  # otherwise kernels are chosen by measured time
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at the first product
        torch.use_deterministic_algorithms(self.deterministic)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  (a property of the module)
        if share < 1:
            torch.cuda.set_per_process_memory_fraction(share, self.device)

    def put(self, x: T) -> T:
        """Returns a tensor, a dict of tensors or a module on the device: a copy, or if it is the CPU, `x` itself.

        The host does not wait for a GPU. `x` may change at once, because CUDA has then read it (if it is not pinned).
        """
        if self.device.type == "cpu" or x is None:
            return x
        moved: Any
        if isinstance(x, nn.Module):  # a copy, because `Module.to` works in place
            moved = copy.deepcopy(x).to(self.device)
        elif isinstance(x, Mapping):
            moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in x.items()}
        else:
            moved = x.to(self.device, non_blocking=True)
        return moved

    def forward(self) -> AbstractContextManager[Any]:
        """Returns a context for passes whose result is only used to rank: bfloat16 autocast with `fast`, else none."""
        return nullcontext() if self.reduced is None else torch.autocast(self.device.type, self.reduced)

    @property
    def reduced(self) -> torch.dtype | None:
        """The reduced precision of `fast`; None with `exact`."""
        return torch.bfloat16 if self.precision == "fast" else None

    @property
    def recorder(self) -> Recorder | None:
        """Records calls on this device; None if calls are not recorded."""
        return _graphs(self.device) if self.graphs and self.device.type == "cuda" else None

    def seconds(self, call: Callable[[], object]) -> float:
        """Returns the seconds that `call` takes: on a CPU, this thread's CPU time; on a GPU, until its work is done.

        CPU time does not include time that other processes take from the core.
        """
        if self.device.type != "cuda":
            start = time.thread_time()
            call()
            return time.thread_time() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end)) / 1e3

    def release(self) -> None:
        """Releases unused GPU memory, so that other processes can use it."""
        if self.device.type == "cuda":
            free_memory()

    @property
    def at_once(self) -> AtOnce:
        return OF_CPU if self.device.type == "cpu" else OF_GPU

    @property
    def kind(self) -> str:
        """The kind of processor as text: results have the same bits if it and the package versions are the same."""
        if self.device.type != "cuda":
            return f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}"
        cudnn = torch.backends.cudnn.version()
        return f"{torch.cuda.get_device_name(self.device)}, CUDA {torch.version.cuda}, cuDNN {cudnn}"

    @property
    def marks(self) -> tuple[str, ...]:
        """Additional parts of the key of a cached result; empty for exact results on a CPU."""
        plain = self.device.type == "cpu" and self.precision == "exact"
        return () if plain else (self.kind, self.precision)


class Recorder(Protocol):
    """Records calls of functions that work on the same tensors each time, and replays each with a single launch."""

    def aside(self, call: Callable[[], Tensor]) -> Tensor:
        """Returns ``call()``, run on the stream of the recordings, so that state of a first call is created there."""
        ...

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Returns a function that replays `call` and returns the same tensor each time. `call` itself is not executed.

        Only operations on tensors of the device are recorded. `call` must not read their values, nor create tensors
        from data on the host.
        """
        ...


class Graphs(Recorder):
    """Records CUDA graphs, on a stream of its own, because libraries create their workspaces per stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def aside(self, call: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)  # before any tensor that `call` used is freed
        return result

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # `thread_local`, because another thread may read the next images meanwhile and wait for the GPU
        recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        hook = register_optimizer_step_pre_hook(_capturable)
        try:
            with recording:
                result = call()
        finally:
            hook.remove()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def _capturable(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Allows a step of Adam to be recorded. Its step count must be on the GPU, as it always is in fused Adam."""
    for group in optimizer.param_groups:
        group["capturable"] = True


@lru_cache(maxsize=1)
def _graphs(device: torch.device) -> Graphs:
    return Graphs(device)


def within_memory(call: Callable[[], R], what: str) -> R:
    """Returns ``call()``. If the GPU is out of memory, cached memory is released and the call is tried once more.

    Args:
        what: names the work in the message.

    Raises:
        RunError: if the memory is full again.
    """
    try:
        return call()
    except torch.OutOfMemoryError:
        pass  # outside this block, the error and what its frames hold are gone
    free_memory()
    try:
        return call()
    except torch.OutOfMemoryError as error:
        full = str(error).splitlines()[0]
        lower = "a smaller train.batch, train.together = 1, or fewer workers per GPU (--actor-gpus)"
        raise RunError(f"{what}: the memory is full ({full}); accepted: {lower}") from None


def free_memory(errors: Iterable[BaseException] = ()) -> None:
    """Releases GPU memory that nothing uses, also that of unreachable cycles.

    Args:
        errors: the frames in their tracebacks, which hold what failed calls had computed, are cleared.
    """
    for error in errors:
        clear_frames(error.__traceback__)
        error.__traceback__ = None
    gc.collect()
    torch.cuda.empty_cache()


def is_fault(error: BaseException) -> bool:
    """Returns whether an error makes the GPU unusable for the rest of this process; running out of memory does not."""
    if not isinstance(error, RuntimeError) or "out of memory" in str(error):
        return False
    kind = getattr(torch, "AcceleratorError", ())  # since torch 2.8; errors of CUDA libraries are RuntimeErrors
    return isinstance(error, kind) or str(error).startswith(("CUDA error", "cuDNN error"))


def gpus_here() -> int:
    return torch.cuda.device_count()


HERE = Compute()  # the CPU, exact


def home(x: T) -> T:
    """Returns a tensor, or a dict of tensors, detached and on the CPU."""
    moved: Any = None
    if isinstance(x, Mapping):
        moved = {name: tensor.detach().cpu() for name, tensor in x.items()}
    elif isinstance(x, Tensor):
        moved = x.detach().cpu()
    return moved


@lru_cache(maxsize=1)
def _keep_freed_memory() -> None:
    """Lets this process reuse up to `KEPT` bytes of freed memory.

    By default, the GNU C library returns the memory of each step's activations to the system, which must clear the
    pages again for the next step. That takes up to a tenth of a step. Other C libraries have no `mallopt`. Settings in
    the environment take precedence.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest value that it accepts
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


@lru_cache(maxsize=1)
def _cpu() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()
