"""RoLoRA (arXiv 2409.02346): the two factors take turns; the one whose turn it is not is the same for all.

Under width pruning the turns are those of the sides. The factor on the embedding's side starts random and the one on
the device's width starts at 0, so the width side comes first: its gradient goes through the random factor, while the
other one's goes through zeros and round 1 would be lost. Both factors come down, the one that was trained goes up.

Shapes: as in `tapfl.adapters.ffa`. Exact in odd rounds, as that rule always is; in even rounds Ā (of qkv and fc1; B̄
of proj and fc2) averages devices that do not hold a row, or not a direction.
"""

from __future__ import annotations

from tapfl.adapters import ffa
from tapfl.adapters.layout import Side
from tapfl.adapters.rule import BOTH, EMBED, WIDTH, Rule


def turn(round: int) -> frozenset[Side]:
    """Returns the side that moves in a round; 1 is the first."""
    return WIDTH if round % 2 else EMBED


RULE = Rule(ffa.aggregate, random="embed", down=BOTH, up=turn, trained=turn)
