"""What lies behind the options that name images, files or plugins, as fingerprints of their content.

Work that goes on compares them, so that it does not go on with other content under the same name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from tapfl.config import INPUT_OPTIONS, NOT_PATHS, PLUGIN_OPTIONS, RunConfig
from tapfl.data import hugging_face
from tapfl.data.folders import list_images
from tapfl.errors import ConfigError, DataError, TapflError, message_of
from tapfl.plugin import file_of_plugin, is_plugin
from tapfl.store import sha256_of

ACCEPTED = "accepted: what was there then, or a new run in a new folder"
SOURCES = "accepted: digits, letters, a .npz file, an image folder, or hf:NAME"
OPTIONS = (*INPUT_OPTIONS, *PLUGIN_OPTIONS)
IMAGES = ("data", "data.source", "data.public")  # the first is an option of a node


def contents(config: RunConfig, options: Iterable[str] = OPTIONS, require: bool = True) -> dict[str, str]:
    """Returns the `fingerprints` of what these options of a run name."""
    flat = config.flat()
    return fingerprints([(option, flat[option]) for option in options], require, config.data.ids)


def fingerprints(named: Iterable[tuple[str, object]], require: bool = True, ids: str = "") -> dict[str, str]:
    """Returns ``option = 'value'`` -> fingerprint for options and values; what is built in has none and is left out.

    Args:
        require: whether all must be there; if not, what cannot be read is left out.
        ids: under which name `data.source` holds ids of devices; empty: it has none.

    Raises:
        TapflError: if something that must be there cannot be read.
    """
    found: dict[str, str] = {}
    for option, value in named:
        try:
            if is_plugin(str(value)) if option in PLUGIN_OPTIONS else value not in NOT_PATHS:
                found[f"{option} = {value!r}"] = content_of(option, str(value), ids)
        except TapflError:
            if require:
                raise
    return found


def content_of(option: str, value: str, ids: str = "") -> str:
    """Returns the fingerprint of what an option's value names: of images that of their `ImageSet`.

    Raises:
        DataError: if images are missing.
        ConfigError: if a file cannot be read.
    """
    if option in IMAGES:
        return _of_images(value, bool(ids) and option == "data.source", flat=option == "data.public")
    try:
        plugin = option in PLUGIN_OPTIONS
        return file_fingerprint(file_of_plugin(option, value) if plugin else Path(value).expanduser())
    except (OSError, ValueError, RuntimeError) as error:  # a name with a zero byte; the home of nobody
        raise ConfigError(f"{option} = {value!r}: cannot be read ({message_of(error)})") from None


def _of_images(source: str, by_device: bool, flat: bool) -> str:
    if source.startswith("hf:"):
        return hugging_face.fingerprint_of(hugging_face.open_table(source.removeprefix("hf:")))
    path = path_of(source)
    if path.is_dir():
        return list_images(path, by_device, flat).fingerprint
    if path.is_file() and path.suffix.lower() == ".npz":
        return file_fingerprint(path)
    raise no_such_source(source)


def path_of(source: str) -> Path:
    """Returns the path that a source names. Raises DataError if the system has no such names."""
    try:
        path = Path(source).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long; the home of nobody
        raise DataError(f"data source {source!r:.80}: cannot be read ({message_of(error)}); {SOURCES}") from None
    return path


def no_such_source(source: str) -> DataError:
    why = "is a file of another kind" if path_of(source).exists() else "there is no such file or folder"
    return DataError(f"data source {source!r}: {why}; {SOURCES}")


def file_fingerprint(path: Path) -> str:
    """Returns the start of a file's SHA-256, 16 hex digits. Many runs of the same file read it once."""
    status = path.stat()
    return _file_hash(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_hash(path: Path, size: int, time: int) -> str:
    return sha256_of(path)[:16]


def changed(before: Mapping[str, str], now: Mapping[str, str], since: str = "this run began") -> list[str]:
    """Returns in words which fingerprints of `now` are not those of `before`, which was written down `since` when."""
    odd = [name for name, fingerprint in now.items() if before.get(name) != fingerprint]
    return [
        f"{name}: the {_what(name)} changed since {since}"
        if name in before
        else f"{name}: the {_what(name)} of then are not known"
        for name in odd
    ]


def _what(name: str) -> str:
    if name.startswith(IMAGES):
        return "images"
    return "lines of its module" if name.startswith(PLUGIN_OPTIONS) else "contents"
