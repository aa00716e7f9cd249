"""Results kept by their content: what was asked for before is not computed again, and a bound on how many are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Memo:
    """The results that were used last, `limit` in all. Dropping them at any time changes nothing but the time.

    Args:
        size: what a result counts for, such as its bytes; by default each is one. The last result is always kept.
    """

    def __init__(self, limit: int, size: Callable[[Any], int] = lambda result: 1) -> None:
        self.limit, self._size, self._total = limit, size, 0
        self._held: OrderedDict[Hashable, Any] = OrderedDict()

    def once(self, key: Hashable, make: Callable[[], Any], keep: Callable[[Any], bool] = lambda result: True) -> Any:
        """Returns the result of `make`, a function of `key` alone; what it raises, or `keep` denies, is not kept."""
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
