"""Data sets from the Hugging Face hub, from its library's cache, or from a folder that the library wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tapfl.data.folders import FRESH, MANY
from tapfl.errors import DataError, message_of
from tapfl.memo import recent
from tapfl.options import expanded


@recent(FRESH, keep=lambda table: len(table) > MANY)
def open_table(name: str) -> Any:
    """Returns the rows of ``NAME[:SPLIT]`` as a `datasets.Dataset`; the default split is `train`.

    The name may be that of a folder, including one that `save_to_disk` wrote.

    Raises:
        DataError: if it cannot be loaded.
    """
    from datasets import load_dataset, load_from_disk  # slow to import, and only this source needs it

    name, _, split = with_absolute_folder(name).partition(":")
    if not name:
        raise DataError("data source 'hf:': names no table; accepted: hf:NAME or hf:NAME:SPLIT")
    split = split or "train"
    try:
        if not any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return load_dataset(name, split=split)
        tables = load_from_disk(name)  # written by save_to_disk; load_dataset refuses it
    except Exception as error:
        raise DataError(f"data source 'hf:{name}': cannot be loaded ({message_of(error)})") from None
    tables = tables if isinstance(tables, dict) else {"train": tables}  # saved without splits
    if split not in tables:
        raise DataError(f"data source 'hf:{name}': has no split {split!r}; accepted: {', '.join(tables)}")
    return tables[split]


def with_absolute_folder(name: str) -> str:
    """Returns ``NAME[:SPLIT]`` with an absolute path if NAME is that of a folder here."""
    name, colon, split = name.partition(":")
    folder = expanded("hf", name)
    return f"{folder.absolute() if name and folder.is_dir() else name}{colon}{split}"


def fingerprint_of(table: Any) -> str:
    """Returns the fingerprint under which the library caches the table; it is the same for the same files."""
    fingerprint: str = table._fingerprint
    return fingerprint
