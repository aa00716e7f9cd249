"""Brackets of successive halving, as BOHB takes them (Falkner, Klein, Hutter 2018; Li et al. 2017)."""

from __future__ import annotations

import math

Bracket = tuple[tuple[int, float], ...]  # (configurations, budget) rung by rung
Rungs = tuple[tuple[int, int], ...]  # the same with budgets of whole rounds
EXACT = 1e-9  # log and powers of η are taken as whole numbers within this


def bracket_tables(b_min: float, b_max: float, eta: float) -> list[Bracket]:
    """Returns the brackets of one iteration, s_max first.

    ``s_max = ⌊log_η(b_max / b_min)⌋``; bracket s starts with ``n₀ = ⌈(s_max + 1) / (s + 1) · η^s⌉`` configurations, and
    rung i keeps ``⌊n₀ η^−i⌋`` of them at the budget ``b_max η^(i − s)``.
    """
    s_max = math.floor(math.log(b_max / b_min, eta) + EXACT)
    return [_bracket(s, s_max, b_max, eta) for s in range(s_max, -1, -1)]


def _bracket(s: int, s_max: int, b_max: float, eta: float) -> Bracket:
    n0 = math.ceil((s_max + 1) / (s + 1) * eta**s - EXACT)
    return tuple((math.floor(n0 * eta**-i + EXACT), b_max * eta ** (i - s)) for i in range(s + 1))


def in_rounds(bracket: Bracket) -> Rungs:
    """Returns the bracket with budgets of whole rounds."""
    return tuple((count, max(1, round(budget))) for count, budget in bracket)


def cost(bracket: Bracket | Rungs, continued: bool = True) -> float:
    """Returns the rounds of a bracket: each rung goes on from the one before, or starts again."""
    before = 0.0
    total = 0.0
    for count, budget in bracket:
        total += count * (budget - before)
        before = budget if continued else 0.0
    return total
