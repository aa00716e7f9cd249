"""Brackets of successive halving, and the next steps of a search by brackets.

Brackets are those of BOHB (Falkner, Klein, Hutter 2018; Li et al. 2017). The schedule is a pure function of the results
of all trials. A trial's number determines its bracket and slot, so that the study contains the whole state.

**Which results a configuration sees.** A configuration is drawn from a fixed set of results, as soon as all of them
exist. Therefore draws depend neither on the order in which rungs finish nor on how many run at once. It sees

- all rungs of the brackets that come `overlap` + 1 or more before its own;
- the first rungs of the other brackets before its own;
- in the first rung of its own bracket, the blocks of `block` configurations before its own block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

Rungs = tuple[tuple[int, int], ...]  # a bracket: (configurations, rounds) of each rung
EXACT = 1e-9  # tolerance within which logarithms and powers of η count as whole numbers


def bracket_tables(b_min: float, b_max: float, eta: float) -> list[Rungs]:
    """Returns the brackets of one iteration, s_max first.

    ``s_max = ⌊log_η(b_max / b_min)⌋``; bracket s starts with ``n₀ = ⌈(s_max + 1) / (s + 1) · η^s⌉`` configurations, and
    rung i keeps ``⌊n₀ η^−i⌋`` of them at the budget ``b_max η^(i − s)``, in whole rounds.
    """
    s_max = math.floor(math.log(b_max / b_min, eta) + EXACT)
    return [_bracket(s, s_max, b_max, eta) for s in range(s_max, -1, -1)]


def _bracket(s: int, s_max: int, b_max: float, eta: float) -> Rungs:
    n0 = math.ceil((s_max + 1) / (s + 1) * eta**s - EXACT)
    return tuple((math.floor(n0 * eta**-i + EXACT), max(1, round(b_max * eta ** (i - s)))) for i in range(s + 1))


def cost(bracket: Rungs) -> int:
    """Returns the number of rounds of a bracket, in which trials continue from rung to rung."""
    before = [0, *(rounds for _, rounds in bracket)]
    return sum(count * (rounds - start) for (count, rounds), start in zip(bracket, before, strict=False))


Score = tuple[float, float]  # (violation of the constraints, loss); less is better
FAILED: Score = (math.inf, math.inf)
Results = Sequence[Mapping[int, Score]]  # by trial number, then by rounds


@dataclass(frozen=True)
class Standing:
    """The state of a search.

    Attributes:
        runs: (trial, rounds) to run now, the most urgent first.
        draws: number of configurations that can be drawn now.
        losers: trials that are not continued, including those that failed.
        winners: trials that finished the last rung of their bracket.
    """

    runs: list[tuple[int, int]]
    draws: int
    losers: list[int]
    winners: list[int]


@dataclass(frozen=True)
class Schedule:
    """A sequence of brackets, and the parameters that determine which results their configurations see."""

    brackets: tuple[Rungs, ...]
    block: int = 0
    overlap: int = 0

    @property
    def trials(self) -> int:
        return self._starts[-1]

    def sees(self, number: int, other: int, rounds: float) -> bool:
        """Returns whether trial `number` sees the result of trial `other` after `rounds` rounds."""
        if not number < self.trials or not other < self.trials:
            return False
        (own, slot), (bracket, other_slot) = self._place(number), self._place(other)
        if bracket < own - self.overlap:
            return True
        if rounds != self.brackets[bracket][0][1] or bracket > own:
            return False
        return bracket < own or other_slot < self._block_start(own, slot)

    def standing(self, results: Results) -> Standing:
        """Returns the state of a search with these results of all trials that were drawn."""
        runs: list[tuple[int, int]] = []
        losers: list[int] = []
        winners: list[int] = []
        finished, first_rungs = [], []
        starts = self._starts
        for k, rungs in enumerate(self.brackets):
            members = list(range(starts[k], starts[k + 1]))
            for i, (_, rounds) in enumerate(rungs):
                waiting = [m for m in members if m >= len(results) or rounds not in results[m]]
                runs += [(m, rounds) for m in waiting if m < len(results)]
                if i == 0:
                    first_rungs.append(not waiting)
                if waiting:
                    break
                ranked = sorted(members, key=lambda m: (results[m][rounds], m))
                through = [m for m in ranked if results[m][rounds] != FAILED]
                members = sorted(through[: rungs[i + 1][0]]) if i + 1 < len(rungs) else []
                (winners if i + 1 == len(rungs) else losers).extend(m for m in ranked if m not in members)
            else:
                finished.append(True)
                continue
            finished.append(False)
        return Standing(runs, self._draws(results, finished, first_rungs), losers, winners)

    def _draws(self, results: Results, finished: Sequence[bool], first_rungs: Sequence[bool]) -> int:
        number = len(results)
        if number >= self.trials:
            return 0
        own, slot = self._place(number)
        count, rounds = self.brackets[own][0]
        start = self._block_start(own, slot)
        first = self._starts[own]
        seen = all(rounds in results[first + s] for s in range(start))
        if not (seen and all(first_rungs[:own]) and all(finished[: max(0, own - self.overlap)])):
            return 0
        return min(start + (self.block or count), count) - slot

    @cached_property
    def _starts(self) -> list[int]:
        """The number of the first trial of each bracket, followed by the number of all trials."""
        return list(accumulate((rungs[0][0] for rungs in self.brackets), initial=0))

    def _place(self, number: int) -> tuple[int, int]:
        """Returns the bracket of a trial and its slot in the bracket."""
        starts = self._starts
        bracket = next(k for k in range(len(self.brackets)) if number < starts[k + 1])
        return bracket, number - starts[bracket]

    def _block_start(self, bracket: int, slot: int) -> int:
        return slot - slot % (self.block or self.brackets[bracket][0][0])
