"""Unit shapes (dims, whole heads, or both): which units a shape keeps, and exact surgery."""

from __future__ import annotations

import copy
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
import torch
from backbones import Tiny, masked, plan_of
from hypothesis import given
from hypothesis import strategies as st
from representatives import some_slow
from test_fit import made_up_timings
from torch import Tensor

from tapfl.config import PruningOptions
from tapfl.errors import BudgetError
from tapfl.models.cost import measure_cost
from tapfl.models.units import Ffn, PrunableLayer, SelfAttention, Shape
from tapfl.pruning import pipeline
from tapfl.pruning.budget import Budget
from tapfl.pruning.cost_table import cost_table
from tapfl.pruning.criteria import registry, upop
from tapfl.pruning.criteria.criterion import PruningTask, Selection, across_layers, by_layer
from tapfl.pruning.surgery import shrink
from tapfl.pruning.unit_shape import Candidates, aligned, candidates, keep_best, slices

FAMILIES = ["vit", "deit", "swin"]
SHAPES = ["head-dims", "heads", "both"]
WHOLE = {"updp"}  # drops branches, so that the cost may be far below the budget


def attention(heads: int, dims: int, columns: int = 0) -> SelfAttention:
    place = {"name": "attn", "block": "", "embed_dim": 8, "tokens": 4, "span": 4}
    return SelfAttention(**place, heads=heads, units=heads * dims, params_per_head=columns)  # type: ignore[arg-type]


def shapes_of(layer: PrunableLayer, unit_shape: str, align: int, scores: Tensor, quantity: str = "macs") -> Candidates:
    table = np.array(
        [
            [getattr(layer, quantity)(Shape(h, d)) for d in range(layer.units_per_head + 1)]
            for h in range(layer.heads + 1)
        ],
        dtype=np.float64,
    )
    return candidates(layer, table[None], unit_shape, align, scores)


def random_scores(layers: list[PrunableLayer] | tuple[PrunableLayer, ...], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer.name: torch.rand(layer.units, generator=generator) for layer in layers}


def test_the_shapes_of_an_attention_and_of_an_ffn() -> None:
    layer, scores = attention(2, 6), torch.arange(12.0)
    assert shapes_of(layer, "head-dims", 4, scores).shapes == ((2, 0), (2, 4), (2, 6))
    assert shapes_of(layer, "heads", 4, scores).shapes == ((0, 6), (1, 6), (2, 6))
    # 4 units: one head of 4; 6: one head of 6; 8: two of 4; 12: all
    assert shapes_of(layer, "both", 4, scores).shapes == ((0, 0), (1, 4), (1, 6), (2, 4), (2, 6))
    ffn = Ffn(name="mlp", block="", heads=1, units=10, embed_dim=8, tokens=4, span=0)
    for unit_shape in SHAPES:
        assert shapes_of(ffn, unit_shape, 4, torch.rand(10)).shapes == ((1, 0), (1, 4), (1, 8), (1, 10))


def test_both_takes_the_shape_that_keeps_most_of_each_size() -> None:
    layer = attention(2, 4)
    one_good_head = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    good_dims = torch.tensor([9.0, 9, 0, 0, 9, 9, 0, 0])
    assert Shape(1, 4) in shapes_of(layer, "both", 2, one_good_head).shapes
    assert Shape(2, 2) in shapes_of(layer, "both", 2, good_dims).shapes
    assert keep_best(layer, one_good_head, Shape(1, 4)).tolist() == [0, 1, 2, 3]
    assert keep_best(layer, good_dims, Shape(2, 2)).tolist() == [0, 1, 4, 5]


@given(heads=st.integers(1, 4), dims=st.integers(1, 6), align=st.integers(1, 4), seed=st.integers(0, 999))
def test_no_shape_keeps_more_than_that_of_both(heads: int, dims: int, align: int, seed: int) -> None:
    layer = attention(heads, dims)
    scores = torch.rand(layer.units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    allowed = [d for d in range(1, dims + 1) if d % align == 0 or d == dims]
    for shape in shapes_of(layer, "both", align, scores).shapes:
        same = [(h, d) for h in range(1, heads + 1) for d in allowed if h * d == shape.units]
        kept = {s: float(scores[keep_best(layer, scores, Shape(*s))].sum()) for s in same}
        if shape.units:
            assert kept[shape] == pytest.approx(max(kept.values()))


@given(
    heads=st.integers(1, 4), dims=st.integers(1, 8), columns=st.integers(0, 200), align=st.integers(1, 4),
    unit_shape=st.sampled_from(SHAPES),
)  # fmt: skip
def test_candidates_rise_in_size_and_never_fall_in_cost(
    heads: int, dims: int, columns: int, align: int, unit_shape: str
) -> None:
    """Also if a head has a cost by itself, so that few units in many heads cost more than many units in few heads."""
    layer = attention(heads, dims, columns)
    steps = shapes_of(layer, unit_shape, align, torch.rand(layer.units), "params")
    assert all(a < b for a, b in pairwise(steps.units))
    assert all(a <= b for a, b in pairwise(steps.costs[0]))
    assert steps.units[0] == 0 and steps.units[-1] == layer.units
    for shape, cost in zip(steps.shapes, steps.costs[0], strict=True):
        assert cost == layer.params(shape)


def test_heads_are_ranked_by_the_sum_of_their_kept_dims() -> None:
    layer = attention(3, 3)
    scores = torch.tensor([5.0, 0, 0, 3, 3, 3, 4, 4, 0])
    assert keep_best(layer, scores, Shape(1, 3)).tolist() == [3, 4, 5]  # 9 of 5, 9 and 8
    assert keep_best(layer, scores, Shape(1, 1)).tolist() == [0]
    assert keep_best(layer, scores, Shape(1, 2)).tolist() == [6, 7]
    assert keep_best(layer, scores, Shape(2, 2)).tolist() == [3, 4, 6, 7]
    assert keep_best(layer, scores, Shape(0, 3)).tolist() == keep_best(layer, scores, Shape(3, 0)).tolist() == []


@pytest.mark.parametrize("unit_shape", SHAPES)
def test_the_slices_of_an_ffn_are_its_units(unit_shape: str) -> None:
    ffn = Ffn(name="mlp", block="", heads=1, units=3, embed_dim=8, tokens=4, span=0)
    assert slices(ffn, unit_shape, torch.tensor([1.0, 3.0, 2.0])) == [(3.0, 1.0), (2.0, 1.0), (1.0, 1.0)]


def test_widths_are_multiples_of_8_or_of_4_for_small_heads() -> None:
    ffn = Ffn(name="mlp", block="", heads=1, units=16, embed_dim=8, tokens=4, span=0)  # narrow, but not a head
    automatic = PruningOptions(align=0)
    assert aligned(automatic, [attention(2, 32), ffn]).align == 8
    assert aligned(automatic, [attention(2, 31), ffn]).align == 4
    assert aligned(PruningOptions(align=1), [attention(2, 32)]).align == 1


@given(heads=st.integers(1, 4), dims=st.integers(1, 6), unit_shape=st.sampled_from(SHAPES), seed=st.integers(0, 999))
def test_slices_fall_in_importance_and_sum_to_the_layer(heads: int, dims: int, unit_shape: str, seed: int) -> None:
    layer = attention(heads, dims)
    scores = torch.rand(layer.units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = slices(layer, unit_shape, scores)
    assert sum(units for _, units in found) == layer.units
    assert sum(score * units for score, units in found) == pytest.approx(float(scores.sum()))
    assert all(a >= b - 1e-12 for (a, _), (b, _) in pairwise(found))


def unfused(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("unit_shape", ["heads", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_is_shrunk_with_whole_heads_gone(
    family: str, unit_shape: str, fused: bool, families: dict[str, Tiny]
) -> None:
    backbone = families[family]
    model = backbone.model if fused else unfused(backbone.model)
    options = PruningOptions(align=4, unit_shape=unit_shape, ratio="uniform", floor=0.0)
    task = pipeline.pruning_task(model, backbone.inputs, 0.6, options, batch=4)
    scores = random_scores(backbone.layers)
    for layer in backbone.layers:
        scores[layer.name].view(layer.heads, -1)[0] *= 0.01 if layer.heads > 1 else 1  # a head with little importance
    kept = by_layer(task, scores).kept
    gone = {layer.name: layer.heads - layer.shape_of(kept[layer.name]).heads for layer in task.layers}
    assert any(gone.values())
    small = shrink(model, plan_of(backbone, kept))
    with torch.no_grad(), masked(model, backbone.layers, kept):
        want = model(backbone.inputs)
    torch.testing.assert_close(small(backbone.inputs), want, rtol=0, atol=1e-5)
    for layer in task.layers:
        if layer.kind == "attention" and gone[layer.name] < layer.heads:
            assert small.get_submodule(layer.name).num_heads == layer.heads - gone[layer.name]


def task_of(backbone: Tiny, budget: str, **options: object) -> PruningTask:
    settings = PruningOptions(**({"align": 1, "ratio": "uniform"} | options))  # type: ignore[arg-type]
    with patch.object(pipeline, "measure_timings", lambda *_: made_up_timings(backbone.layers)):
        return pipeline.pruning_task(backbone.model, backbone.inputs, budget, settings, batch=2)


BUDGETS = ["params<=0.6", "macs<=0.6,params<=0.5", "latency<=0.8", "block-macs<=0.5,latency<=0.9"]


@pytest.mark.parametrize("budget", some_slow(BUDGETS, BUDGETS[::2]))  # one limit is less than two
@pytest.mark.parametrize("name", sorted(registry.BUILT_IN))
def test_every_criterion_keeps_every_limit(name: str, budget: str, vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upop, "STEPS", 4)
    task = task_of(vit, budget, criterion=name)
    selection = registry.criterion_of(name)(task)
    plan = pipeline.plan_of(task, selection, vit.spec)
    shapes = {layer.name: layer.shape_of(selection.kept[layer.name]) for layer in task.layers}
    used = task.costs.total(shapes) / task.costs.allowed
    assert (used <= 1 + 1e-9).all()
    assert name in WHOLE or used.max() >= 0.995
    for limit, dense in zip(task.costs.limits, task.costs.dense, strict=True):
        if limit.quantity in ("macs", "params"):
            assert getattr(plan.cost, limit.quantity) <= limit.allowed(dense)


@pytest.mark.parametrize("unit_shape", SHAPES)
@pytest.mark.parametrize("name", ["tap", "taylor-global", "isomorphic", "savit", "upop-oneshot"])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_option_determines_the_shapes_of_attentions(
    family: str, name: str, unit_shape: str, families: dict[str, Tiny]
) -> None:
    """Except for savit, which removes heads, and upop, which removes dims that all heads share."""
    backbone = families[family]
    task = task_of(backbone, "macs<=0.6", unit_shape=unit_shape)
    kept = registry.criterion_of(name)(task).kept
    expected = {"savit": "heads", "upop-oneshot": "head-dims"}.get(name, unit_shape)
    attentions = [layer for layer in task.layers if layer.kind == "attention"]
    shapes = [layer.shape_of(kept[layer.name]) for layer in attentions]
    if name != "savit":  # which may decide to remove only FFN units
        assert any(shape != layer.full for shape, layer in zip(shapes, attentions, strict=True))
    for layer, shape in zip(attentions, shapes, strict=True):
        assert expected != "head-dims" or shape.heads == layer.heads
        assert expected != "heads" or shape.dims in (0, layer.units_per_head)
    plan = pipeline.plan_of(task, Selection(kept), backbone.spec)
    assert 0.995 * 0.6 * plan.dense.macs <= plan.cost.macs <= 0.6 * plan.dense.macs


def test_across_layers_ranks_by_what_the_budget_counts(swin: Tiny) -> None:
    """A hidden unit in a late stage of a Swin costs half the MACs, but twice the parameters, of an early one."""
    scores = {layer.name: torch.full((layer.units,), 1.0) + 0.01 * torch.rand(layer.units) for layer in swin.layers}

    def kept(budget: str, stage: int) -> float:
        found = across_layers(task_of(swin, budget, floor=0.0), scores).kept
        ffns = [n for n in swin.layers if n.kind == "ffn" and n.block.startswith(f"layers.{stage}")]
        return sum(len(found[layer.name]) for layer in ffns) / sum(layer.units for layer in ffns)

    assert kept("block-macs<=0.2", 1) > 0.7 > 0.1 > kept("block-macs<=0.2", 0)
    assert kept("params<=0.5", 0) > 0.9 > 0.7 > kept("params<=0.5", 1)


def test_savit_uses_the_tightest_limit_as_equality(deit: Tiny) -> None:
    dense = measure_cost(deit.model)
    table = cost_table(deit.layers, dense, Budget.parse("macs<=0.8,params<=0.75"))
    assert table.tightest == int(table.shares.argmin())
    kept = registry.criterion_of("savit")(task_of(deit, "macs<=0.8,params<=0.75")).kept
    shapes = {layer.name: layer.shape_of(kept[layer.name]) for layer in deit.layers}
    assert (table.total(shapes) / table.allowed)[table.tightest] >= 0.995


def test_updp_names_the_limit_that_branches_cannot_meet(vit: Tiny) -> None:
    task = task_of(vit, "macs<=0.5,params<=0.01")
    with pytest.raises(BudgetError, match=r"0\.01 of the parameters cannot be met: without any branch .* 0\.\d+"):
        registry.criterion_of("updp")(task)
