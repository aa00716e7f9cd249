"""Widths from layer importance and a budget: golden numbers, and the guarantee on the achieved cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from backbones import Tiny, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from tapfl.config import PruningOptions
from tapfl.errors import BudgetError
from tapfl.models.cost import Cost, measure_cost
from tapfl.models.units import Ffn, PrunableLayer, SelfAttention
from tapfl.pruning.allocate import allocate, layer_weights, softmax_weights, water_fill
from tapfl.pruning.budget import Budget
from tapfl.pruning.cost_table import cost_table
from tapfl.pruning.unit_shape import aligned, candidates

GOLDEN = golden("allocate")


def linear(cost: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda keep: np.array([cost @ keep])


def widths_of(
    layers: list[PrunableLayer], weights: np.ndarray, dense: int, budget: float | str, options: PruningOptions
) -> dict[str, int]:
    """Returns widths under a budget in MACs; `dense` is the cost of the whole model."""
    costs = cost_table(layers, Cost(params=0, macs=dense), Budget.parse(budget))
    steps = [candidates(n, costs.branches[n.name], options.unit_shape, options.align) for n in layers]
    return {name: shape.units for name, shape in allocate(steps, weights, costs, options).items()}


def test_softmax_weights_are_golden() -> None:
    np.testing.assert_allclose(softmax_weights(np.array(GOLDEN["kl"]), GOLDEN["tau"]), GOLDEN["weights"], rtol=1e-12)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["share"]))
def test_water_filling_is_golden(case: dict) -> None:
    cost = np.array(GOLDEN["cost_of_full_layer"])
    budget = case["share"] * cost.sum()
    c, keep = water_fill(np.array(GOLDEN["weights"]), linear(cost), np.array([budget]), GOLDEN["floor"])
    assert c == pytest.approx(case["c"], rel=1e-6)
    np.testing.assert_allclose(keep, case["keep"], rtol=1e-6)
    assert cost @ keep == pytest.approx(budget, rel=1e-9)


@given(
    weights=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=12),
    share=st.floats(0, 1),
    floor=st.floats(0, 0.5),
    seed=st.integers(0, 1000),
)
def test_water_filling_spends_the_budget_exactly(weights: list[float], share: float, floor: float, seed: int) -> None:
    cost = np.random.default_rng(seed).uniform(1, 100, len(weights))
    budget = (floor + share * (1 - floor)) * cost.sum()
    budget = min(max(budget, floor * cost.sum()), cost.sum())
    _, keep = water_fill(np.array(weights), linear(cost), np.array([budget]), floor)
    assert ((keep >= floor) & (keep <= 1)).all()
    assert cost @ keep == pytest.approx(budget, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_water_filling_does_not_depend_on_the_scale_of_weights(scale: float) -> None:
    cost = linear(np.array([10.0, 20.0, 30.0]))
    _, keep = water_fill(scale * np.array([1.0, 2.0, 4.0]), cost, np.array([30.0]), 0.05)
    np.testing.assert_allclose(keep, 30 / 170 * np.array([1, 2, 4]), rtol=1e-6)


@pytest.mark.parametrize("tau", [5.82, 0.01, 1e-4])
def test_a_temperature_however_low_gives_an_allocation(tau: float) -> None:
    """The softmax may underflow to 0; the layer with the largest KL is filled first, and the budget is still met."""
    weights = softmax_weights(np.array([0.1, 12.0, 3.0]), tau)
    cost = np.array([10.0, 20.0, 30.0])
    _, keep = water_fill(weights, linear(cost), np.array([40.0]), 0.1)
    assert cost @ keep == pytest.approx(40, rel=1e-6)
    assert keep.argmax() == 1


@st.composite
def backbones(draw: st.DrawFn) -> tuple[list[PrunableLayer], int]:
    """Layers of a made-up backbone, and the MACs of everything that cannot be pruned."""
    embed = draw(st.sampled_from([24, 48, 64, 192]))
    tokens = draw(st.integers(1, 200))
    heads = draw(st.integers(1, 4))
    layers: list[PrunableLayer] = []
    for i in range(draw(st.integers(1, 5))):
        common = {"block": f"blocks.{i}", "embed_dim": embed, "tokens": tokens}
        dims = draw(st.integers(4, 64))
        layers.append(SelfAttention(name=f"blocks.{i}.attn", heads=heads, units=heads * dims, span=tokens, **common))
        hidden = draw(st.integers(16, 256))
        layers.append(Ffn(name=f"blocks.{i}.mlp", heads=1, units=hidden, span=0, **common))
    return layers, draw(st.integers(0, 10)) * embed * embed


@settings(max_examples=15)  # some integer programs take a second
@given(
    backbone=backbones(),
    share=st.floats(0.02, 1.0),
    align=st.sampled_from([1, 2, 4, 8]),
    floor=st.sampled_from([0.0, 0.05, 0.3]),
    seed=st.integers(0, 1000),
)
def test_the_achieved_cost_is_within_half_a_percent_below_the_budget_or_it_is_refused(
    backbone: tuple[list[PrunableLayer], int], share: float, align: int, floor: float, seed: int
) -> None:
    layers, fixed = backbone
    dense = fixed + sum(layer.macs_per_unit * layer.units for layer in layers)
    options = PruningOptions(align=align, floor=floor)
    generator = np.random.default_rng(seed)
    kl = {layer.name: float(generator.exponential(5)) for layer in layers}
    try:
        widths = widths_of(layers, layer_weights(layers, kl, options), dense, share, options)
    except BudgetError:
        return
    achieved = fixed + sum(layer.macs_per_unit * widths[layer.name] for layer in layers)
    assert share * 0.995 * (1 - 1e-9) <= achieved / dense <= share * (1 + 1e-9)
    for layer in layers:
        per_head, rest = divmod(widths[layer.name], layer.heads)
        assert rest == 0
        assert per_head % align == 0 or per_head == layer.units_per_head
        assert floor * layer.units_per_head - align < per_head <= layer.units_per_head
        assert per_head > 0 or floor == 0


@given(backbone=backbones(), align=st.sampled_from([1, 4]), floor=st.sampled_from([0.0, 0.05, 0.3]))
def test_the_least_budget_that_a_refusal_names_is_accepted(
    backbone: tuple[list[PrunableLayer], int], align: int, floor: float
) -> None:
    layers, fixed = backbone
    fixed += 1000
    dense = fixed + sum(layer.macs_per_unit * layer.units for layer in layers)
    options = PruningOptions(align=align, floor=floor)
    with pytest.raises(BudgetError, match="cannot be met: this backbone can go down to") as refusal:
        widths_of(layers, np.ones(len(layers)), dense, 1e-9, options)
    named = re.search(r"down to ([0-9.e-]+)", str(refusal.value))
    assert named is not None
    widths_of(layers, np.ones(len(layers)), dense, float(named[1]), options)


@given(backbone=backbones(), floor=st.sampled_from([0.0, 0.05, 0.3]))
def test_the_least_budget_itself_is_accepted(backbone: tuple[list[PrunableLayer], int], floor: float) -> None:
    """Exactly at the limit, rounding must neither cause a refusal nor an endless loop."""
    layers, fixed = backbone
    fixed += 1000
    unit_heads = [layer.macs_per_unit * layer.heads for layer in layers]
    least = [int(np.ceil(floor * layer.units_per_head - 1e-9)) for layer in layers]
    dense = fixed + sum(layer.macs_per_unit * layer.units for layer in layers)
    minimum = fixed + sum(u * w for u, w in zip(unit_heads, least, strict=True))
    widths = widths_of(layers, np.ones(len(layers)), dense, minimum / dense, PruningOptions(align=1, floor=floor))
    assert list(widths.values()) == [w * layer.heads for w, layer in zip(least, layers, strict=True)]


def test_the_whole_budget_keeps_everything(vit: Tiny) -> None:
    dense = measure_cost(vit.model).macs
    widths = widths_of(vit.layers, np.array([3.0, 1.0, 0.1, 2.0]), dense, 1.0, PruningOptions(align=4))
    assert widths == {layer.name: layer.units for layer in vit.layers}


def test_adaptive_ratio_weighs_by_kind(vit: Tiny) -> None:
    kl = {"blocks.0.attn": 1.0, "blocks.1.attn": 2.0, "blocks.0.mlp": 9.0, "blocks.1.mlp": 3.0}
    weights = layer_weights(vit.layers, kl, PruningOptions(ratio="adaptive", tau=2.0))
    attention, ffn = weights[[0, 2]], weights[[1, 3]]
    np.testing.assert_allclose(attention, 2 * np.exp([0.5, 1.0]) / np.exp([0.5, 1.0]).sum())
    np.testing.assert_allclose(ffn, 2 * np.exp([4.5, 1.5]) / np.exp([4.5, 1.5]).sum())


def test_weights_within_a_kind_do_not_depend_on_the_other_kind(vit: Tiny) -> None:
    kl = {"blocks.0.attn": 1.0, "blocks.1.attn": 2.0, "blocks.0.mlp": 9.0, "blocks.1.mlp": 3.0}
    options = PruningOptions(ratio="adaptive", tau=2.0)
    both = layer_weights(vit.layers, kl, options)
    for kind in ("attention", "ffn"):
        chosen = [i for i, layer in enumerate(vit.layers) if layer.kind == kind]
        alone = layer_weights([vit.layers[i] for i in chosen], kl, options)
        np.testing.assert_allclose(alone, both[chosen])


def test_widths_are_aligned_to_8_unless_heads_are_small(vit: Tiny) -> None:
    assert [layer.units_per_head for layer in vit.layers] == [16, 128, 16, 128]
    assert aligned(PruningOptions(), vit.layers).align == 4
    large = [replace(layer, heads=1) for layer in vit.layers]
    assert aligned(PruningOptions(), large).align == 8
    assert aligned(PruningOptions(align=3), large).align == 3


def test_uniform_ratio_keeps_about_the_same_share_of_every_layer(vit: Tiny) -> None:
    dense = measure_cost(vit.model).macs
    widths = widths_of(vit.layers, np.ones(4), dense, 0.5, PruningOptions(align=1, ratio="uniform"))
    shares = [widths[layer.name] / layer.units for layer in vit.layers]
    assert max(shares) - min(shares) < 0.07


def test_an_important_layer_is_wider(vit: Tiny) -> None:
    dense = measure_cost(vit.model).macs
    widths = widths_of(vit.layers, np.array([1.0, 1.5, 1.0, 0.5]), dense, 0.5, PruningOptions(align=1))
    assert widths["blocks.0.mlp"] > 2 * widths["blocks.1.mlp"]


def test_exchanges_meet_a_budget_that_greedy_filling_misses() -> None:
    """Two layers with units that cost 14 and 10: greedy filling alone ends below each of these sums."""
    layers = [
        Ffn(name=f"mlp{i}", block="", heads=1, units=4, embed_dim=cost, tokens=1, span=0)
        for i, cost in enumerate((7, 5))
    ]
    dense = sum(layer.macs_per_unit * layer.units for layer in layers)
    options = PruningOptions(align=1, floor=0.0)
    for spent in (20, 28, 30, 34, 42, 44, 56, 58, 72, 82):
        widths = widths_of(layers, np.array([1.0, 0.4]), dense, spent / dense, options)
        assert 14 * widths["mlp0"] + 10 * widths["mlp1"] == spent


def test_a_grid_too_coarse_for_the_budget_is_refused_with_the_nearest_values() -> None:
    layer = Ffn(name="mlp", block="", heads=1, units=64, embed_dim=8, tokens=1, span=0)
    dense = layer.macs_per_unit * layer.units
    with pytest.raises(BudgetError, match=r"the nearest below is 0\.5 and above is 1; a smaller pruning\.align"):
        widths_of([layer], np.ones(1), dense, 0.6, PruningOptions(align=32))
    with pytest.raises(BudgetError, match=r"nearest .*; accepted: a budget of that size"):
        widths_of([layer], np.ones(1), dense, 0.695, PruningOptions(align=1))
