"""UPDP: the drop set with the least divergence, found by a beam search that measures few sets on all images."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from backbones import Tiny
from test_criteria import task_of

from tapfl.errors import BudgetError
from tapfl.pruning.criteria import updp
from tapfl.pruning.criteria.criterion import Selection
from tapfl.pruning.pipeline import plan_of
from tapfl.pruning.surgery import shrink


@pytest.mark.parametrize(
    ("family", "budget"), [("vit", 0.85), ("vit", 0.6), ("vit", 0.35), ("vit", 0.15), ("deit", 0.85), ("deit", 0.6)]
)
def test_updp_finds_the_best_drop_set(family: str, budget: float, families: dict[str, Tiny]) -> None:
    """Two blocks have 16 drop sets; of those that just meet the budget, the one with the least divergence is found."""
    backbone = families[family]
    task = task_of(backbone, budget)
    names = [layer.name for layer in task.layers]
    dense = backbone.model(backbone.inputs).detach().double().log_softmax(-1)
    divergences = {}
    for drop in map(set, chain.from_iterable(combinations(names, n) for n in range(5))):
        kept = {name: torch.arange(0) for name in drop}
        whole = {layer.name: torch.arange(layer.units) for layer in task.layers}
        plan = plan_of(task, Selection(whole | kept), backbone.spec)
        if plan.cost.macs <= budget * task.dense.macs:
            logits = shrink(backbone.model, plan)(backbone.inputs).detach().double().log_softmax(-1)
            divergences[frozenset(drop)] = float((dense.exp() * (dense - logits)).sum(1).mean())
    minimal = {drop: kl for drop, kl in divergences.items() if not any(other < drop for other in divergences)}
    best = min(minimal, key=lambda drop: minimal[drop])
    found, alone = updp.search(task, updp.BEAM)
    assert found[0] == best
    together = updp.divergence(task, list(divergences))
    assert together == pytest.approx(list(divergences.values()), rel=1e-4, abs=1e-6)
    for name, kl in alone.items():
        assert kl == pytest.approx(updp.divergence(task, [frozenset({name})])[0], rel=1e-5)
    selection = updp.updp(task)
    assert {name for name, kept in selection.kept.items() if not len(kept)} == best
    assert all(len(selection.kept[layer.name]) in (0, layer.units) for layer in task.layers)


def test_updp_restores_branches_that_fit_and_names_possible_budgets(vit: Tiny) -> None:
    task = task_of(vit, 0.6)
    everything = frozenset(layer.name for layer in vit.layers)
    smaller = updp._minimal(task, everything)
    assert smaller < everything and updp._fits(task, smaller)
    assert not any(updp._fits(task, smaller - {name}) for name in smaller)
    assert updp.search(task_of(vit, 1.0), 4) == ([frozenset()], {})
    with pytest.raises(BudgetError, match="without any branch"):
        updp.updp(task_of(vit, 0.001))


def test_updp_compares_finalists_on_the_whole_metric_set(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(vit, 0.35)
    monkeypatch.setattr(updp, "IMAGES", 2)
    part = updp._thinned(task, 2)
    assert torch.equal(part.inputs, vit.inputs[[0, 2]])
    finalists = updp.search(part, updp.BEAM)[0][: updp.BEAM]
    best = min(finalists, key=lambda drop: updp.divergence(task, [drop])[0])
    assert {name for name, kept in updp.updp(task).kept.items() if not len(kept)} == best


def test_updp_measures_only_the_best_of_a_level_on_all_images(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(vit, 0.35)
    monkeypatch.setattr(updp, "SCREEN_IMAGES", 2)
    monkeypatch.setattr(updp, "SCREENED", 2)
    few = updp._thinned(task, 2)
    pairs = [frozenset(pair) for pair in combinations([layer.name for layer in vit.layers], 2)]
    rough = dict(zip(pairs, updp.divergence(few, pairs), strict=True))
    assert updp._screened(task, pairs) == sorted(pairs, key=rough.__getitem__)[:2]
    assert updp._screened(few, pairs) == pairs and updp._screened(task, pairs[:2]) == pairs[:2]
    singles = [frozenset({layer.name}) for layer in vit.layers]
    assert updp._screened(task, singles) == singles, "their divergence is the importance of a layer"
