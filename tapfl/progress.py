"""How far long work is: the method's loops say it, and whoever began the work decides who shows it, if anybody does.

A notebook sees nothing of it; commands show bars or lines (`strategies.progress`). Nothing that is computed depends on
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class Advance(Protocol):
    def __call__(self, done: float, total: float, note: str = "", left: float | None = None, /) -> None:
        """Says that `done` of `total` steps are done (0: nobody knows how many there are), and a few words.

        Steps may be done in part.

        The first call says where the work begins; the time left is that of the steps after it at their pace,
        or `left` seconds if the caller knows better.
        """
        ...


Screen = Callable[[str], AbstractContextManager[Advance]]
"""name of a stage -> where it is shown for as long as it lasts; stages lie within each other"""

_SCREEN: ContextVar[Screen | None] = ContextVar("screen", default=None)


@contextmanager
def stage(name: str) -> Iterator[Advance]:
    """Shows the block as a stage of the work. Gives a function to call with the steps that are done."""
    screen = _SCREEN.get()
    if screen is None:
        yield _unseen
    else:
        with screen(name) as advance:
            yield advance


def track(items: Iterable[T], name: str, total: int = 0) -> Iterator[T]:
    """Yields the items of a loop, which is shown as a stage.

    Args:
        total: how many there are, where `items` do not say it themselves.
    """
    total = len(items) if isinstance(items, Sized) else total
    with stage(name) as advance:
        advance(0, total)
        for done, item in enumerate(items, start=1):
            yield item
            advance(done, total)


@contextmanager
def shown_on(screen: Screen | None) -> Iterator[None]:
    """Within the block, and in this thread, stages are shown on `screen`; None: nowhere."""
    token = _SCREEN.set(screen)
    try:
        yield
    finally:
        _SCREEN.reset(token)


def is_shown() -> bool:
    """Says whether stages of this thread are shown."""
    return _SCREEN.get() is not None


def _unseen(done: float, total: float, note: str = "", left: float | None = None, /) -> None:
    pass
