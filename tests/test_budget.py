"""Budgets: they are parsed as they are written, and the cost table equals the cost of the shrunk models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backbones import VIT, VIT_ARGS, Tiny, plan_of, tiny
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tapfl.errors import ConfigError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.cost import Cost, Timings, measure_cost
from tapfl.models.units import Shape
from tapfl.pruning.budget import Budget, Limit
from tapfl.pruning.cost_table import cost_table
from tapfl.pruning.surgery import shrink
from tapfl.pruning.unit_shape import keep_best


@pytest.mark.parametrize(
    ("given_", "text", "title"),
    [
        (0.5, "macs<=0.5", "50% MACs"),
        ("0.5", "macs<=0.5", "50% MACs"),
        (1, "macs<=1", "100% MACs"),
        ("50%", "macs<=0.5", "50% MACs"),
        (" macs <= 12.5 % ", "macs<=0.125", "12.5% MACs"),
        ("params<=8e6", "params<=8000000", "8M parameters"),
        ("macs<=1.26e9", "macs<=1260000000", "1.26G MACs"),
        ("latency<=5ms", "latency<=5ms", "5 ms"),
        ("latency<=0.5 ms", "latency<=0.5ms", "0.5 ms"),
        ("latency<=0.5", "latency<=0.5", "50% latency"),
        ("block-macs<=0.5", "block-macs<=0.5", "50% block MACs"),
        ("0.5,params<=0.4", "macs<=0.5,params<=0.4", "50% MACs, 40% parameters"),
        (
            "macs<=0.5,params<=8e6, latency<=5ms,block-macs<=50%",
            "macs<=0.5,params<=8000000,latency<=5ms,block-macs<=0.5",
            "50% MACs, 8M parameters, 5 ms, 50% block MACs",
        ),
    ],
)
def test_a_budget_is_read_and_written(given_: float | str, text: str, title: str) -> None:
    budget = Budget.parse(given_)
    assert str(budget) == text and budget.title == title
    assert Budget.parse(text) == budget and Budget.parse(budget) is budget
    assert budget.measured == ("latency" in text)


limits = st.one_of(
    st.builds(Limit, st.sampled_from(["macs", "params", "block-macs", "latency"]), st.floats(1e-9, 1), st.just(True)),
    st.builds(
        Limit, st.sampled_from(["macs", "params", "block-macs"]), st.integers(2, 10**15).map(float), st.just(False)
    ),
    st.builds(Limit, st.just("latency"), st.floats(1e-6, 1e6), st.just(False)),
)


@given(limits=st.lists(limits, min_size=1, max_size=4, unique_by=lambda limit: limit.quantity))
def test_any_budget_round_trips(limits: list[Limit]) -> None:
    budget = Budget(tuple(limits))
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ("", "'' is not a limit"),
        ("macs<=0.5,", "'' is not a limit"),
        ("half", "'half' is not a limit"),
        ("macs=0.5", "'macs=0.5' is not a limit"),
        ("macs<=", "'macs<=' is not a limit"),
        ("flops<=0.5", "'flops' is not a quantity; accepted: macs, params, latency, block-macs"),
        ("macs<=half", "'half' is not a number above 0"),
        (0, "'0' is not a number above 0"),
        (-0.5, "'-0.5' is not a number above 0"),
        ("params<=-3", "'-3' is not a number above 0"),
        ("macs<=nan", "'nan' is not a number above 0"),
        ("macs<=inf", "'inf' is not a number above 0"),
        (1.5, r"is a share and must lie in \(0, 1\]"),
        ("150%", r"is a share and must lie in \(0, 1\]"),
        ("params<=150%", r"is a share and must lie in \(0, 1\]"),
        ("macs<=1.5", r"1\.5 is neither a share in \(0, 1\] nor a whole number of MACs"),
        ("latency<=5", r"a share of the latency lies in \(0, 1\], else write 5ms"),
        ("macs<=5ms", "macs is not in ms"),
        ("0.5,macs<=0.4", "macs is limited twice"),
        ("params<=0.5,params<=8e6", "params is limited twice"),
        (True, "budget = True: is not a valid budget"),
        (None, "budget = None: is not a valid budget"),
        ([0.5], r"budget = \[0.5\]: is not a valid budget"),
    ],
)
def test_an_invalid_budget_is_refused(given_: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        Budget.parse(given_)  # type: ignore[arg-type]
    assert repr(given_) in str(refusal.value) and "\n" not in str(refusal.value)


@given(share=st.floats(1e-6, 1), dense=st.integers(10**6, 10**12))
def test_a_cost_is_shown_as_a_limit_that_it_meets(share: float, dense: int) -> None:
    cost = share * dense
    for unit, quantity in (("", "macs"), ("ms", "latency")):
        told = Limit(quantity, 0.5, share=not unit).express(cost, dense)
        limit = Budget.parse(f"{quantity}<={told.replace(' ', '')}").limits[0]
        assert cost * (1 - 1e-9) <= limit.allowed(dense) <= cost * 1.0011
    assert int(Limit("params", 2e6, share=False).express(cost, dense)) == int(np.ceil(cost))


def shapes_of(data: st.DataObject, backbone: Tiny) -> dict[str, Shape]:
    return {
        layer.name: Shape(
            data.draw(st.integers(0, layer.heads), label=f"heads of {layer.name}"),
            data.draw(st.integers(0, layer.units_per_head), label=f"dims of {layer.name}"),
        )
        for layer in backbone.layers
    }


@settings(max_examples=30, phases=[Phase.generate])
@given(data=st.data())
def test_the_table_equals_the_cost_of_the_shrunk_model(data: st.DataObject, families: dict[str, Tiny]) -> None:
    backbone = families[data.draw(st.sampled_from(["vit", "deit", "swin"]))]
    table_is_exact(backbone, shapes_of(data, backbone))


def table_is_exact(backbone: Tiny, shapes: dict[str, Shape]) -> None:
    dense = measure_cost(backbone.model)
    table = cost_table(backbone.layers, dense, Budget.parse("macs<=0.5,params<=0.5,block-macs<=0.5"))
    kept = {n.name: keep_best(n, torch.rand(n.units), shapes[n.name]) for n in backbone.layers}
    small = shrink(backbone.model, plan_of(backbone, kept))
    cost = measure_cost(small)
    macs, params, block_macs = table.total(shapes)
    assert (macs, params) == (cost.macs, cost.params)
    fixed = dense.macs - sum(layer.macs_per_unit * layer.units for layer in backbone.layers)
    assert block_macs == cost.macs - fixed
    assert table.within(table.total(shapes)) == bool((table.total(shapes) <= table.allowed).all())
    for layer in backbone.layers:
        branch = small.get_submodule(layer.name)
        shape = layer.shape_of(kept[layer.name])
        assert shape.units == len(kept[layer.name])
        assert layer.params(shape) == sum(p.numel() for p in branch.parameters())


@pytest.mark.parametrize("options", [("qkv_bias",), ("proj_bias",), ("qkv_bias", "proj_bias")])
@pytest.mark.parametrize("shape", [Shape(2, 16), Shape(1, 3), Shape(0, 0)])
def test_the_table_counts_only_existing_biases(options: tuple[str, ...], shape: Shape) -> None:
    backbone = tiny(BackboneSpec(name=VIT.name, args=VIT_ARGS | dict.fromkeys(options, False), num_classes=10))
    for layer in backbone.layers:
        table_is_exact(backbone, {n.name: n.full for n in backbone.layers} | {layer.name: min(shape, layer.full)})


def test_layers_with_settled_widths_count_as_fixed(swin: Tiny) -> None:
    budget = Budget.parse("macs<=0.5,params<=0.4")
    table = cost_table(swin.layers, measure_cost(swin.model), budget)
    shapes = {layer.name: Shape(1, layer.units_per_head // 2) for layer in swin.layers}
    attentions = {layer.name: shapes[layer.name] for layer in swin.layers if layer.kind == "attention"}
    rest = table.settled(attentions)
    assert set(rest.branches) == set(shapes) - set(attentions)
    np.testing.assert_array_equal(rest.total(shapes), table.total(shapes))
    np.testing.assert_array_equal(rest.allowed, table.allowed)


def test_the_tightest_limit_and_the_price_of_a_unit(vit: Tiny) -> None:
    dense = measure_cost(vit.model)
    one = cost_table(vit.layers, dense, Budget.parse("params<=0.3"))
    for layer in vit.layers:
        zero, full = layer.params(Shape(0, 0)), layer.params(layer.full)
        assert one.price(layer.name) == pytest.approx((full - zero) / layer.units)
    two = cost_table(vit.layers, dense, Budget.parse("macs<=0.9,block-macs<=0.25"))
    assert two.tightest == 1 and two.shares[1] == pytest.approx(0.25)
    macs = sum(layer.macs_per_unit * layer.units for layer in vit.layers)
    spendable = (0.9 * dense.macs - (dense.macs - macs), 0.25 * macs)
    for layer in vit.layers:
        assert two.price(layer.name) == pytest.approx(sum(layer.macs_per_unit / part for part in spendable))


def test_the_fixed_part_of_latency_excludes_the_branches(vit: Tiny) -> None:
    branches = {layer.name: np.linspace(0, 1, (layer.heads + 1) * (layer.units_per_head + 1)) for layer in vit.layers}
    branches = {n.name: branches[n.name].reshape(n.heads + 1, -1) for n in vit.layers}
    table = cost_table(vit.layers, Cost(params=1, macs=1), Budget.parse("latency<=0.5"), Timings(10.0, branches))
    assert table.fixed[0] == pytest.approx(10 - len(vit.layers)) and table.dense[0] == 10
    assert table.total({n.name: Shape(0, 0) for n in vit.layers})[0] == pytest.approx(10 - len(vit.layers))
    assert table.allowed[0] == 5
