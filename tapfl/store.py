"""Files of a run: written whole or not at all, without pickle.

A file appears under its name only when every byte of it is on disk (temporary file, fsync, rename), so a run that is
killed at any moment leaves either the old version or the new one. torch is loaded with the first tensor, so that bad
options are refused before.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from tapfl.errors import ConfigError, PlanError

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # of a full disk, say, which names no file
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
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
    from safetensors.torch import save

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
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
    """Returns `about` as JSON with a checksum of it and the tensors beside which it stands."""
    return json.dumps({**about, "checksum": content_hash(json.dumps(about), tensors)})


def unseal(text: str, tensors: Tensors, source: str, **of: Any) -> dict[str, Any]:
    """Returns what was sealed; what has no checksum is of a version that wrote none.

    Args:
        of: what the sealed says of whose it is, such as ``device=3``: a file can lie whole in another's place.

    Raises:
        PlanError: naming `source`, if text or tensors are not those that were written, or those of something else.
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


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(*parts: bytes | str | Tensors) -> str:
    """Returns 16 hex digits that name a content: text, bytes, or tensors by name, shape, type and value."""
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
            digest.update(f"{len(content)} bytes:".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


@contextmanager
def only_one(out: Path, what: str) -> Iterator[None]:
    """Keeps other processes out of a folder while the block lasts, making it if need be.

    Raises:
        ConfigError: if one is at work in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _held(out, f"--out {out}: another {what}"):
        yield


def _held(folder: Path, other: str) -> IO[str]:
    """Returns an open file that keeps other processes out of a folder until it is closed, or this process has ended.

    Raises:
        ConfigError: if one is at work in it; it begins with `other`.
    """
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigError(f"{other} is at work in this folder") from None
    return lock


def cache_folder(option: str = "") -> Path:
    """Returns the folder of what can be made again: `option`, else TAPFL_CACHE, else ~/.cache/tapfl."""
    return Path(option or os.environ.get("TAPFL_CACHE") or Path.home() / ".cache" / "tapfl")


def run_path(out: str, run_id: int) -> Path:
    """Returns a run's folder: `out`, or one that server and devices derive alike from Flower's run id."""
    return Path(out) if out else Path.home() / "tapfl-runs" / str(run_id)


class Versions:
    """Files of a folder by round: ``round-NNNN.safetensors``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}.safetensors"

    def rounds(self) -> list[int]:
        """Returns the rounds of which there is a version, in order."""
        matches = (re.fullmatch(r"round-(\d+)\.safetensors", file.name) for file in self.folder.glob("*"))
        return sorted(int(match[1]) for match in matches if match)

    def keep(self, rounds: Collection[int]) -> None:
        """Removes all versions but these."""
        for round in self.rounds():
            if round not in rounds:
                self.path(round).unlink(missing_ok=True)


class RunFolder:
    """A run's folder; a context manager, for as long as a run is at work in it.

    ```
    config.json versions.json     the run as resolved, and with what
    summaries/NN.safetensors      what each device said of its images
    plans/NN.json NN.safetensors  each device's plan, and its weights where the plan alone does not give them
    metric-sets/NN.json           how many public images of each class each plan was measured on, and the pool has
    server/round-NNNN.safetensors all that the server knows after each round, the last two: `strategies.checkpoint`
    devices/NN/                   a device's own storage; in a deployment it lies on the device
    metrics.jsonl                 one line a device a round, one a round, one a loss
    timing.json                   wall seconds by phase and by round
    tensorboard/ mlflow.json      event files, and which MLflow run this is, where they are asked for
    summary.json                  the whole, written last
    ```
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None  # for as long as the block, or this process, lasts
        self._new = False

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Makes the folder. Raises ConfigError if something is there already, so that no run is overwritten."""
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
        """Returns the folder of a run to go on with. Raises ConfigError if it is none, or if a run is at work in it."""
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
        if self._new and not (self.path / "config.json").exists():  # nothing that could be gone on with
            (self.path / ".lock").unlink(missing_ok=True)
            with suppress(OSError):
                self.path.rmdir()

    def write_versions(self) -> None:
        """Records the installed version of every package that can change a result."""
        packages = ("tapfl", "torch", "timm", "peft", "flwr", "flwr-datasets", "ray", "numpy", "scikit-learn")
        write_json(self.path / "versions.json", {name: metadata.version(name) for name in packages})

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def server(self) -> Versions:
        return Versions(self.path / "server")

    def metric_set(self, partition_id: int) -> Path:
        """Returns the file that says which classes the public images are of that a device's plan was measured on."""
        return self.path / "metric-sets" / f"{partition_id:02d}.json"

    def device(self, partition_id: int) -> Path:
        """Returns the storage of a device that is simulated on this machine."""
        return self.path / "devices" / f"{partition_id:02d}"
