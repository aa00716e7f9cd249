"""A bounded cache of results, by the content they were computed from."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Memo:
    """The most recently used results, up to a total size of `limit`. Dropping entries only costs time.

    Args:
        size: size of a result, such as its bytes; by default each counts one. The last result is always kept.
    """

    def __init__(self, limit: int, size: Callable[[Any], int] = lambda result: 1) -> None:
        self.limit, self._size, self._total = limit, size, 0
        self._held: OrderedDict[Hashable, Any] = OrderedDict()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._held.values())

    def once(self, key: Hashable, make: Callable[[], Any], keep: Callable[[Any], bool] = lambda result: True) -> Any:
        """Returns the result of `make`, a function of `key` alone; errors and what `keep` refuses are not kept."""
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
    """Decorates a function that reads large inputs outside this process: what `keep` accepts is current for so long.

    A run opens a source many times in a process when it begins; of a million images that takes seconds each time.
    """

    def decorated(make: Callable[P, T]) -> Callable[P, T]:
        held: dict[Hashable, tuple[float, T]] = {}

        @wraps(make)
        def once(*args: P.args, **kwargs: P.kwargs) -> T:
            key, now = (args, *sorted(kwargs.items())), time.monotonic()
            for old in [each for each, (since, _) in held.items() if now - since >= seconds]:
                del held[old]
            if key not in held:
                result = make(*args, **kwargs)
                if not keep(result):
                    return result
                held[key] = time.monotonic(), result
            return held[key][1]

        return once

    return decorated
