"""Plugins: an option that takes a built-in name can instead name a user's own function or class as ``module:name``.

The module must be importable where it is used: on ``PYTHONPATH``, or installed. Devices use `personalize.method` and
`adapters.rule` too, so plugins of these options must be importable on every machine of the federation.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tapfl.errors import ConfigError, message_of
from tapfl.options import PLUGIN


def is_plugin(value: str) -> bool:
    """Returns whether the value of an option has the form ``module:name``."""
    return PLUGIN.fullmatch(value) is not None


def file_of_plugin(option: str, value: str) -> Path:
    """Returns the file of the module in ``module:name``. Raises ConfigError, naming the option, if there is none."""
    module = value.partition(":")[0]
    try:
        spec = find_spec(module)
    except Exception as error:  # it imports the parent package, which can raise anything
        raise _cannot_be_imported(option, value, error) from None
    if spec is None or not spec.has_location or spec.origin is None:
        raise _cannot_be_imported(option, value, ModuleNotFoundError(f"No module named {module!r}"))
    return Path(spec.origin)


def load_plugin(option: str, value: str) -> Any:
    """Returns what ``module:name`` refers to. Raises ConfigError, naming the option, if it cannot be imported."""
    module, _, name = value.partition(":")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # a user's module can raise anything on import
        raise _cannot_be_imported(option, value, error) from None


def _cannot_be_imported(option: str, value: str, error: Exception) -> ConfigError:
    return ConfigError(f"{option} = {value!r}: cannot be imported ({message_of(error)}); is its folder on PYTHONPATH?")
