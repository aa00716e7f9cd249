"""How far a stage is, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Pace:
    """A stage as it goes; times are seconds of `clock`.

    Attributes:
        total: steps; 0: unknown.
        note: a few words about where it is.
        begun: when it began.
        steps: (when, done) of the first call of `advance` and of the last one that got further.
        end: when all will be done, if the caller knows.
    """

    name: str
    clock: Callable[[], float] = time.monotonic
    done: float = 0
    total: float = 0
    note: str = ""
    steps: list[tuple[float, float]] = field(default_factory=list)
    end: float | None = None
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.clock()

    def advance(self, done: float, total: float, note: str = "", left: float | None = None, /) -> None:
        if not self.steps or done > self.steps[-1][1]:
            self.steps = [*self.steps[:1], (self.clock(), done)]
        self.done, self.total, self.note = done, total, note
        self.end = None if left is None else self.clock() + left

    @property
    def age(self) -> float:
        return self.clock() - self.begun

    @property
    def left(self) -> float | None:
        """Seconds that it will still take, at the pace of all its steps so far if `end` is not known.

        None: there is nothing to go by, or to do.
        """
        if self.end is not None and self.done < self.total:
            return max(0.0, self.end - self.clock())
        if len(self.steps) < 2 or self.done >= self.total:
            return None
        (start, first), (last, done) = self.steps
        each = (last - start) / (done - first)
        return max(0.0, (self.total - done) * each - (self.clock() - last))

    @property
    def count(self) -> str:
        """``3/10``, or ``0.4/3`` where steps are done in part; empty if their number is unknown."""
        return f"{round(self.done, 1):.12g}/{self.total:.12g}" if self.total else ""

    def words(self) -> str:
        """Returns the stage in a line: name, steps, note, and the time that is left, or has gone by."""
        where = " ".join(part for part in (self.count, self.note) if part)
        parts = [f"{self.name}: {where}" if where else self.name]
        if not self.total:
            parts.append(f"({clock_time(self.age)} so far)")
        elif self.left is not None:
            parts.append(f"({clock_time(self.left)} left)")
        return " ".join(parts)


def clock_time(seconds: float) -> str:
    """Returns h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
