"""Fingerprints of the content of images, files and plugins that options name.

Work that is resumed compares them, so that it does not continue with changed content under the same name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from tapfl.config import INPUT_OPTIONS, PLUGIN_OPTIONS, RunConfig, is_built_in
from tapfl.data import hugging_face
from tapfl.data.folders import list_images
from tapfl.errors import ConfigError, DataError, TapflError, message_of
from tapfl.plugin import file_of_plugin, is_plugin
from tapfl.store import sha256_of

ACCEPTED = "accepted: the original content, or a new run in a new folder"
SOURCES = "accepted: digits, letters, a .npz file, an image folder, or hf:NAME"
OPTIONS = (*INPUT_OPTIONS, *PLUGIN_OPTIONS)
IMAGES = ("data", "data.source", "data.public")  # the first is an option of a node


def contents(config: RunConfig, options: Iterable[str] = OPTIONS, require: bool = True) -> dict[str, str]:
    """Returns the `fingerprints` of what the given options of a run name."""
    flat = config.flat()
    return fingerprints([(option, flat[option]) for option in options], require, config.data.ids)


def fingerprints(named: Iterable[tuple[str, object]], require: bool = True, ids: str = "") -> dict[str, str]:
    """Returns ``option = 'value'`` -> fingerprint for pairs of option and value. Built-in values are left out.

    Args:
        require: whether all must be readable; if not, those that cannot be read are left out.
        ids: name under which `data.source` has ids of devices; empty: it has none.

    Raises:
        TapflError: with `require`, if one cannot be read.
    """
    result: dict[str, str] = {}
    for option, value in named:
        try:
            if is_plugin(str(value)) if option in PLUGIN_OPTIONS else not is_built_in(option, value):
                result[f"{option} = {value!r}"] = content_of(option, str(value), ids)
        except TapflError:
            if require:
                raise
    return result


def content_of(option: str, value: str, ids: str = "", nested: bool = False) -> str:
    """Returns the fingerprint of what an option's value names; for images, that of their `ImageSet`.

    Args:
        ids: as for `fingerprints`.
        nested: as for `list_images`.

    Raises:
        DataError: if images are missing.
        ConfigError: if a file cannot be read.
    """
    if option in IMAGES:
        return _of_images(value, bool(ids) and option == "data.source", option == "data.public", nested)
    try:
        plugin = option in PLUGIN_OPTIONS
        return file_fingerprint(file_of_plugin(option, value) if plugin else Path(value).expanduser())
    except (OSError, ValueError, RuntimeError) as error:  # such as a name with a zero byte, or an unknown user's home
        raise ConfigError(f"{option} = {value!r}: cannot be read ({message_of(error)})") from None


def _of_images(source: str, by_device: bool, flat: bool, nested: bool) -> str:
    if source.startswith("hf:"):
        return hugging_face.fingerprint_of(hugging_face.open_table(source.removeprefix("hf:")))
    path = path_of(source)
    if path.is_dir():
        return list_images(path, by_device, flat, nested).fingerprint
    if path.is_file() and path.suffix.lower() == ".npz":
        return file_fingerprint(path)
    raise no_such_source(source)


def path_of(source: str) -> Path:
    """Returns the path that a source names. Raises DataError if the system does not accept it."""
    try:
        path = Path(source).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:  # such as a name that is too long, or an unknown user's home
        raise DataError(f"data source {source!r:.80}: cannot be read ({message_of(error)}); {SOURCES}") from None
    return path


def no_such_source(source: str) -> DataError:
    why = "is a file of another kind" if path_of(source).exists() else "there is no such file or folder"
    return DataError(f"data source {source!r}: {why}; {SOURCES}")


def file_fingerprint(path: Path) -> str:
    """Returns the first 16 hex digits of a file's SHA-256. An unchanged file is read once per process."""
    status = path.stat()
    return _file_hash(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_hash(path: Path, size: int, time: int) -> str:
    return sha256_of(path)[:16]


def changed(before: Mapping[str, str], now: Mapping[str, str], since: str = "this run began") -> list[str]:
    """Returns a sentence for each fingerprint of `now` that is not in `before`.

    Args:
        since: the event at which `before` was stored, for the sentences.
    """
    different = [name for name, fingerprint in now.items() if before.get(name) != fingerprint]
    return [
        f"{name}: the {_what(name)} changed since {since}"
        if name in before
        else f"{name}: the {_what(name)} at that time are not known"
        for name in different
    ]


def _what(name: str) -> str:
    if name.startswith(IMAGES):
        return "images"
    return "lines of its module" if name.startswith(PLUGIN_OPTIONS) else "contents"
