"""Isomorphic pruning (Fang et al., "Isomorphic pruning for vision models", ECCV 2024): ranked among equals only.

Scores of substructures of different topology follow different distributions, so each type of substructure is ranked
over all layers alone, and each loses the same share. The types are attention dims and FFN units; as in the public code,
equality is one of topology and not of size, so the stages of a Swin are ranked together. The score is Taylor's,
E_b |∂L_b/∂g| (`tapfl.pruning.criteria.taylor`), not divided by what a unit costs.

Differs from the publication: gates on units instead of weight times gradient summed over coupled weights, and the
third type, the embedding's dims, is not pruned here by any criterion.
"""

from __future__ import annotations

from tapfl.models.units import PrunableLayer
from tapfl.pruning.criteria.ranking import across_layers
from tapfl.pruning.criteria.task import PruningTask, Ranked, Scores, Selection
from tapfl.pruning.criteria.taylor import taylor_scores


def within_types(task: PruningTask, scores: Scores) -> Selection:
    """Ranks all units of a type together; the types share the budget evenly."""
    return across_layers(task, scores, group_of=_type, per_cost=False)


def _type(layer: PrunableLayer) -> str:
    return layer.kind


isomorphic = Ranked(taylor_scores, within_types)
