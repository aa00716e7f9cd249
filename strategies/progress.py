"""Progress of long work: bars with the time left on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from flwr.common.logger import log
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int, str], None]
IN_A_LOG: ContextVar[bool] = ContextVar("in_a_log", default=False)  # of a thread whose run has no screen to itself
LINES = 5  # a stage says so often in a log how far it is


@contextmanager
def stage(name: str, total: int) -> Iterator[Advance]:
    """Shows a stage of `total` steps. Yields a function to call with (steps done, a few words)."""
    if sys.stderr.isatty() and not IN_A_LOG.get():
        with _bar() as progress:
            task = progress.add_task(name, total=total, note="")

            def move(done: int, note: str = "") -> None:
                progress.update(task, completed=done, note=note)

            yield move
        return
    said = 0

    def say(done: int, note: str = "") -> None:
        nonlocal said
        if done * LINES // max(total, 1) > said:
            said = done * LINES // max(total, 1)
            log(logging.INFO, "%s: %d/%d %s", name, done, total, note)

    yield say


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
