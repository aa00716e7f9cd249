"""Budgets: upper limits on the cost of a pruned model, in one or several quantities.

0.5                          half of the dense model's MACs, the same as macs<=0.5
params<=8e6                  at most eight million parameters
macs<=50%,latency<=5ms       both
block-macs<=0.5              half of what the prunable branches cost: the kept share of block work
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tapfl.errors import ConfigError

NOUNS = {"macs": "MACs", "params": "parameters", "latency": "latency", "block-macs": "block MACs"}
ACCEPTED = (
    f"a share of the MACs in (0, 1], or limits such as macs<=0.5,params<=8e6,latency<=5ms; quantities: "
    f"{', '.join(NOUNS)}"
)
LIMIT = re.compile(r"([a-z-]+)\s*<=\s*(\S+?)\s*(%|ms)?")


@dataclass(frozen=True)
class Limit:
    """An upper limit on one quantity.

    Attributes:
        quantity: a key of `NOUNS`.
        value: a share of the dense model's in (0, 1], or a number of MACs, of parameters or of milliseconds.
        share: whether `value` is a share.
    """

    quantity: str
    value: float
    share: bool

    def __str__(self) -> str:
        unit = "ms" if self.quantity == "latency" and not self.share else ""
        return f"{self.quantity}<={_shortest(self.value)}{unit}"

    @property
    def words(self) -> str:
        """The limit in words, such as ``0.5 of the MACs`` or ``5 ms of latency``."""
        if self.share:
            return f"{_shortest(self.value)} of the {NOUNS[self.quantity]}"
        return f"{_shortest(self.value)} {'ms of ' if self.quantity == 'latency' else ''}{NOUNS[self.quantity]}"

    @property
    def title(self) -> str:
        """The limit as a column header, such as ``50% MACs``, ``8M parameters`` or ``5 ms``."""
        if self.share:
            return f"{self.value * 100:.4g}% {NOUNS[self.quantity]}"
        if self.quantity == "latency":
            return f"{_shortest(self.value)} ms"
        return f"{_thousands(self.value)} {NOUNS[self.quantity]}"

    def allowed(self, dense: float) -> float:
        """Returns the limit in the quantity's own unit; `dense` is the cost of the dense model."""
        return self.value * dense if self.share else self.value

    def express(self, cost: float, dense: float) -> str:
        """Returns a cost in the unit of the limit (share, number or milliseconds), rounded up so that it can be met."""
        if not self.share and self.quantity != "latency":
            return str(math.ceil(cost))
        value = cost / dense if self.share else cost
        if value <= 0:
            return "0"
        digits = 3 - math.floor(math.log10(value))
        rounded = math.ceil(value * 10.0**digits * (1 - 1e-12)) / 10.0**digits
        return f"{rounded:.4g}" + ("" if self.share else " ms")


@dataclass(frozen=True)
class Budget:
    """Limits on different quantities, which must all hold. `parse` reads what `str` returns."""

    limits: tuple[Limit, ...]

    @classmethod
    def parse(cls, value: Budget | float | str) -> Budget:
        """Returns a budget from its text, from a share of the MACs, or from a budget (unchanged).

        Raises:
            ConfigError: if it is not valid. The error names the wrong part and the accepted forms.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ConfigError(f"budget = {value!r}: is not a valid budget; accepted: {ACCEPTED}")
        limits = tuple(_limit(part.strip(), value) for part in str(value).split(","))
        quantities = [limit.quantity for limit in limits]
        for quantity in quantities:
            if quantities.count(quantity) > 1:
                raise ConfigError(f"budget = {value!r}: {quantity} is limited twice; accepted: {ACCEPTED}")
        return cls(limits)

    def __str__(self) -> str:
        return ",".join(map(str, self.limits))

    @property
    def title(self) -> str:
        """The budget as the header of a table column."""
        return ", ".join(limit.title for limit in self.limits)

    @property
    def measured(self) -> bool:
        """Whether one of the limits is on latency, which has to be measured."""
        return any(limit.quantity == "latency" for limit in self.limits)


def _limit(part: str, budget: object) -> Limit:
    """Returns the limit in a part of a budget's text. Raises ConfigError, naming the budget, if it is not valid."""

    def refusal(why: str, accepted: str = f"; accepted: {ACCEPTED}") -> ConfigError:
        return ConfigError(f"budget = {budget!r}: {why}{accepted}")

    bare, match = re.fullmatch(r"(\S+?)\s*(%)?", part), LIMIT.fullmatch(part)
    if match:
        quantity, number, unit = match.groups()
    elif bare and _number(bare[1]) is not None:
        quantity, number, unit = "macs", bare[1], bare[2]
    else:
        raise refusal(f"{part!r} is not a limit")
    value = _number(number)
    if quantity not in NOUNS:
        raise refusal(f"{quantity!r} is not a quantity", f"; accepted: {', '.join(NOUNS)}")
    if value is None or not 0 < value < math.inf:
        raise refusal(f"{number!r} is not a number above 0")
    if unit == "ms" and quantity != "latency":
        raise refusal(f"{quantity} is not in ms")
    value = value / 100 if unit == "%" else value
    if unit == "ms" or value <= 1:
        return Limit(quantity, value, share=unit != "ms")
    if unit == "%" or not match:
        raise refusal("is a share and must lie in (0, 1]")
    if quantity == "latency":
        raise refusal(f"a share of the latency lies in (0, 1], else write {number}ms", "")
    if value != int(value):
        raise refusal(f"{number} is neither a share in (0, 1] nor a whole number of {NOUNS[quantity]}", "")
    return Limit(quantity, value, share=False)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _shortest(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _thousands(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:g}"
