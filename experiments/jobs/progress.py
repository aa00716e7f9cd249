"""Progress of jobs: each job reports its stages, and `Overview` sums up all jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import fmean

from experiments.jobs.pool import Emit
from tapfl.progress import Advance, Screen

MAIN = "rounds"  # the stage from whose pace the time of a federation is estimated
BEFORE = 0.45  # share of a federation before its rounds, assumed until some of them are done
STAGES = 8  # of that part
GAP = 0.2  # seconds between two reports of one job


@dataclass(frozen=True)
class StageProgress:
    """Where a job is: its outermost stage, the share of it that is done, and both as text."""

    stage: str
    share: float
    text: str


@dataclass
class _Stage:
    name: str
    done: float = 0
    total: float = 0


def reporting(emit: Emit, clock: Callable[[], float] = time.monotonic) -> Screen:
    """Returns a screen that emits a `StageProgress` now and then.

    The share counts stages within stages: 3 of 10 rounds and half of the devices of the fourth are 0.35.
    """
    stages: list[_Stage] = []
    last = -GAP

    def report() -> None:
        nonlocal last
        last = clock()
        share = 0.0
        for each in reversed(stages):
            share = min(1.0, (each.done + share) / each.total) if each.total else share
        outer = stages[0]
        steps = f" {outer.done:.12g}/{outer.total:.12g}" if outer.total else ""
        emit(StageProgress(outer.name, share, outer.name + steps))

    @contextmanager
    def screen(name: str) -> Iterator[Advance]:
        opened = _Stage(name)

        def advance(done: float, total: float, note: str = "", left: float | None = None, /) -> None:
            begins = not opened.total
            opened.done, opened.total = done, total
            if (begins and opened is stages[0]) or clock() - last >= GAP:
                report()

        stages.append(opened)
        if len(stages) == 1:
            report()
        try:
            yield advance
        finally:
            stages.remove(opened)

    return screen


def on_both(*screens: Screen) -> Screen:
    """Returns a screen that shows each stage on all of `screens`."""

    @contextmanager
    def screen(name: str) -> Iterator[Advance]:
        with ExitStack() as stack:
            advances = [stack.enter_context(each(name)) for each in screens]

            def advance(done: float, total: float, note: str = "", left: float | None = None, /) -> None:
                for each in advances:
                    each(done, total, note, left)

            yield advance

    return screen


@dataclass
class _Flight:
    """One federation in flight; times are of the overview's clock."""

    begun: float
    before: set[str] = field(default_factory=set)  # stages so far that came before the rounds
    main: tuple[float, float] | None = None  # when the rounds began, and at which share (a run that goes on)
    left: float | None = None  # seconds, as of the last report; None: nothing to go by
    seen: float = 0.0  # when that was
    text: str = ""

    def advance(self, event: StageProgress, now: float, typical: float | None) -> None:
        """Args: typical: seconds of a whole federation, if any has ended."""
        self.text, self.seen = event.text, now
        if event.stage == MAIN:
            self.main = self.main or (now, event.share)
            begun, at = self.main
            if event.share > at:
                self.left = (1 - event.share) * (now - begun) / (event.share - at)
        elif self.main is not None:
            self.left = 0.0
        elif typical is not None:
            self.left = max(0.0, typical - (now - self.begun))
        else:
            self.before.add(event.stage)
            share = BEFORE * min(1.0, (len(self.before) - 1 + event.share) / STAGES)
            self.left = (now - self.begun) * (1 - share) / share if share else None

    @property
    def seconds(self) -> float | None:
        """Of the whole federation."""
        return None if self.left is None else self.seen - self.begun + self.left

    @property
    def share(self) -> float:
        return (self.seen - self.begun) / self.seconds if self.seconds else 0.0


class Overview:
    """Reports to `advance` the jobs that are done, those in flight, and the time left.

    A federation takes as long as its rounds' pace says; before them, as long as those that have ended; before any has,
    round zero is taken for a fixed share. What waits is divided among `jobs` workers.

    Args:
        total: all jobs.
        done: those that need not be carried out.
        jobs: at a time.
    """

    def __init__(
        self,
        advance: Advance,
        total: int,
        done: int = 0,
        jobs: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._advance, self._total, self._done, self._jobs, self._clock = advance, total, done, jobs, clock
        self._flights: dict[str, _Flight] = {}
        self._seconds: list[float] = []  # of those that have ended
        self._lock = threading.Lock()
        self._tell()

    def listen(self, name: str) -> Emit:
        """Returns what is to be called with each `StageProgress` of a job."""

        def listen(event: StageProgress) -> None:
            with self._lock:
                now = self._clock()
                typical = fmean(self._seconds) if self._seconds else None
                self._flights.setdefault(name, _Flight(now)).advance(event, now, typical)
                self._tell()

        return listen

    def end(self, name: str) -> None:
        """Counts a job as done, whatever came of it."""
        with self._lock:
            if flight := self._flights.pop(name, None):
                self._seconds.append(self._clock() - flight.begun)
            self._done += 1
            self._tell()

    def _tell(self) -> None:
        done = self._done + sum(flight.share for flight in self._flights.values())
        note = "; ".join(f"{name}: {flight.text}" for name, flight in self._flights.items())
        self._advance(done, self._total, note, self._left())

    def _left(self) -> float | None:
        now = self._clock()
        seconds = self._seconds or [each.seconds for each in self._flights.values() if each.seconds is not None]
        if not seconds:
            return None
        typical = fmean(seconds)
        flying = [
            max(0.0, (typical if each.left is None else each.left) - (now - each.seen))
            for each in self._flights.values()
        ]
        waiting = self._total - self._done - len(flying)
        evenly = (sum(flying) + waiting * typical) / min(self._jobs, max(1, len(flying) + waiting))
        return max(evenly, *flying, typical if waiting else 0.0)
