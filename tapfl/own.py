"""What a user's own module offers: ``module:name`` in the place of a built-in name, so that one file is enough.

The module is imported where it is used, so it must be importable there: on ``PYTHONPATH``, or installed; for what
devices use too (`personalize.method`, `adapters.rule`), on every machine of the federation.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tapfl.config import OWN
from tapfl.errors import ConfigError, said


def is_own(value: str) -> bool:
    """Says whether the value of an option has the form ``module:name``."""
    return OWN.fullmatch(value) is not None


def own(option: str, value: str) -> Any:
    """Returns what ``module:name`` names. Raises ConfigError, naming the option, if it is not to be had."""
    module, _, name = value.partition(":")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise ConfigError(
            f"{option} = {value!r}: cannot be imported ({said(error)}); is its folder on PYTHONPATH?"
        ) from None
