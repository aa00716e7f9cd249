"""The aggregation rules by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tapfl.adapters import fedit, flex
from tapfl.adapters.layout import Params, Update

Rule = Callable[[Params, Sequence[Update], Params], Params]

RULES: dict[str, Rule] = {"fedit": fedit.aggregate, "flex": flex.aggregate}
