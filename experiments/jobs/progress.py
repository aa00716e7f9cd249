"""Progress of jobs: each job reports its stages, and `Overview` combines the reports of all jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import fmean

from experiments.jobs.pool import Emit
from tapfl.progress import Advance, Screen

MAIN = "rounds"  # the stage whose pace gives the time of a federation
BEFORE = 0.45  # share of a federation's time before its rounds, assumed until some rounds are done
STAGES = 8  # number of stages in that part
GAP = 0.2  # seconds between two reports of one job


@dataclass(frozen=True)
class StageProgress:
    """The state of a job: its outermost stage, the share of the stage that is done, and both as text."""

    stage: str
    share: float
    text: str


@dataclass
class _Stage:
    name: str
    done: float = 0
    total: float = 0


def reporting(emit: Emit, clock: Callable[[], float] = time.monotonic) -> Screen:
    """Returns a screen that emits a `StageProgress` from time to time.

    The share includes nested stages: 3 of 10 rounds, and half of the devices in the fourth round, give 0.35.
    """
    stages: list[_Stage] = []
    last = -GAP

    def report() -> None:
        nonlocal last
        last = clock()
        share = 0.0
        for part in reversed(stages):
            share = min(1.0, (part.done + share) / part.total) if part.total else share
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
            advances = [stack.enter_context(one(name)) for one in screens]

            def advance(done: float, total: float, note: str = "", left: float | None = None, /) -> None:
                for forward in advances:
                    forward(done, total, note, left)

            yield advance

    return screen


@dataclass
class _Flight:
    """A federation that is running; times are those of the overview's clock."""

    begun: float
    before: set[str] = field(default_factory=set)  # stages before the rounds, as far as they were seen
    main: tuple[float, float] | None = None  # time and share at which the rounds began; the share of a resumed run > 0
    left: float | None = None  # seconds left at the last report; None: unknown
    seen: float = 0.0  # time of the last report
    text: str = ""

    def advance(self, event: StageProgress, now: float, typical: float | None) -> None:
        """Handles a report. `typical` is the mean duration of the federations that have ended, if any."""
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
        """Estimated duration of the whole federation; None: unknown."""
        return None if self.left is None else self.seen - self.begun + self.left

    @property
    def share(self) -> float:
        return (self.seen - self.begun) / self.seconds if self.seconds else 0.0


class Overview:
    """Reports the jobs that are done, those that are running, and the time left to `advance`.

    The duration of a federation is estimated from the pace of its rounds; before its rounds, from the federations that
    have ended; and before any has ended, by assuming that round zero takes a fixed share. The waiting jobs are divided
    among `jobs` workers.

    Args:
        total: number of all jobs.
        done: number of jobs that were finished before.
        jobs: number of jobs at a time.
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
        self._seconds: list[float] = []  # durations of the jobs that have ended
        self._lock = threading.Lock()
        self._report()

    def listen(self, name: str) -> Emit:
        """Returns the function to call with each `StageProgress` of a job."""

        def listen(event: StageProgress) -> None:
            with self._lock:
                now = self._clock()
                typical = fmean(self._seconds) if self._seconds else None
                self._flights.setdefault(name, _Flight(now)).advance(event, now, typical)
                self._report()

        return listen

    def end(self, name: str) -> None:
        """Counts a job as done, whether it succeeded or failed."""
        with self._lock:
            if flight := self._flights.pop(name, None):
                self._seconds.append(self._clock() - flight.begun)
            self._done += 1
            self._report()

    def _report(self) -> None:
        done = self._done + sum(flight.share for flight in self._flights.values())
        note = "; ".join(f"{name}: {flight.text}" for name, flight in self._flights.items())
        self._advance(done, self._total, note, self._left())

    def _left(self) -> float | None:
        now = self._clock()
        seconds = self._seconds or [run.seconds for run in self._flights.values() if run.seconds is not None]
        if not seconds:
            return None
        typical = fmean(seconds)
        running = [
            max(0.0, (typical if run.left is None else run.left) - (now - run.seen)) for run in self._flights.values()
        ]
        waiting = self._total - self._done - len(running)
        evenly = (sum(running) + waiting * typical) / min(self._jobs, max(1, len(running) + waiting))
        return max(evenly, *running, typical if waiting else 0.0)
