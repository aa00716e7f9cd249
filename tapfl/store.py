"""Files of a run: written whole or not at all, without pickle.

A file appears under its name only when every byte of it is on disk (temporary file, fsync, rename), so a run that is
killed at any moment leaves either the old version or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors

from tapfl.errors import ConfigError, PlanError

Tensors = Mapping[str, torch.Tensor]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a file to write to that takes the name `path` when the block ends, and is gone if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; a run's folder is for reading
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder to fill that takes the name `path` when the block ends, and is gone if it fails.

    Args:
        replace: take the place of what is there, which is first moved aside: killed right then, `path` is missing.

    Raises:
        OSError: if `path` is there with something in it, and must not be replaced.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = (Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")) for _ in range(2))
    try:
        yield temporary
        temporary.chmod(0o755)
        there = replace and path.exists()
        if there:
            path.replace(aside)
        try:
            temporary.replace(path)
        except OSError:
            if there:
                aside.replace(path)
            raise
    finally:
        for folder in (temporary, aside):
            shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically, making its folder if need be."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, indented, with a final newline."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def pack_tensors(tensors: Tensors, about: Mapping[str, str] | None = None) -> bytes:
    """Returns the content of a safetensors file; `about` becomes its metadata."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return serialize_tensors(contiguous, metadata=dict(about or {}))


def write_tensors(path: Path, tensors: Tensors, about: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically; `about` becomes its metadata."""
    write_bytes(path, pack_tensors(tensors, about))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file. Raises PlanError if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror})") from None
    return unpack_tensors(content, str(path))


def unpack_tensors(content: bytes, source: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file's content. Raises PlanError, naming `source`, if it is damaged."""
    try:
        return parse_tensors(content)
    except SafetensorError as error:
        raise PlanError(f"{source}: is not a whole safetensors file ({error})") from None


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(*parts: bytes | str | Tensors) -> str:
    """Returns 16 hex digits that name a content: text, bytes, or tensors by name, shape, type and value."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Mapping):
            digest.update(f"{len(part)} tensors:".encode())
            for name in sorted(part):
                tensor = part[name].detach().cpu().contiguous()
                digest.update(f"{name!r}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        else:
            content = part.encode() if isinstance(part, str) else part
            digest.update(f"{len(content)} bytes:".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def cache_folder(option: str = "") -> Path:
    """Returns the folder of what can be made again: `option`, else TAPFL_CACHE, else ~/.cache/tapfl."""
    return Path(option or os.environ.get("TAPFL_CACHE") or Path.home() / ".cache" / "tapfl")


def run_path(out: str, run_id: int) -> Path:
    """Returns a run's folder: `out`, or one that server and devices derive alike from Flower's run id."""
    return Path(out) if out else Path.home() / "tapfl-runs" / str(run_id)


class RunFolder:
    """A run's folder.

    ```
    config.json versions.json     the run as resolved, and with what
    plans/NN.json summaries/NN.safetensors
    server/round-NNNN.safetensors the global adapters after each round
    devices/NN/                   a device's own storage; in a deployment it lies on the device
    metrics.jsonl summary.json    one line a device a round and one a round; the whole
    ```
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Makes the folder. Raises ConfigError if something is there already, so that no run is overwritten."""
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(f"out = {str(path)!r}: exists already; give a folder that does not") from None
        except OSError as error:
            raise ConfigError(f"out = {str(path)!r}: cannot be made ({error.strerror})") from None
        return cls(path)

    def write_versions(self) -> None:
        """Records the installed version of every package that can change a result."""
        packages = ("tapfl", "torch", "timm", "peft", "flwr", "flwr-datasets", "ray", "numpy", "scikit-learn")
        write_json(self.path / "versions.json", {name: metadata.version(name) for name in packages})

    def append_metrics(self, **values: Any) -> None:
        """Adds one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def write_adapters(self, round: int, params: Tensors) -> None:
        """Keeps the global adapters after `round`, and those of the round before it."""
        folder = self.path / "server"
        write_tensors(folder / f"round-{round:04d}.safetensors", params)
        (folder / f"round-{round - 2:04d}.safetensors").unlink(missing_ok=True)

    def device(self, partition_id: int) -> Path:
        """Returns the storage of a device that is simulated on this machine."""
        return self.path / "devices" / f"{partition_id:02d}"
