"""Progress of long work: loops report it, and the caller decides whether and where it is shown.

Commands show bars or lines (`strategies.progress`); a notebook shows nothing. No result depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class Advance(Protocol):
    def __call__(self, done: float, total: float, note: str = "", left: float | None = None, /) -> None:
        """Reports that `done` of `total` steps are done, which may include a fraction of a step.

        The first call marks the start of the work.

        Args:
            total: 0 if unknown.
            note: text to show with it.
            left: remaining seconds, if the caller knows; otherwise they are estimated from the steps so far.
        """
        ...


Screen = Callable[[str], AbstractContextManager[Advance]]
"""Name of a stage -> a context that shows the stage while it is active. Stages can be nested."""

_SCREEN: ContextVar[Screen | None] = ContextVar("screen", default=None)


@contextmanager
def stage(name: str) -> Iterator[Advance]:
    """Shows the block as a stage of the work. Yields a function that reports progress."""
    screen = _SCREEN.get()
    if screen is None:
        yield _unseen
    else:
        with screen(name) as advance:
            yield advance


def track(items: Iterable[T], name: str, total: int = 0) -> Iterator[T]:
    """Yields the items of a loop, and shows the loop as a stage.

    Args:
        total: number of items, if `items` has no length.
    """
    total = len(items) if isinstance(items, Sized) else total
    with stage(name) as advance:
        advance(0, total)
        for done, item in enumerate(items, start=1):
            yield item
            advance(done, total)


@contextmanager
def shown_on(screen: Screen | None) -> Iterator[None]:
    """Shows the stages of this thread on `screen` within the context; with None, they are not shown."""
    token = _SCREEN.set(screen)
    try:
        yield
    finally:
        _SCREEN.reset(token)


def is_shown() -> bool:
    """Returns whether stages of this thread are shown."""
    return _SCREEN.get() is not None


def _unseen(done: float, total: float, note: str = "", left: float | None = None, /) -> None:
    pass
