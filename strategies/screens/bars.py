"""Stages as bars on a terminal, those within others below them, and all that is logged meanwhile above them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from flwr.common.logger import FLOWER_LOGGER
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from strategies.screens.pace import Pace, clock_time
from tapfl.progress import Advance

BRIEF = 0.5  # seconds; a stage within another that lasts no longer is not shown


class Bars:
    """A `Screen`. The bars of one outermost stage are drawn together, and stay as they were when it ended."""

    def __init__(self) -> None:
        self._drawn: Drawn | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[Advance]:
        with ExitStack() as stack:
            outermost = self._drawn is None
            if outermost:
                stack.enter_context(self._drawing())
            drawn = self._drawn
            assert drawn is not None
            pace = Pace(name)
            task = drawn.add_task(name, total=None, pace=pace, inner=not outermost)
            if not outermost:
                stack.callback(drawn.remove_task, task)

            def advance(done: float, total: float, note: str = "", left: float | None = None, /) -> None:
                pace.advance(done, total, note, left)
                drawn.update(task, completed=done, total=total or None)

            yield advance
            drawn.update(task, completed=1, total=1)  # full, also where nobody knew how many steps there would be

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        with drawn_on(Console(stderr=True)) as self._drawn:
            try:
                yield
            finally:
                self._drawn = None


@contextmanager
def drawn_on(console: Console) -> Iterator[Drawn]:
    """Draws at the foot of `console`; what Flower logs while it lasts goes above."""
    columns = (
        TextColumn("{task.description:<24}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24),
        Count(),
        Elapsed(),
        Left(),
        Note(table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
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


class Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        pace: Pace = task.fields["pace"]
        return Text(f"{pace.count:>9}")


class Elapsed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(clock_time(task.fields["pace"].age))


class Left(ProgressColumn):
    """The time that is left: of all steps so far, since rich forgets those of half a minute ago."""

    def render(self, task: Task) -> Text:
        left = task.fields["pace"].left
        return Text(f"{'' if left is None else f'{clock_time(left)} left':>12}")


class Note(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["pace"].note)
