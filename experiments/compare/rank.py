"""How far two sets of scores rank the units of a backbone alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from tapfl.models.units import PrunableLayer
from tapfl.pruning.criteria.task import Scores


def rank_correlations(layers: Sequence[PrunableLayer], ours: Scores, theirs: Scores) -> dict[str, float]:
    """Returns Spearman's ρ of the units of a layer, as a mean over the FFNs and over the attentions.

    The keys are ``rank_ffn`` and ``rank_attention``; a layer whose units all score the same ranks nothing and is left
    out, and a kind without a layer that ranks has no key.
    """
    found: dict[str, list[float]] = {}
    for layer in layers:
        a, b = (scores[layer.name].double().numpy() for scores in (ours, theirs))
        if np.ptp(a) > 0 and np.ptp(b) > 0:
            found.setdefault(f"rank_{layer.kind}", []).append(float(spearmanr(a, b).statistic))
    return {name: float(np.mean(values)) for name, values in sorted(found.items())}
