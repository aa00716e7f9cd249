"""Plugins: an option can name a user's own function or class as ``module:name`` where it takes a built-in name.

The module is imported where it is used, so it must be importable there: on ``PYTHONPATH``, or installed. Devices use
`personalize.method` and `adapters.rule` too, so those must be importable on every machine of the federation.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tapfl.errors import ConfigError, message_of
from tapfl.options import PLUGIN


def is_plugin(value: str) -> bool:
    """Returns whether the value of an option has the form ``module:name``."""
    return PLUGIN.fullmatch(value) is not None


def load_plugin(option: str, value: str) -> Any:
    """Returns what ``module:name`` refers to. Raises ConfigError, naming the option, if it cannot be imported."""
    module, _, name = value.partition(":")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # a user's module can raise anything when it is imported
        raise ConfigError(
            f"{option} = {value!r}: cannot be imported ({message_of(error)}); is its folder on PYTHONPATH?"
        ) from None
