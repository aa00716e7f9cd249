"""Stages as plain lines of the log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context

from flwr.common.logger import log

from strategies.screens.pace import Pace
from tapfl.progress import Advance

SHARES = 5  # a stage that lies in no other says so often how far it is
GAP = 1.0  # seconds between two such lines, but for the last one: what is done at once says so once
SILENCE = (10.0, 60.0)  # seconds without a line after which there is one in any case: at first, and in long work
PATIENCE = 0.05  # of the time that the work has taken: what grows from the one to the other


class Lines:
    """A `Screen`, and a context manager: while it is open, a line comes now and then whatever the work is at."""

    def __init__(self) -> None:
        self._open: list[Pace] = []
        self._begun = self._said = time.monotonic()
        self._over = threading.Event()
        # a run that shares its process with others knows its log by the context
        self._thread = threading.Thread(target=copy_context().run, args=(self._break_silence,), daemon=True)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def __call__(self, name: str) -> Iterator[Advance]:
        pace, outermost, shares = Pace(name), not self._open, 0

        def advance(done: float, total: float, note: str = "", left: float | None = None, /) -> None:
            nonlocal shares
            pace.advance(done, total, note, left)
            passed = int(SHARES * done // total) if total else 0
            if outermost and passed > shares and (done == total or time.monotonic() - self._said >= GAP):
                shares = passed
                self._say(pace.words())

        self._open.append(pace)
        try:
            yield advance
        finally:
            self._open.remove(pace)

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        log(logging.INFO, "%s", text)

    def _break_silence(self) -> None:
        while not self._over.wait(1.0):
            now = time.monotonic()
            least, most = SILENCE
            if (stages := list(self._open)) and now - self._said >= min(
                max(PATIENCE * (now - self._begun), least), most
            ):
                self._say("; ".join(pace.words() for pace in stages))
