"""Errors that a user can act on. Each message names the option or file, its value, and what is accepted."""


class TapflError(Exception):
    """Base class of all errors that are reported in one line, without a traceback."""


class ConfigError(TapflError):
    """An option is unknown, of the wrong type, or outside what is accepted."""


class DataError(TapflError):
    """A data source is missing, unreadable, or unsuitable for the federation."""


class NoImagesError(DataError):
    """A data source exists but contains no images."""


class ModelError(TapflError):
    """A backbone is unknown or not supported, or weights do not fit it."""


class BudgetError(TapflError):
    """A budget cannot be met. The message names the nearest possible one."""


class PlanError(TapflError):
    """A pruning plan or a saved model does not fit, is incomplete, or was damaged."""


class WireError(TapflError):
    """A message failed its checks and was refused."""


class RunError(TapflError):
    """A federation could not be started or finished."""


def message_of(error: BaseException) -> str:
    """Returns the type and message of a library's error as one printable line, such as ``KeyError: 'x'``."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((line for line in lines if "loading state_dict" not in line), "")  # that line names no tensor
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in first)
    return f"{type(error).__name__}: {shown[:200]}"
