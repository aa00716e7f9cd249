"""What lies behind the options that name images or files, as fingerprints: work must not go on with other content."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from tapfl.config import INPUT_OPTIONS, NOT_PATHS, RunConfig
from tapfl.data.sources import ACCEPTED
from tapfl.errors import ConfigError, DataError
from tapfl.store import content_hash, sha256_of

IMAGES = ("data.source", "data.public")


def contents(config: RunConfig, options: Iterable[str] = INPUT_OPTIONS) -> dict[str, str]:
    """Returns the fingerprints of what these options of a run name. Raises TapflError if something cannot be read."""
    flat = config.flat()
    return fingerprints((option, flat[option]) for option in options)


def fingerprints(named: Iterable[tuple[str, object]]) -> dict[str, str]:
    """Returns ``option = 'value'`` -> fingerprint for options and values; what is built in has none and is left out.

    Raises:
        TapflError: if something cannot be read.
    """
    return {
        f"{option} = {value!r}": content_of(option, str(value)) for option, value in named if value not in NOT_PATHS
    }


def content_of(option: str, value: str) -> str:
    """Returns the fingerprint of what an option's value names, 16 hex digits: of images that of their `ImageSet`.

    Raises:
        DataError: if images are missing.
        ConfigError: if a file cannot be read.
    """
    if option in IMAGES:
        return _images(value)
    path = Path(value).expanduser()
    try:
        status = path.stat()
        return _file_hash(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"{option} = {value!r}: cannot be read ({error.strerror})") from None


def _images(source: str) -> str:
    """Returns a hash of an .npz file, or of the names, sizes and times of the files in a folder."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = [(file.relative_to(path), file.stat()) for file in sorted(path.rglob("*")) if file.is_file()]
        return content_hash(*(f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in files))
    if path.is_file():
        return sha256_of(path)[:16]
    if source.startswith("hf:"):
        return source
    raise DataError(f"data source {source!r}: there is no such file or folder; {ACCEPTED}")


@lru_cache(maxsize=64)
def _file_hash(path: Path, size: int, time: int) -> str:
    """Returns the start of a file's SHA-256. The runs of a sweep have the same weights, which are read once."""
    return sha256_of(path)[:16]


def changed(before: Mapping[str, str], now: Mapping[str, str], since: str) -> list[str]:
    """Returns in words which fingerprints of `now` are not those of `before`.

    Args:
        since: when `before` was written down, such as ``this run began``.
    """
    return [
        f"{name}: the {what} changed since {since}" if name in before else f"{name}: the {what} of then are not known"
        for name, fingerprint in now.items()
        if before.get(name) != fingerprint
        for what in ["images" if name.startswith(IMAGES) else "contents"]
    ]
