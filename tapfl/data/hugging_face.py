"""Data sets of Hugging Face's hub, or of its library's cache."""

from __future__ import annotations

from typing import Any

from tapfl.errors import DataError, message_of


def open_table(name: str) -> Any:
    """Returns the rows of ``NAME[:SPLIT]``, a `datasets.Dataset`; the split is `train` if none is given.

    Raises:
        DataError: if it cannot be loaded.
    """
    from datasets import load_dataset  # heavy, and only this source needs it

    name, _, split = name.partition(":")
    try:
        return load_dataset(name, split=split or "train")
    except Exception as error:
        raise DataError(f"data source 'hf:{name}': cannot be loaded ({message_of(error)})") from None


def fingerprint_of(table: Any) -> str:
    """Returns the fingerprint under which the library caches the table; the same for the same files."""
    fingerprint: str = table._fingerprint
    return fingerprint
