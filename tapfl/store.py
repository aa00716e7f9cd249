"""Files of a run, written atomically and without pickle.

A file appears under its name only when every byte of it is on disk (temporary file, fsync, rename), so a run that is
killed at any moment leaves either the old version or the new one. torch is imported with the first tensor, so that
invalid options are refused before.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from tapfl.errors import ConfigError, PlanError

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file that is renamed to `path` when the block ends, and removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; others may read a run's folder
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # a full disk, for example, names no file
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


@contextmanager
def whole_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder that is renamed to `path` when the block ends, and removed if it fails.

    Args:
        replace: replace an existing folder, which is first moved aside; if killed at that moment, `path` is missing.

    Raises:
        OSError: if `path` exists, is not empty, and must not be replaced.
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
    """Writes a file atomically, creating its folder if necessary."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, indented, with a final newline."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def pack_tensors(tensors: Tensors, about: Mapping[str, str] | None = None) -> bytes:
    """Returns the content of a safetensors file; `about` becomes its metadata."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(contiguous, metadata=dict(about or {}))


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


def read_about(path: Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file. Raises PlanError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{path}: is not a whole safetensors file ({error})") from None


def unpack_tensors(content: bytes, source: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file's content. Raises PlanError, naming `source`, if it is damaged."""
    from safetensors.torch import load

    try:
        return load(content)
    except SafetensorError as error:
        raise PlanError(f"{source}: is not a whole safetensors file ({error})") from None


def seal(about: Mapping[str, Any], tensors: Tensors) -> str:
    """Returns `about` as JSON with a checksum of itself and of the tensors it describes."""
    return json.dumps({**about, "checksum": content_hash(json.dumps(about), tensors)})


def unseal(text: str, tensors: Tensors, source: str, **of: Any) -> dict[str, Any]:
    """Returns the sealed mapping; a text without a checksum comes from a version that wrote none.

    Args:
        of: expected entries that name the owner, such as ``device=3``: an intact file can be in the wrong place.

    Raises:
        PlanError: naming `source`, if text or tensors were changed, or belong to another owner.
    """
    try:
        about = json.loads(text)
        given = about.pop("checksum", None)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise PlanError(f"{source}: is damaged ({error})") from None
    if given is not None and given != content_hash(json.dumps(about), tensors):
        raise PlanError(f"{source}: was changed or damaged since it was written (its checksum differs)")
    for key, value in of.items():
        if about.get(key, value) != value:
            raise PlanError(f"{source}: is that of {key} {about[key]}, not of {key} {value}")
    return dict(about)


def write_sealed(path: Path, tensors: Tensors, name: str, about: Mapping[str, Any]) -> None:
    """Writes a safetensors file atomically, with `about` sealed under `name` in its metadata."""
    write_tensors(path, tensors, {name: seal(about, tensors)})


def read_sealed(path: Path, name: str, **of: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the tensors and the sealed mapping of such a file. Raises PlanError as `read_tensors` and `unseal`."""
    tensors = read_tensors(path)
    return tensors, unseal(read_about(path).get(name, "{}"), tensors, str(path), **of)


def part_of(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """Returns the tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Pieces(NamedTuple):
    """Bytes that are hashed as one, and need not be in memory together."""

    nbytes: int
    pieces: Iterable[Any]  # buffers, contiguous


def content_hash(*parts: bytes | str | Tensors | Pieces) -> str:
    """Returns 16 hex digits of a hash of text, bytes, or tensors by name, shape, type and value."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Mapping):
            import torch

            digest.update(f"{len(part)} tensors:".encode())
            for name in sorted(part):
                tensor = part[name].detach().cpu().contiguous()
                digest.update(f"{name!r}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        else:
            content = part.encode() if isinstance(part, str) else part
            whole = content if isinstance(content, Pieces) else Pieces(len(content), [content])
            digest.update(f"{whole.nbytes} bytes:".encode())
            for piece in whole.pieces:
                digest.update(piece)
    return digest.hexdigest()[:16]


@contextmanager
def only_one(out: Path, what: str) -> Iterator[None]:
    """Locks a folder against other processes while the block lasts, creating it if necessary.

    A folder that is new, and that the block leaves empty, is removed again.

    Raises:
        ConfigError: if another process has locked it.
    """
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with _held(out, f"--out {out}: another {what}") as lock:
        try:
            yield
        finally:
            if new and [each.name for each in out.glob("*")] == [Path(lock.name).name]:
                Path(lock.name).unlink()
                out.rmdir()


def _held(folder: Path, other: str) -> IO[str]:
    """Returns an open file that locks a folder until it is closed, or this process has ended.

    Raises:
        ConfigError: if another process has locked it; the message begins with `other`.
    """
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigError(f"{other} is at work in this folder") from None
    return lock


def cache_folder(option: str = "") -> Path:
    """Returns the cache folder: `option`, or TAPFL_CACHE, or ~/.cache/tapfl."""
    return Path(option or os.environ.get("TAPFL_CACHE") or Path.home() / ".cache" / "tapfl")


def run_path(out: str, run_id: int) -> Path:
    """Returns a run's folder: `out`, or one that server and devices both derive from Flower's run id."""
    return Path(out) if out else Path.home() / "tapfl-runs" / str(run_id)


class Versions:
    """Files of a folder by round: ``round-NNNN.safetensors``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}.safetensors"

    def rounds(self) -> list[int]:
        """Returns the rounds that have a version, in order."""
        matches = (re.fullmatch(r"round-(\d+)\.safetensors", file.name) for file in self.folder.glob("*"))
        return sorted(int(match[1]) for match in matches if match)

    def keep(self, rounds: Collection[int]) -> None:
        """Removes all versions but these."""
        for round in self.rounds():
            if round not in rounds:
                self.path(round).unlink(missing_ok=True)


class RunFolder:
    """A run's folder; a context manager that holds its lock while a run works in it.

    ```
    config.json inputs.json       the resolved options; fingerprints of the images and files that they name
    versions.json                 the versions of the packages, and the kind of processor
    summaries/NN.safetensors      the mixture that each device sent
    plans/NN.json NN.safetensors  each device's plan, and its weights if the plan alone does not determine them
    metric-sets/NN.json           public images of each class in the metric set of each plan, and in the pool
    start.safetensors             the adapters of the warm start, if there is one
    server/round-NNNN.safetensors the server's state after each of the last two rounds: `strategies.state`
    devices/NN/                   a device's own storage; in a deployment it is on the device
    metrics.jsonl                 one line a device a round, one a round, one a loss
    timing.json                   wall seconds by phase and by round
    tensorboard/ mlflow.json      event files, and the id of the MLflow run, if these loggers are on
    summary.json                  the results of the whole run, written last
    ```
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None  # held until the block or this process ends
        self._new = False

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Creates the folder. Raises ConfigError if it exists, so that no run is overwritten."""
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(f"out = {str(path)!r}: exists already; give a folder that does not") from None
        except OSError as error:
            raise ConfigError(f"out = {str(path)!r}: cannot be made ({error.strerror})") from None
        made = cls(path)
        made._lock, made._new = _held(path, f"out = {str(path)!r}: another run"), True
        return made

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Returns the folder of a run to resume. Raises ConfigError if it holds no run, or a run is at work in it."""
        found = cls(path)
        found.config()
        found._lock = _held(path, f"out = {str(path)!r}: another run")
        return found

    def config(self) -> dict[str, Any]:
        """Returns the options of the run. Raises ConfigError if the folder holds no run."""
        try:
            found = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"resume: {self.path} is not a run's folder (config.json: {error})") from None
        if not isinstance(found, dict):
            raise ConfigError(f"resume: {self.path} is not a run's folder (config.json holds no options)")
        return found

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock:
            self._lock.close()
        if self._new and not (self.path / "config.json").exists():  # nothing to resume
            shutil.rmtree(self.path, ignore_errors=True)

    def write_versions(self, besides: Mapping[str, str]) -> None:
        """Records the installed version of every package that can change a result, and what else can, `besides`."""
        packages = ("tapfl", "torch", "timm", "peft", "flwr", "flwr-datasets", "ray", "numpy", "scikit-learn")
        write_json(self.path / "versions.json", {name: metadata.version(name) for name in packages} | dict(besides))

    @property
    def server(self) -> Versions:
        return Versions(self.path / "server")

    def metric_set(self, partition_id: int) -> Path:
        """Returns the file with the class counts of the metric set of a device's plan."""
        return self.path / "metric-sets" / f"{partition_id:02d}.json"

    def device(self, partition_id: int) -> Path:
        """Returns the storage folder of a simulated device."""
        return self.path / "devices" / f"{partition_id:02d}"
