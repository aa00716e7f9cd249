"""Shows the stages of long work: progress bars with the time left on a terminal, plain lines in a log.

The time left is computed here, because rich's own estimate forgets steps older than half a minute, and a caller cannot
replace it with a better one.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from tapfl.progress import Advance, is_shown, shown_on

BRIEF = 0.5  # seconds; a nested stage that is shorter gets no bar
SHARES = 5  # log lines of an outermost stage: one after each fifth of its steps
GAP = 1.0  # least seconds between two such lines, except for the last, so that a quick stage has one line
SILENCE = (10.0, 60.0)  # least and most seconds without a line, after which one is logged in any case
PATIENCE = 0.05  # these seconds, between the two limits, as a fraction of the time since the start


@contextmanager
def shown(bars: bool = True) -> Iterator[None]:
    """Shows the stages of the block, unless they are shown already.

    Args:
        bars: draw bars if standard error is a terminal.
    """
    with ExitStack() as stack:
        if not is_shown():
            screen = Bars() if bars and sys.stderr.isatty() else stack.enter_context(Lines())
            stack.enter_context(shown_on(screen))
        yield


class Pace:
    """The progress of a stage; times are seconds of `clock`. If the number of steps is unknown, `total` is 0."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self._clock, self._begun = name, clock, clock()
        self.done = self.total = 0.0
        self.note = ""
        self._steps: list[tuple[float, float]] = []  # (time, done) of the first call, and of the last with progress
        self._end: float | None = None  # expected end, if the caller knows it

    def advance(self, done: float, total: float, note: str = "", left: float | None = None, /) -> None:
        if not self._steps or done > self._steps[-1][1]:
            self._steps = [*self._steps[:1], (self._clock(), done)]
        self.done, self.total, self.note = done, total, note
        self._end = None if left is None else self._clock() + left

    @property
    def age(self) -> float:
        return self._clock() - self._begun

    @property
    def elapsed(self) -> str:
        return clock_time(self.age)

    @property
    def left(self) -> float | None:
        """Seconds left, from the mean pace of all steps so far unless the caller gave them; None: unknown."""
        if self._end is not None and self.done < self.total:
            return max(0.0, self._end - self._clock())
        if len(self._steps) < 2 or self.done >= self.total:
            return None
        (start, first), (last, done) = self._steps
        per_step = (last - start) / (done - first)
        return max(0.0, (self.total - done) * per_step - (self._clock() - last))

    @property
    def count(self) -> str:
        """``3/10``, or ``0.4/3`` if a step is partly done; empty if the number of steps is unknown."""
        return f"{round(self.done, 1):.12g}/{self.total:.12g}" if self.total else ""

    @property
    def time_left(self) -> str:
        return "" if self.left is None else f"{clock_time(self.left)} left"

    def words(self) -> str:
        """Returns the stage as a line: name, steps, note, and the time left, or elapsed if that is unknown."""
        where = " ".join(filter(None, (self.count, self.note)))
        time = f"{self.elapsed} so far" if not self.total else self.time_left
        return (f"{self.name}: {where}" if where else self.name) + (f" ({time})" if time else "")


def clock_time(seconds: float) -> str:
    """Returns h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Bars:
    """A `Screen` of progress bars; the bar of an outermost stage stays when it ends, those of nested stages do not."""

    def __init__(self) -> None:
        self._drawn: Drawn | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[Advance]:
        with ExitStack() as stack:
            if outermost := self._drawn is None:
                self._drawn = stack.enter_context(drawn_on(Console(stderr=True)))
                stack.callback(setattr, self, "_drawn", None)
            drawn, pace = self._drawn, Pace(name)
            task = drawn.add_task(name, total=None, pace=pace, inner=not outermost)
            if not outermost:
                stack.callback(drawn.remove_task, task)

            def advance(done: float, total: float, note: str = "", left: float | None = None, /) -> None:
                pace.advance(done, total, note, left)
                drawn.update(task, completed=done, total=total or None)

            yield advance
            drawn.update(task, completed=1, total=1)  # full, even if the number of steps was unknown


@contextmanager
def drawn_on(console: Console) -> Iterator[Drawn]:
    """Draws bars at the bottom of `console`; what Flower logs meanwhile appears above them."""
    from flwr.common.logger import FLOWER_LOGGER  # here, because Flower is slow to import

    note = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    columns = (
        TextColumn("{task.description:<24}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[pace].count:>9}", markup=False),
        TextColumn("{task.fields[pace].elapsed}", markup=False),
        TextColumn("{task.fields[pace].time_left:>12}", markup=False),
        TextColumn("{task.fields[pace].note}", style="none", markup=False, table_column=note),
    )
    drawn = Drawn(*columns, console=console, redirect_stdout=sys.stdout.isatty(), expand=True, refresh_per_second=4)
    shown = [h for h in FLOWER_LOGGER.handlers if isinstance(h, logging.StreamHandler) and h.stream is sys.stderr]
    with drawn:
        for handler in shown:  # they still write to the stream that rich has replaced
            handler.setStream(sys.stderr)
        try:
            yield drawn
        finally:
            for handler in shown:
                handler.setStream(getattr(sys.stderr, "rich_proxied_file", sys.stderr))


class Drawn(Progress):
    """Progress bars without those of very short nested stages."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table([t for t in self.tasks if not t.fields["inner"] or t.fields["pace"].age >= BRIEF])


class Lines:
    """A `Screen` of log lines, and a context manager; while it is open, a line is logged from time to time."""

    def __init__(self) -> None:
        self._open: list[Pace] = []
        self._begun = self._said = time.monotonic()
        self._over = threading.Event()
        # runs that share a process find their log by the context
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
        from flwr.common.logger import log  # as in `drawn_on`

        log(logging.INFO, "%s", text)

    def _break_silence(self) -> None:
        while not self._over.wait(1.0):
            now = time.monotonic()
            least, most = SILENCE
            patience = min(max(PATIENCE * (now - self._begun), least), most)
            if (stages := list(self._open)) and now - self._said >= patience:
                self._say("; ".join(pace.words() for pace in stages))
