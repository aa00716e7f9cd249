"""A bounded cache of results, keyed by the content that they are computed from."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Memo:
    """An LRU cache of results with a total size of at most `limit`. Dropping an entry only costs time.

    Args:
        size: returns the size of a result, such as its bytes; by default, 1. The last result is always kept.
    """

    def __init__(self, limit: int, size: Callable[[Any], int] = lambda result: 1) -> None:
        self.limit, self._size, self._total = limit, size, 0
        self._held: OrderedDict[Hashable, Any] = OrderedDict()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._held.values())

    def once(self, key: Hashable, make: Callable[[], Any], keep: Callable[[Any], bool] = lambda result: True) -> Any:
        """Returns the cached result for `key`, or else ``make()``, which must depend only on `key`.

        A result is cached if `keep` accepts it; errors are not.
        """
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        result = make()
        if keep(result):
            self._held[key] = result
            self._total += self._size(result)
            while self._total > self.limit and len(self._held) > 1:
                self._total -= self._size(self._held.popitem(last=False)[1])
        return result


def recent(seconds: float, keep: Callable[[Any], bool]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Returns a decorator that caches results for some seconds, for functions that read files or network.

    At its start, a run opens a source many times in a process; with a million images this takes seconds each time.

    Args:
        keep: a result is cached if it accepts it.
    """

    def decorated(make: Callable[P, T]) -> Callable[P, T]:
        held: dict[Hashable, tuple[float, T]] = {}

        @wraps(make)
        def once(*args: P.args, **kwargs: P.kwargs) -> T:
            key, now = (args, *sorted(kwargs.items())), time.monotonic()
            for old in [entry for entry, (since, _) in held.items() if now - since >= seconds]:
                del held[old]
            if key not in held:
                result = make(*args, **kwargs)
                if not keep(result):
                    return result
                held[key] = time.monotonic(), result
            return held[key][1]

        return once

    return decorated
