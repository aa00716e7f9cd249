"""The log of a run that shares its process with others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from flwr.common.logger import FLOWER_LOGGER

from strategies.progress import IN_A_LOG

_FILE: ContextVar[Path | None] = ContextVar("file", default=None)


@contextmanager
def own_log(file: Path) -> Iterator[None]:
    """Within the block all that this thread logs, and only that, goes to `file`, and not to the screen."""
    for shown in FLOWER_LOGGER.handlers:
        if not isinstance(shown, logging.FileHandler):
            shown.addFilter(_of_no_run)
    handler = logging.FileHandler(file, encoding="utf-8")  # behind what an earlier part of the run said
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(lambda record: _FILE.get() == file)
    FLOWER_LOGGER.addHandler(handler)
    tokens = _FILE.set(file), IN_A_LOG.set(True)
    try:
        yield
    finally:
        _FILE.reset(tokens[0])
        IN_A_LOG.reset(tokens[1])
        FLOWER_LOGGER.removeHandler(handler)
        handler.close()


def _of_no_run(record: logging.LogRecord) -> bool:
    return _FILE.get() is None
