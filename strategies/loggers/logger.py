"""What a logger is: something that takes points, and says which it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from strategies.loggers.points import Point
from tapfl.config import FREE_OPTIONS, RunConfig
from tapfl.options import Scalar


class Logger(Protocol):
    """Where points go. Any exception means that it cannot be reached; the run goes on without it."""

    def has(self, tag: str, step: int) -> bool:
        """Says whether that point is there, also if an earlier part of the run brought it."""
        ...

    def add(self, points: Sequence[Point]) -> None:
        """Keeps points; when it returns they are kept whatever becomes of this process."""
        ...

    def close(self, finished: bool) -> None:
        """Ends it; `finished` says whether the run came to its end."""
        ...


def hyperparameters(config: RunConfig) -> dict[str, Scalar]:
    """Returns the options that can change a result, without those that name a file or a folder of this machine."""
    paths = config.paths()
    return {
        name: value for name, value in config.flat().items() if not name.startswith(FREE_OPTIONS) and name not in paths
    }
