"""Several limits in a budget: all hold and one is reached to 99.5 %, or the refusal names what can be met."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest
from backbones import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_allocate import backbones

from tapfl.config import PruningOptions
from tapfl.errors import BudgetError
from tapfl.models.cost import Cost, Timings, interpolated, measure_cost
from tapfl.models.units import Ffn, PrunableLayer, Shape
from tapfl.pruning.allocate import MIP_GAP, Fit, Program, allocate
from tapfl.pruning.budget import Budget
from tapfl.pruning.cost_table import CostTable, cost_table
from tapfl.pruning.unit_shape import Candidates, candidates


def made_up_timings(layers: list[PrunableLayer], seed: int = 0) -> Timings:
    """Timings with kinks and plateaus that never decrease with the size; the fixed part of the model takes 5 ms."""
    generator = np.random.default_rng(seed)
    branches = {}
    for layer in layers:
        whole = float(generator.uniform(0.5, 2))
        heads, dims = sorted({1, layer.heads}), sorted({max(layer.units_per_head // 3, 1), layer.units_per_head})
        measured = {Shape(h, d): whole * (h / layer.heads) ** 0.5 * (d / dims[-1]) ** 0.7 for h in heads for d in dims}
        branches[layer.name] = interpolated(measured | {Shape(0, 0): 0.01 * whole})
    return Timings(5 + sum(float(table[-1, -1]) for table in branches.values()), branches)


def problem(
    layers: list[PrunableLayer], fixed: Cost, budget: str, options: PruningOptions, timings: Timings | None = None
) -> tuple[list[Candidates], CostTable]:
    dense = Cost(
        macs=fixed.macs + sum(layer.macs(layer.full) for layer in layers),
        params=fixed.params + sum(layer.params(layer.full) for layer in layers),
    )
    costs = cost_table(layers, dense, Budget.parse(budget), timings or made_up_timings(layers))
    return [candidates(n, costs.branches[n.name], options.unit_shape, options.align) for n in layers], costs


shares = st.floats(0.1, 1.0).map(lambda share: round(share, 4))
budgets = st.lists(
    st.tuples(st.sampled_from(["macs", "params", "latency", "block-macs"]), shares),
    min_size=1,
    max_size=4,
    unique_by=lambda limit: limit[0],
).map(lambda limits: ",".join(f"{quantity}<={share}" for quantity, share in limits))


@settings(max_examples=20)
@given(
    backbone=backbones(),
    budget=budgets,
    align=st.sampled_from([1, 4, 8]),
    floor=st.sampled_from([0.0, 0.05]),
    unit_shape=st.sampled_from(["head-dims", "heads", "both"]),
    seed=st.integers(0, 1000),
)
def test_every_limit_holds_and_one_is_reached_or_it_is_refused(
    backbone: tuple[list[PrunableLayer], int], budget: str, align: int, floor: float, unit_shape: str, seed: int
) -> None:
    layers, fixed = backbone
    options = PruningOptions(align=align, floor=floor, unit_shape=unit_shape)
    steps, costs = problem(layers, Cost(macs=fixed, params=fixed), budget, options)
    try:
        shapes = allocate(steps, np.random.default_rng(seed).uniform(0.1, 3, len(layers)), costs, options)
    except BudgetError:
        return
    share = costs.total(shapes) / costs.dense
    limit = costs.allowed / costs.dense
    assert (share <= limit * (1 + 1e-9)).all()
    assert (share >= limit * 0.995 * (1 - 1e-9)).any()
    for layer in layers:
        heads, dims = shapes[layer.name]
        assert heads * dims >= max(floor * layer.units - 1e-6, 1 if floor else 0)
        assert dims % align == 0 or dims == layer.units_per_head
        if unit_shape == "head-dims" or layer.kind == "ffn":
            assert heads == layer.heads
        elif unit_shape == "heads":
            assert dims == layer.units_per_head


@settings(max_examples=15)
@given(backbone=backbones(), share=shares, align=st.sampled_from([4, 16]), quantity=st.sampled_from(["macs", "params"]))
def test_what_a_refusal_names_is_accepted(
    backbone: tuple[list[PrunableLayer], int], share: float, align: int, quantity: str
) -> None:
    layers, fixed = backbone[0][:4], backbone[1]
    options = PruningOptions(align=align)
    ones = np.ones(len(layers))

    def attempt(budget: str) -> None:
        steps, costs = problem(layers, Cost(macs=fixed, params=fixed), budget, options)
        allocate(steps, ones, costs, options)

    try:
        attempt(f"{quantity}<={share}")
    except BudgetError as refusal:
        named = re.findall(r"(?:down to|below is|above is) ([0-9.e-]+)", str(refusal))
        assert named
        for value in named:
            attempt(f"{quantity}<={value}")


@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 1), others=st.floats(0.1, 1.5))
@settings(max_examples=15)
def test_the_integer_program_finds_what_brute_force_finds(seed: int, share: float, others: float) -> None:
    """All choices of three layers: the one nearest to the ideal within the budget, or the sums nearest to a limit."""
    generator = np.random.default_rng(seed)
    layers: list[PrunableLayer] = [
        Ffn(name=f"mlp{i}", block="", heads=1, units=int(generator.integers(4, 9)), embed_dim=d, tokens=1, span=0)
        for i, d in enumerate(generator.choice(40, 3, replace=False) + 1)
    ]
    options, ideal = PruningOptions(align=1, floor=0.0), np.array([layer.units for layer in layers]) * share
    steps, costs = problem(layers, Cost(macs=0, params=0), f"macs<={share},latency<={min(others, 1)}", options)
    fit = Fit(tuple(steps), costs, np.zeros(3, dtype=np.int64))
    every = [np.array(choice) for choice in product(*(range(len(step.units)) for step in steps))]

    def deviation(choice: np.ndarray) -> float:
        return float((fit.lack(choice, ideal) ** 2).sum())

    program, met = Program(fit), [choice for choice in every if fit.met(choice)]
    found = program.nearest(ideal)
    assert (found is None) == (not met)
    if found is not None:
        assert fit.met(found)
        assert deviation(found) == pytest.approx(min(map(deviation, met)), rel=2 * MIP_GAP, abs=1e-9)
    total = np.array([fit.total(choice) for choice in every])
    for aim in range(2):
        other = total[:, 1 - aim] <= costs.allowed[1 - aim] * (1 + 1e-12)
        over = total[:, aim] > costs.allowed[aim] * (1 + 1e-12)
        for above, sums in ((False, total[other & ~over, aim]), (True, total[other & over, aim])):
            choice = program.extreme(aim, above)
            assert (choice is None) == (len(sums) == 0)
            if choice is not None:
                best = sums.min() if above else sums.max()
                assert fit.total(choice)[aim] == pytest.approx(best, rel=2 * MIP_GAP)


def test_the_integer_program_meets_a_budget_that_greedy_filling_misses() -> None:
    """Steps of 12, 20 and 30 with equal weights; some of their sums need two exchanges at once."""
    sizes = enumerate((6, 10, 15))
    layers: list[PrunableLayer] = [
        Ffn(name=f"mlp{i}", block="", heads=1, units=3, embed_dim=d, tokens=1, span=0) for i, d in sizes
    ]
    options = PruningOptions(align=1, floor=0.0)
    for spent in sorted({12 * a + 20 * b + 30 * c for a in range(4) for b in range(4) for c in range(4)} - {0}):
        steps, costs = problem(layers, Cost(macs=0, params=0), f"macs<={spent}", options)
        assert costs.total(allocate(steps, np.ones(3), costs, options))[0] == spent


def test_limits_that_leave_room_keep_the_model_whole(vit: Tiny) -> None:
    options = PruningOptions(align=4)
    dense = measure_cost(vit.model)
    budget = Budget.parse(f"params<={dense.params + 5},macs<=1,latency<=100ms")
    costs = cost_table(vit.layers, dense, budget, made_up_timings(vit.layers))
    steps = [candidates(n, costs.branches[n.name], "head-dims", options.align) for n in vit.layers]
    assert allocate(steps, np.ones(4), costs, options) == {layer.name: layer.full for layer in vit.layers}


def test_the_limit_that_binds_decides_and_the_others_hold(vit: Tiny) -> None:
    """The same backbone with a limit on params, on latency, and on both in either order."""
    options, dense = PruningOptions(align=1, floor=0.0), measure_cost(vit.model)
    found = {}
    for text in ("params<=0.5", "latency<=0.7", "params<=0.5,latency<=0.7", "latency<=0.7,params<=0.5"):
        costs = cost_table(vit.layers, dense, Budget.parse(text), made_up_timings(vit.layers))
        steps = [candidates(n, costs.branches[n.name], "head-dims", 1) for n in vit.layers]
        shapes = allocate(steps, np.ones(4), costs, options)
        assert costs.within(costs.total(shapes)) and costs.reached(costs.total(shapes))
        found[text] = [shape.units for shape in shapes.values()]
    both = found["params<=0.5,latency<=0.7"]
    assert both == found["latency<=0.7,params<=0.5"]
    assert found["params<=0.5"] != found["latency<=0.7"]


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("params<=100", r"budget 100 parameters cannot be met: this backbone can go down to \d{4} \(pruning"),
        ("macs<=0.9,params<=0.01", r"budget 0\.01 of the parameters cannot be met: .* down to 0\.\d{2,5} \(pruning"),
        ("latency<=1ms,macs<=0.9", r"budget 1 ms of latency cannot be met: this backbone can go down to 5\.\d+ ms \("),
        ("latency<=0.01", r"budget 0\.01 of the latency cannot be met"),
        ("block-macs<=0.001", r"budget 0\.001 of the block MACs cannot be met"),
    ],
)
def test_the_limit_that_cannot_be_met_is_named(budget: str, said: str, vit: Tiny) -> None:
    options = PruningOptions(align=4)
    costs = cost_table(vit.layers, measure_cost(vit.model), Budget.parse(budget), made_up_timings(vit.layers))
    steps = [candidates(n, costs.branches[n.name], "head-dims", options.align) for n in vit.layers]
    with pytest.raises(BudgetError, match=said):
        allocate(steps, np.ones(4), costs, options)
