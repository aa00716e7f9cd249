"""Who shows the stages of long work: bars with the time left on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from strategies.screens.bars import Bars
from strategies.screens.lines import Lines
from tapfl.progress import is_shown, shown_on


@contextmanager
def shown(bars: bool = True) -> Iterator[None]:
    """Shows the stages of the block, if they are not shown already.

    Args:
        bars: whether bars will do, where there is a terminal for them.
    """
    if is_shown():
        yield
    elif bars and sys.stderr.isatty():
        with shown_on(Bars()):
            yield
    else:
        with Lines() as lines, shown_on(lines):
            yield
