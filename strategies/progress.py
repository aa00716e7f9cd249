"""Who shows the stages of long work: bars with the time left on a terminal, plain lines in a log.

The time left is computed here: rich's own estimate forgets steps of more than half a minute ago, and a caller cannot
replace it by a better one.
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

BRIEF = 0.5  # seconds; a stage within another that lasts no longer is not shown as a bar
SHARES = 5  # lines of a stage that lies in no other
GAP = 1.0  # seconds between two such lines, but for the last one: what is done at once has one line
SILENCE = (10.0, 60.0)  # seconds without a line after which there is one in any case: at first, and in long work
PATIENCE = 0.05  # of the time that the work has taken: what grows from the one to the other


@contextmanager
def shown(bars: bool = True) -> Iterator[None]:
    """Shows the stages of the block, if they are not shown already.

    Args:
        bars: whether bars will do, where there is a terminal for them.
    """
    with ExitStack() as stack:
        if not is_shown():
            screen = Bars() if bars and sys.stderr.isatty() else stack.enter_context(Lines())
            stack.enter_context(shown_on(screen))
        yield


class Pace:
    """A stage as it goes; times are seconds of `clock`. Without a known number of steps `total` is 0."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self._clock, self._begun = name, clock, clock()
        self.done = self.total = 0.0
        self.note = ""
        self._steps: list[tuple[float, float]] = []  # (when, done) of the first call and of the last that got further
        self._end: float | None = None  # when all will be done, if the caller knows

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
        """Seconds that it will still take, at the pace of all steps so far if the caller gave none; None: unknown."""
        if self._end is not None and self.done < self.total:
            return max(0.0, self._end - self._clock())
        if len(self._steps) < 2 or self.done >= self.total:
            return None
        (start, first), (last, done) = self._steps
        each = (last - start) / (done - first)
        return max(0.0, (self.total - done) * each - (self._clock() - last))

    @property
    def count(self) -> str:
        """``3/10``, or ``0.4/3`` where steps are done in part; empty if their number is unknown."""
        return f"{round(self.done, 1):.12g}/{self.total:.12g}" if self.total else ""

    @property
    def time_left(self) -> str:
        return "" if self.left is None else f"{clock_time(self.left)} left"

    def words(self) -> str:
        """Returns the stage in a line: name, steps, note, and the time that is left, or has gone by."""
        where = " ".join(filter(None, (self.count, self.note)))
        time = f"{self.elapsed} so far" if not self.total else self.time_left
        return (f"{self.name}: {where}" if where else self.name) + (f" ({time})" if time else "")


def clock_time(seconds: float) -> str:
    """Returns h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Bars:
    """A `Screen`. The bars of one outermost stage are drawn together, and stay as they were when it ended."""

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
            drawn.update(task, completed=1, total=1)  # full, also where nobody knew how many steps there would be


@contextmanager
def drawn_on(console: Console) -> Iterator[Drawn]:
    """Draws at the foot of `console`; what Flower logs while it lasts goes above."""
    from flwr.common.logger import FLOWER_LOGGER  # now: all of Flower takes a while, and a refused option shows no bar

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
        for handler in shown:  # they hold the stream as it was
            handler.setStream(sys.stderr)
        try:
            yield drawn
        finally:
            for handler in shown:
                handler.setStream(getattr(sys.stderr, "rich_proxied_file", sys.stderr))


class Drawn(Progress):
    """Bars without those of stages that are over at once."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table([t for t in self.tasks if not t.fields["inner"] or t.fields["pace"].age >= BRIEF])


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
        from flwr.common.logger import log  # as in `drawn_on`

        log(logging.INFO, "%s", text)

    def _break_silence(self) -> None:
        while not self._over.wait(1.0):
            now = time.monotonic()
            least, most = SILENCE
            patience = min(max(PATIENCE * (now - self._begun), least), most)
            if (stages := list(self._open)) and now - self._said >= patience:
                self._say("; ".join(pace.words() for pace in stages))
