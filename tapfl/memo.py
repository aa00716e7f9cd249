"""Results kept by their content: what was asked for before is not computed again, and a bound on how many are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Memo:
    """The `limit` results that were used last. Dropping them at any time changes nothing but the time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: OrderedDict[Hashable, Any] = OrderedDict()

    def once(self, key: Hashable, make: Callable[[], Any], keep: Callable[[Any], bool] = lambda result: True) -> Any:
        """Returns the result of `make`, a function of `key` alone; what it raises, or `keep` denies, is not kept."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        result = make()
        if keep(result):
            self._held[key] = result
            if len(self._held) > self.limit:
                self._held.popitem(last=False)
        return result
