"""Where a process computes, how precisely, and what of "the same bits" follows from it.

Only this file knows what an accelerator is called. The mathematics takes the device from its arguments; a `Compute` is
carried by what stands between host and device: `put` brings models, images and adapters there, and `home` brings back
what is sent, stored, hashed or ranked.

The same seed gives the same bits on devices of one `kind`, with one precision. On a GPU that takes `deterministic`.
"""

from __future__ import annotations

import copy
import ctypes
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tapfl.config import ComputeOptions
from tapfl.errors import ConfigError, RunError

R = TypeVar("R")
T = TypeVar("T", bound=Tensor | nn.Module | Mapping[str, Tensor] | None)

KEPT, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = 2**29, -1, -3  # the latter from malloc.h


@dataclass(frozen=True)
class AtOnce:
    """How much of a long computation goes together, by kind of device: results differ by rounding between kinds.

    The defaults keep what is worked on in a CPU's cache. A GPU works on more, so that it is not waiting for launches.

    Attributes:
        channels: of a layer, scored together (`tapfl.pruning.scores.terms`).
        strip: rows of a kernel matrix that are computed together, likewise.
        stream: floats of the residual stream that pass a block together in KL probes (16 images of DeiT-T at 224 px).
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
        device: of all tensors that are computed with.
        precision: `exact` computes everything as on the CPU; with `fast`, passes of which a ranking is all that is used
            and the products with frozen weights are in bfloat16 (docs/compute.md has the errors).
        deterministic: only operations that give the same bits each time.
        graphs: whether steps of local training are recorded, see `recorder`.
    """

    device: torch.device = CPU
    precision: str = "exact"
    deterministic: bool = False
    graphs: bool = False

    @classmethod
    def of(cls, options: ComputeOptions) -> Compute:
        """Returns what the options name, on this machine.

        Raises:
            ConfigError: if this machine does not have it.
        """
        name = options.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            why = "finds no GPU that it can use" if torch.version.cuda else "has no CUDA"
            raise ConfigError(f"compute.device = 'cuda': torch here {why}; accepted: auto, cpu")
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
        """Sets what torch knows once a process: one thread, and on a GPU full float32 and the choice of kernels.

        A worker uses one thread: more would compete for the cores and change the last bit.

        Args:
            share: of the GPU's memory that tensors of this process may take.
        """
        torch.set_num_threads(1)
        _keep_freed_memory()
        if self.device.type == "cpu":  # where all operations that are used here are deterministic
            return
        # products in float32; torch's default for convolutions is TF32. Its exporters read these flags, and fail where
        # `torch.backends.fp32_precision`, of torch 2.9 and later, was set in their place.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False  # it would choose kernels by their time
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product on the GPU
        torch.use_deterministic_algorithms(self.deterministic)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  (a property of the module)
        if share < 1:
            torch.cuda.set_per_process_memory_fraction(share, self.device)

    def put(self, x: T) -> T:
        """Returns a tensor, tensors by name or a module on the device: a copy, or where it is the CPU, `x` itself."""
        if self.device.type == "cpu" or x is None:
            return x
        moved: Any
        if isinstance(x, nn.Module):  # `Module.to` would move the caller's own
            moved = copy.deepcopy(x).to(self.device)
        elif isinstance(x, Mapping):
            moved = {name: tensor.to(self.device) for name, tensor in x.items()}
        else:
            moved = x.to(self.device)
        return moved

    def forward(self) -> AbstractContextManager[Any]:
        """Returns a context for passes of which a ranking is all that is used: bfloat16 where `fast`, else nothing."""
        return nullcontext() if self.reduced is None else torch.autocast(self.device.type, self.reduced)

    @property
    def reduced(self) -> torch.dtype | None:
        """The type of numbers where `fast`, for passes and products as above; None where all are float32."""
        return torch.bfloat16 if self.precision == "fast" else None

    @property
    def recorder(self) -> Recorder | None:
        """What records calls on this device; None: nothing does."""
        return _graphs(self.device) if self.graphs and self.device.type == "cuda" else None

    def seconds(self, call: Callable[[], object]) -> float:
        """Returns how long `call` takes: on a CPU the seconds of this thread, on a GPU those until its work is done.

        Other processes take time from a core, which is not counted; a launch takes no time of the GPU.
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
        """Gives the memory of a GPU that nothing uses any more to its other processes."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def at_once(self) -> AtOnce:
        return OF_CPU if self.device.type == "cpu" else OF_GPU

    @property
    def kind(self) -> str:
        """What has to be the same for the same bits, besides the versions of the packages, in words."""
        if self.device.type != "cuda":
            return f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}"
        cudnn = torch.backends.cudnn.version()
        return f"{torch.cuda.get_device_name(self.device)}, CUDA {torch.version.cuda}, cuDNN {cudnn}"

    @property
    def marks(self) -> tuple[str, ...]:
        """What the key of a cached result has besides what it is computed from; nothing for exact results of CPUs."""
        plain = self.device.type == "cpu" and self.precision == "exact"
        return () if plain else (self.kind, self.precision)


class Recorder(Protocol):
    """Records calls of functions that work on the same tensors each time, to make them again with one launch."""

    def aside(self, call: Callable[[], Tensor]) -> Tensor:
        """Returns ``call()``, made where calls are recorded, so that what is made at a first call is there."""
        ...

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Returns what does as `call` does. It returns the same tensor each time; `call` itself is not made.

        Only what `call` does to tensors on the device is recorded: it must not look at their values, nor make a tensor
        of what is on the host.
        """
        ...


class Graphs(Recorder):
    """CUDA graphs, on a stream of their own: libraries make their workspaces for each stream anew."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def aside(self, call: Callable[[], Tensor]) -> Tensor:
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found = call()
        here.wait_stream(self._stream)  # before anything that `call` read or made is freed
        return found

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # `thread_local`, as the next images may be read meanwhile by another thread, which waits for the GPU
        recording = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        allowing = register_optimizer_step_pre_hook(_capturable)
        try:
            with recording:
                found = call()
        finally:
            allowing.remove()

        def again() -> Tensor:
            graph.replay()
            return found

        return again


def _capturable(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Lets a step of Adam be recorded. Its count of steps is on the GPU: it is so if fused, without this."""
    for group in optimizer.param_groups:
        group["capturable"] = True


@lru_cache(maxsize=1)
def _graphs(device: torch.device) -> Graphs:
    return Graphs(device)


def within_memory(call: Callable[[], R], what: str) -> R:
    """Returns what `call` returns. If a GPU's memory is full, what others left in it is freed, and it is tried again.

    Raises:
        RunError: if the memory is full again.
    """
    try:
        return call()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    try:
        return call()
    except torch.OutOfMemoryError as error:
        full = str(error).splitlines()[0]
        lower = "a smaller train.batch, train.together = 1, or fewer workers a GPU (--actor-gpus)"
        raise RunError(f"{what}: the memory is full ({full}); accepted: {lower}") from None


def is_fault(error: BaseException) -> bool:
    """Returns whether an error of a GPU leaves it unusable for the rest of this process; a full memory does not."""
    if not isinstance(error, RuntimeError) or "out of memory" in str(error):
        return False
    kind = getattr(torch, "AcceleratorError", ())  # torch 2.8; libraries' errors are plain RuntimeErrors
    return isinstance(error, kind) or str(error).startswith(("CUDA error", "cuDNN error"))


def gpus_here() -> int:
    return torch.cuda.device_count()


HERE = Compute()  # the CPU, exact


def home(x: T) -> T:
    """Returns a tensor or tensors by name, detached, on the CPU."""
    moved: Any = None
    if isinstance(x, Mapping):
        moved = {name: tensor.detach().cpu() for name, tensor in x.items()}
    elif isinstance(x, Tensor):
        moved = x.detach().cpu()
    return moved


@lru_cache(maxsize=1)
def _keep_freed_memory() -> None:
    """Lets this process use freed memory again, up to `KEPT` bytes of it.

    By default the GNU C library returns the activations of each step to the system, which clears their pages anew for
    the next: up to a tenth of a step. Other libraries have no `mallopt`. What the environment says of it stands.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that it accepts
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


@lru_cache(maxsize=1)
def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
