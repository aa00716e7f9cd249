"""Files that are written atomically and verified by checksums, without pickle.

A file gets its name only when all of it is on disk (temporary file, fsync, rename). A run that is killed at any moment
therefore leaves either the old version or the new one. torch is imported only when tensors are used, so that invalid
options are refused before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from tapfl.errors import ConfigError, PlanError
from tapfl.options import expanded

if TYPE_CHECKING:
    import torch

TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}(\.\w+)?")  # a name that `tempfile` has completed

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
        temporary.chmod(0o644)  # mkstemp makes it private, but other users may read a run's folder
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # some, such as those of a full disk, do not name the file
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def remove_leftovers(folder: Path, age: float = 0.0) -> None:
    """Removes the temporary files and folders that killed processes have left in a folder and below it.

    Args:
        age: seconds since the last change; for a folder in which other processes may be writing.
    """
    for found in [*folder.rglob(".*")]:
        if TEMPORARY.fullmatch(found.name):
            with suppress(OSError):  # another process may have removed it
                if time.time() - found.stat().st_mtime >= age:
                    shutil.rmtree(found) if found.is_dir() else found.unlink()


@contextmanager
def whole_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder that is renamed to `path` when the block ends, and removed if it fails.

    Args:
        replace: replace an existing folder. It is first moved aside; if the process is killed then, `path` is missing.

    Raises:
        OSError: if `path` exists and is not empty, without `replace`.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = (Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")) for _ in range(2))
    try:
        yield temporary
        temporary.chmod(0o755)
        exists = replace and path.exists()
        if exists:
            path.replace(aside)
        try:
            temporary.replace(path)
        except OSError:
            if exists:
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
        raise PlanError(f"{path}: is not a complete safetensors file ({error})") from None


def unpack_tensors(content: bytes, source: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file's content. Raises PlanError, naming `source`, if it is damaged."""
    from safetensors.torch import load

    try:
        return load(content)
    except SafetensorError as error:
        raise PlanError(f"{source}: is not a complete safetensors file ({error})") from None


def seal(about: Mapping[str, Any], tensors: Tensors) -> str:
    """Returns `about` as JSON, with a checksum of it and of the tensors it describes."""
    return json.dumps({**about, "checksum": content_hash(json.dumps(about), tensors)})


def unseal(text: str, tensors: Tensors, source: str, **of: Any) -> dict[str, Any]:
    """Returns the sealed mapping of `seal`. A text without a checksum, from an old version, is accepted.

    Args:
        source: names the file or message in errors.
        of: expected entries that identify the owner, such as ``device=3``, because an intact file may be misplaced.

    Raises:
        PlanError: if text or tensors were changed, or belong to another owner.
    """
    try:
        about = json.loads(text)
        checksum = about.pop("checksum", None)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise PlanError(f"{source}: is damaged ({error})") from None
    if checksum is not None and checksum != content_hash(json.dumps(about), tensors):
        raise PlanError(f"{source}: was changed or damaged since it was written (its checksum differs)")
    for key, value in of.items():
        if about.get(key, value) != value:
            raise PlanError(f"{source}: is that of {key} {about[key]}, not of {key} {value}")
    return dict(about)


def write_sealed(path: Path, tensors: Tensors, name: str, about: Mapping[str, Any]) -> None:
    """Writes a safetensors file atomically, with `about` sealed under `name` in its metadata."""
    write_tensors(path, tensors, {name: seal(about, tensors)})


def read_sealed(path: Path, name: str, **of: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the tensors and the mapping of a sealed file. Raises PlanError as `read_tensors` and `unseal` do."""
    tensors = read_tensors(path)
    return tensors, unseal(read_about(path).get(name, "{}"), tensors, str(path), **of)


def part_of(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """Returns the tensors whose names begin with `prefix`, by their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Pieces(NamedTuple):
    """Bytes that are hashed together but need not be in memory at the same time.

    Attributes:
        nbytes: total number of bytes.
        pieces: contiguous buffers.
    """

    nbytes: int
    pieces: Iterable[Any]


def content_hash(*parts: bytes | str | Tensors | Pieces) -> str:
    """Returns a hash, 16 hex digits, of text, bytes, and tensors (their names, shapes, types and values)."""
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


def cache_folder(option: str = "") -> Path:
    """Returns the cache folder: `option`, or TAPFL_CACHE, or ~/.cache/tapfl."""
    if option:
        return Path(option)
    if given := os.environ.get("TAPFL_CACHE"):
        return expanded("TAPFL_CACHE", given)
    return home_folder("cache or TAPFL_CACHE") / ".cache" / "tapfl"


def home_folder(option: str) -> Path:
    """Returns the user's home folder. Raises ConfigError with the `option` to set if there is none."""
    try:
        return Path.home()
    except RuntimeError:  # as in a container with a user that has no account
        raise ConfigError(f"{option}: is not set, and this user has no home folder; accepted: a folder") from None
