"""FFA-LoRA (arXiv 2403.12313) on pruned widths: one factor is random and frozen, the other is trained and averaged.

The published rule freezes A. Here it is the factor on the embedding's side, A of qkv and fc1 and B of proj and fc2:
every device holds the whole of it, so that a row (column) of the mean product is the mean of the other factor's row
(column) times it. With A frozen everywhere, Ā of proj and fc2 would be cut differently on every device.

Shapes: A (r, d_in) and B (d_out, r) of the global adapters; a device has the prefix r_i of r, and of the width side the
rows or columns that its plan kept. Only the width side travels, in both directions; the frozen one is made again from
the run's seed. Exact: B̄ A is the overlap mean of the B_i A_i, also where ranks differ (`whole_rank`). The price is
that a direction which few devices can hold is diluted by those which cannot, as it is in the mean of the products.
"""

from __future__ import annotations

from collections.abc import Sequence

from tapfl.adapters import fedit
from tapfl.adapters.layout import Update, whole_rank
from tapfl.adapters.rule import PLAIN, WIDTH, Combination, Rule
from tapfl.training import Params


def aggregate(previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN) -> Params:
    """Returns the width side combined over the holders of each unit. `fresh` is not needed by this rule."""
    return fedit.aggregate(previous, [whole_rank(update, previous) for update in updates], fresh, combination)


RULE = Rule(aggregate, random="embed", down=WIDTH, up=lambda round: WIDTH, trained=lambda round: WIDTH)
