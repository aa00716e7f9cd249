"""FedIT (arXiv 2305.05644): A and B averaged separately.

Σ p_i B_i Σ p_i A_i is not Σ p_i B_i A_i: the error is Σ p_i (B_i - B̄)(A_i - Ā), and with pruned widths the embed side
adds its own, because Ā averages devices that do not hold a row. Not exact, cheap, and the usual point of comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

from tapfl.adapters.layout import Update
from tapfl.adapters.rule import BOTH, PLAIN, Combination, Rule
from tapfl.training import Params


def aggregate(previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN) -> Params:
    """Returns every tensor combined by itself; one that nobody sent stays. `fresh` is not needed by this rule."""
    result: Params = {}
    for name, theta in previous.items():
        parts = [(u.params[name], u.layout[name], u.weight) for u in updates if name in u.layout]
        result[name] = combination(name, theta, parts) if parts else theta
    return result


RULE = Rule(aggregate, random="A", down=BOTH, up=lambda round: BOTH, trained=lambda round: BOTH)
