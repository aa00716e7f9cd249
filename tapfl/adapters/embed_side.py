"""FedSA-LoRA (arXiv 2410.01463) on pruned widths: one factor is shared, the other one stays where it was trained.

The published rule shares A, which learns what is common, and keeps B. Here the factor on the embedding's side is shared
(A of qkv and fc1, B of proj and fc2), because its shape is the same for every device but for the rank: no index of a
kept unit, which tells of the task, is needed to combine it.

Shapes: of the shared factor (r_i, d_in) or (d_out, r_i), the prefix of the global r; of the private one as wide as the
device. Both are trained. A is random at the start and B is 0, in both roles.
"""

from __future__ import annotations

from tapfl.adapters import fedit
from tapfl.adapters.rule import BOTH, EMBED, Rule

RULE = Rule(fedit.aggregate, random="A", down=EMBED, up=lambda round: EMBED, trained=lambda round: BOTH)
