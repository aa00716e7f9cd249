"""From metrics.jsonl to the loggers that a run asks for. They change nothing of a run, and cannot stop it.

Lines are brought when a checkpoint has made them final, so nothing that is told has ever to be taken back. What a
logger lacks is read from the file: lines that were there when it was opened, and those that it missed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flwr.common.logger import log

from strategies.loggers.event_files import EventFiles, require_event_files
from strategies.loggers.logger import Logger
from strategies.loggers.points import points_of
from strategies.loggers.tracking import Tracking, in_short, require_tracking
from strategies.records import read_metrics
from tapfl.config import LogOptions, RunConfig
from tapfl.store import RunFolder


def require_loggers(options: LogOptions) -> None:
    """Raises ConfigError if a logger that is asked for is not installed, or cannot be reached."""
    if options.tensorboard:
        require_event_files()
    if options.mlflow:
        require_tracking(options)


@contextmanager
def loggers(config: RunConfig, folder: RunFolder) -> Iterator[Callable[[], None]]:
    """Opens the loggers that the options ask for. Gives what to call when lines of metrics.jsonl have become final."""
    feeds: list[Feed] = []
    if config.log.tensorboard:
        feeds.append(Feed("log.tensorboard", partial(EventFiles, folder, config), folder.path))
    if config.log.mlflow:
        feeds.append(Feed("log.mlflow", partial(Tracking, folder, config), folder.path))

    def bring() -> None:
        for feed in feeds:
            feed.bring()

    finished = False
    bring()
    try:
        yield bring
        finished = True
    finally:
        for feed in feeds:
            feed.close(finished)


class Feed:
    """Brings one logger the lines that it lacks. One that fails is warned of once, and tried again, ever more rarely.

    Args:
        option: that asks for it, for the warning.
        open: makes it, or finds what an earlier part of the run made.
        folder: of the run.
    """

    def __init__(self, option: str, open: Callable[[], Logger], folder: Path) -> None:
        self._option, self._open, self._folder = option, open, folder
        self._logger: Logger | None = None
        self._brought = 0  # bytes of the file
        self._pause = self._left = 0  # calls of `bring` that are let pass after a failure, and how many still are

    def bring(self) -> None:
        """Brings all lines that there are."""
        if self._left:
            self._left -= 1
        else:
            self._try(self._bring)

    def close(self, finished: bool) -> None:
        """Brings what is missing, and ends the logger; lines of a run that broke off are not final, and not brought."""

        def end() -> None:
            if finished:
                self._bring()
            if self._logger is not None:
                self._logger.close(finished)

        self._try(end)

    def _bring(self) -> None:
        if self._logger is None:
            self._logger = self._open()
        metrics = read_metrics(self._folder, self._brought)
        points = [point for line in metrics.lines for point in points_of(line)]
        if lacking := [point for point in points if not self._logger.has(point.tag, point.step)]:
            self._logger.add(lacking)
        self._brought = metrics.end

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # of whatever kind: the run is worth more than its pictures
            if not self._pause:
                said = "%s: %s; the run goes on without, metrics.jsonl has all of it, and it is tried again"
                log(logging.WARNING, said, self._option, in_short(error))
            self._pause = self._left = 2 * self._pause or 1
