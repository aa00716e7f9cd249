"""Aggregation rules: which tensors are sent and trained, and the result by hand and against dense products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from backbones import Tiny, plan_of, random_kept
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tapfl.adapters import rules
from tapfl.adapters.layout import (
    LORA_A,
    LORA_B,
    Layout,
    Placement,
    Update,
    device_layout,
    gather_all,
    global_shapes,
    whole_rank,
)
from tapfl.adapters.lora import AdaptedModel
from tapfl.adapters.rules import RULES, ServerState
from tapfl.config import AdapterOptions, PrivacyOptions
from tapfl.pruning.surgery import shrink
from tapfl.training import Params

F64 = torch.float64
A, B = "fc.lora_A", "fc.lora_B"
NOBODY = torch.empty(0, dtype=torch.int64)


def options(rule: str, **others: Any) -> AdapterOptions:
    return AdapterOptions.model_validate({"rule": rule, "head": "mean"} | others)


def layout_of(rows: list[int], columns: list[int], rank: int, pruned: str) -> Layout:
    """Returns the layout of the factors of a linear layer whose `pruned` side, rows or columns, is reduced."""
    prefix, side_B = torch.arange(rank), "width" if pruned == "rows" else "embed"
    return {
        A: Placement((prefix, torch.tensor(columns)), side="width" if pruned == "columns" else "embed"),
        B: Placement((torch.tensor(rows), prefix), side=side_B),
    }


def step(given: AdapterOptions, previous: Params, updates: list[Update], round: int = 1) -> Params:
    generator = np.random.default_rng(0)
    state = rules.aggregate(given, PrivacyOptions(), ServerState(previous), updates, previous, round, generator)
    return state.params


# -- by hand ----------------------------------------------------------------------------------------------------------


def fc1(b: list[list[float]], a: list[list[float]], rows: list[int], weight: float) -> Update:
    """Returns an update of an fc1 with 3 neurons and 2 inputs."""
    params = {A: torch.tensor(a, dtype=F64), B: torch.tensor(b, dtype=F64)}
    return Update(params, layout_of(rows, [0, 1], len(a), "rows"), weight)


PREVIOUS = {A: torch.tensor([[1.0, 0], [0, 1]], dtype=F64), B: torch.full((3, 2), 9.0, dtype=F64)}


@pytest.mark.parametrize(("rule", "round"), [("ffa", 1), ("ffa", 2), ("rolora", 1), ("rolora", 3)])
def test_the_width_side_counts_a_missing_direction_as_zero(rule: str, round: int) -> None:
    updates = [
        fc1([[1, 2], [3, 4]], [[5, 5], [5, 5]], [0, 1], 1.0),
        fc1([[5], [6]], [[7, 7]], [1, 2], 3.0),  # rank 1: its neurons have no second direction
    ]
    result = step(options(rule), PREVIOUS, updates, round)
    assert result[B].tolist() == [[1, 2], [(3 + 15) / 4, (4 + 0) / 4], [6, 0]]
    assert torch.equal(result[A], PREVIOUS[A])  # the other side of a device's update is ignored


def test_entries_before_the_width_side_in_a_layout_do_not_change() -> None:
    sent = fc1([[5], [6]], [[7, 7]], [1, 2], 3.0)
    whole = whole_rank(sent, PREVIOUS, "width")
    assert list(sent.layout) == [A, B]
    assert torch.equal(whole.params[A], sent.params[A]) and whole.layout[A].shape == (1, 2)
    assert whole.params[B].tolist() == [[5, 0], [6, 0]] and whole.layout[B].shape == (2, 2)


@pytest.mark.parametrize(("rule", "round"), [("rolora", 2), ("embed_side", 1), ("embed_side", 2)])
def test_the_embed_side_is_averaged_over_those_who_have_the_direction(rule: str, round: int) -> None:
    updates = [
        fc1([[1, 2], [3, 4]], [[1, 1], [2, 2]], [0, 1], 1.0),
        fc1([[5], [6]], [[5, 9]], [1, 2], 3.0),
    ]
    result = step(options(rule), PREVIOUS, updates, round)
    assert result[A].tolist() == [[(1 + 15) / 4, (1 + 27) / 4], [2, 2]]
    assert torch.equal(result[B], PREVIOUS[B])


def test_the_embed_side_of_an_fc2_is_b() -> None:
    layout = layout_of([0, 1, 2], [1], 1, "columns")
    update = Update({A: torch.tensor([[4.0]]), B: torch.tensor([[1.0], [2], [3]])}, layout, 2.0)
    previous = {A: torch.zeros(1, 2), B: torch.zeros(3, 1)}
    shared = step(options("embed_side"), previous, [update])
    assert shared[B].flatten().tolist() == [1, 2, 3] and not shared[A].any()
    frozen = step(options("ffa"), previous, [update])
    assert frozen[A].tolist() == [[0, 4]] and not frozen[B].any()


def test_hetlora_weights_by_the_norm_of_the_product() -> None:
    updates = [
        fc1([[3], [4]], [[0, 1]], [0, 1], 100.0),  # ‖BA‖ = 5
        fc1([[6], [8]], [[3, 4]], [1, 2], 1.0),  # ‖BA‖ = 10 · 5
    ]
    result = step(options("hetlora"), {A: torch.zeros(1, 2, dtype=F64), B: PREVIOUS[B][:, :1]}, updates)
    want_A = [(5 * 0 + 50 * 3) / 55, (5 * 1 + 50 * 4) / 55]
    torch.testing.assert_close(result[A], torch.tensor([want_A], dtype=F64), rtol=1e-12, atol=0)
    want_B = torch.tensor([[3], [(5 * 4 + 50 * 6) / 55], [8]], dtype=F64)
    torch.testing.assert_close(result[B], want_B, rtol=1e-12, atol=0)


def test_hetlora_pads_both_factors_with_zeros() -> None:
    updates = [
        fc1([[3, 0], [4, 0]], [[0, 1], [0, 0]], [0, 1], 1.0),  # ‖BA‖ = 5
        fc1([[6], [8]], [[3, 4]], [1, 2], 1.0),  # ‖BA‖ = 50; rank 1
    ]
    updates[0].params[A][1] = torch.tensor([22.0, 0])  # B is 0 there, so ‖BA‖ is still 5
    result = step(options("hetlora"), PREVIOUS, updates)
    want = torch.tensor([[50 * 3 / 55, (5 * 1 + 50 * 4) / 55], [5 * 22 / 55, 0]], dtype=F64)
    torch.testing.assert_close(result[A], want, rtol=1e-12, atol=0)
    assert result[B][2].tolist() == [8, 0]  # of the neuron that only the second device has


def test_hetlora_uses_the_global_scale_and_weights_the_head_by_samples() -> None:
    place = layout_of([0, 1, 2], [0, 1], 1, "rows")
    scaled = place | {B: Placement(place[B].index, torch.tensor([0.5, 0.5, 0.5]), "width")}
    head = {"head.bias": Placement((torch.arange(2),))}
    b, a = torch.ones(3, 1, dtype=F64), torch.ones(1, 2, dtype=F64)
    updates = [
        Update({A: a, B: b, "head.bias": torch.tensor([0.0, 0])}, place | head, 1.0),
        Update({A: 4 * a, B: b / 2, "head.bias": torch.tensor([4.0, 8])}, scaled | head, 3.0),  # B is 1 globally
    ]
    previous = {A: torch.zeros(1, 2, dtype=F64), B: torch.zeros(3, 1, dtype=F64), "head.bias": torch.zeros(2)}
    result = step(options("hetlora"), previous, updates)
    torch.testing.assert_close(result[A], torch.full((1, 2), (1 * 1 + 4 * 4) / 5, dtype=F64), rtol=1e-12, atol=0)
    assert result["head.bias"].tolist() == [3, 6]


# -- exactness --------------------------------------------------------------------------------------------------------


@st.composite
def frozen_sides(draw: st.DrawFn) -> tuple[Params, list[Update], Tensor]:
    """Returns (global adapters, updates with the same embed side, dense overlap mean of products in plain loops)."""
    pruned = draw(st.sampled_from(["rows", "columns"]))
    d_out, d_in, rank = (draw(st.integers(1, 7)) for _ in range(3))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    shared = {A: generator.standard_normal((rank, d_in)), B: generator.standard_normal((d_out, rank))}
    size = d_out if pruned == "rows" else d_in
    total, weight, updates = np.zeros((d_out, d_in)), np.zeros((d_out, d_in)), []
    for _ in range(draw(st.integers(1, 4))):
        kept = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
        r, n = draw(st.integers(1, rank)), draw(st.integers(1, 500))
        rows, columns = (kept, list(range(d_in))) if pruned == "rows" else (list(range(d_out)), kept)
        if pruned == "rows":
            b, a = generator.standard_normal((len(kept), r)), shared[A][:r]
        else:
            b, a = shared[B][:, :r], generator.standard_normal((r, len(kept)))
        total[np.ix_(rows, columns)] += n * (b @ a)
        weight[np.ix_(rows, columns)] += n
        params = {A: torch.from_numpy(a.copy()), B: torch.from_numpy(b.copy())}
        updates.append(Update(params, layout_of(rows, columns, r, pruned), n))
    mean = np.where(weight > 0, total / np.maximum(weight, 1), shared[B] @ shared[A])
    return {name: torch.from_numpy(theta) for name, theta in shared.items()}, updates, torch.from_numpy(mean)


@pytest.mark.parametrize(("rule", "round"), [("ffa", 4), ("rolora", 5)])
@given(case=frozen_sides())
def test_with_one_side_frozen_the_product_is_the_dense_overlap_mean(
    rule: str, round: int, case: tuple[Params, list[Update], Tensor]
) -> None:
    previous, updates, mean = case
    result = step(options(rule), previous, updates, round)
    torch.testing.assert_close(result[B] @ result[A], mean, rtol=1e-9, atol=1e-9)


# -- what travels and moves -------------------------------------------------------------------------------------------


@pytest.fixture
def layout(vit: Tiny) -> Layout:
    kept = random_kept(vit.layers, 0.5) | {"blocks.1.attn": NOBODY}
    return device_layout(global_shapes(vit.model, vit.layers, 3), vit.layers, plan_of(vit, kept), 2)


def test_sides_of_a_plan(layout: Layout) -> None:
    sides = {name.removeprefix("blocks.0."): place.side for name, place in layout.items()}
    assert sides["attn.qkv.lora_A"] == sides["mlp.fc1.lora_A"] == "embed"
    assert sides["attn.qkv.lora_B"] == sides["mlp.fc1.lora_B"] == "width"
    assert sides["attn.proj.lora_A"] == sides["mlp.fc2.lora_A"] == "width"
    assert sides["attn.proj.lora_B"] == sides["mlp.fc2.lora_B"] == "embed"
    assert sides["head.weight"] == sides["head.bias"] == "whole"


E, W = {"embed", "whole"}, {"width", "whole"}


@pytest.mark.parametrize(
    ("rule", "round", "down", "up", "trained"),
    [
        ("fedit", 1, E | W, E | W, E | W),
        ("flex", 1, E | W, E | W, E | W),
        ("ffa", 1, W, W, W),
        ("rolora", 1, E | W, W, W),
        ("rolora", 2, E | W, E, E),
        ("embed_side", 1, E, E, E | W),
    ],
)
@pytest.mark.parametrize("head", ["class-rows", "mean", "personal"])
def test_which_tensors_are_sent_and_trained(
    rule: str, round: int, down: set[str], up: set[str], trained: set[str], head: str, layout: Layout
) -> None:
    given = options(rule, head=head)

    def named(sides: set[str]) -> list[str]:
        return [name for name, place in layout.items() if place.side in sides]

    stays = {"whole"} if head == "personal" else set()
    assert list(rules.down(given, layout)) == named(down - stays)
    assert list(rules.up(given, layout, round)) == named(up - stays)
    assert rules.trained(given, layout, round) == frozenset(named(trained))


def test_private_tensors_are_not_combined(vit: Tiny, layout: Layout) -> None:
    shapes = global_shapes(vit.model, vit.layers, 3)
    previous = {name: torch.zeros(shape) for name, shape in shapes.items()}
    update = Update({name: torch.ones(place.shape) for name, place in layout.items()}, layout, 1.0)
    for rule in RULES:
        for head in ("mean", "personal"):
            given = options(rule, head=head)
            changed = {name for name, theta in step(given, previous, [update]).items() if theta.any()}
            assert changed == set(rules.up(given, layout, 1))


# -- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_starts_where_nothing_changes_and_its_first_round_moves_every_linear(rule: str, vit: Tiny) -> None:
    given, shapes = options(rule), global_shapes(vit.model, vit.layers, 4)
    start, again = (
        rules.initial(given, shapes, vit.layers, vit.model, torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert {name: tuple(theta.shape) for name, theta in start.items()} == shapes
    assert all(torch.equal(start[name], again[name]) for name in shapes)
    plan = plan_of(vit, random_kept(vit.layers, 0.5))
    layout, small = device_layout(shapes, vit.layers, plan, 3), shrink(vit.model, plan)
    adapted = AdaptedModel(small, layout, 2.0)
    own = {name: tensor.clone().requires_grad_() for name, tensor in gather_all(start, layout).items()}
    assert torch.equal(adapted(own, vit.inputs), small(vit.inputs))
    F.cross_entropy(adapted(own, vit.inputs), torch.arange(4)).backward()
    moving = rules.trained(given, layout, 1)
    for linear in {name.rpartition(".")[0] for name in layout if "lora" in name}:
        gradients = [own[f"{linear}.{x}"].grad for x in (LORA_A, LORA_B) if f"{linear}.{x}" in moving]
        assert any(gradient is not None and gradient.any() for gradient in gradients), linear


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_the_embed_side_starts_random_within_one_over_the_root_of_the_inputs(rule: str, vit: Tiny) -> None:
    shapes = global_shapes(vit.model, vit.layers, 8)
    start = rules.initial(options(rule), shapes, vit.layers, vit.model, torch.Generator().manual_seed(0))
    for linear, side, d_in in (("attn.qkv", LORA_A, 32), ("attn.proj", LORA_B, 32), ("mlp.fc2", LORA_B, 128)):
        random = start[f"blocks.0.{linear}.{side}"]
        assert 0.9 * d_in**-0.5 < random.abs().max() <= d_in**-0.5
        other = LORA_B if side == LORA_A else LORA_A
        assert not start[f"blocks.0.{linear}.{other}"].any()


# -- heads ------------------------------------------------------------------------------------------------------------


def heads(values: list[list[float]], classes: list[list[bool] | None]) -> Iterator[Update]:
    place = {"head.bias": Placement((torch.arange(3),))}
    for bias, held, weight in zip(values, classes, (1.0, 3.0), strict=True):
        yield Update({"head.bias": torch.tensor(bias)}, place, weight, None if held is None else torch.tensor(held))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("head", "want"),
    [
        ("class-rows", [1, (2 + 3 * 6) / 4, 9]),
        ("mean", [(1 + 15) / 4, (2 + 18) / 4, (3 + 21) / 4]),
        ("personal", [9] * 3),
    ],
)
def test_heads(rule: str, head: str, want: list[float]) -> None:
    updates = list(heads([[1, 2, 3], [5, 6, 7]], [[True, True, False], [False, True, False]]))
    assert step(options(rule, head=head), {"head.bias": torch.full((3,), 9.0)}, updates)["head.bias"].tolist() == want


def test_a_device_without_reported_classes_counts_for_all_classes() -> None:
    updates = list(heads([[1, 2, 3], [5, 6, 7]], [None, [False, True, False]]))
    result = step(options("fedit", head="class-rows"), {"head.bias": torch.zeros(3)}, updates)
    assert result["head.bias"].tolist() == [1, 5, 3]


def test_class_rows_of_a_weight() -> None:
    place = {"head.weight": Placement((torch.arange(3), torch.arange(2)))}
    update = Update({"head.weight": torch.ones(3, 2)}, place, 1.0, torch.tensor([False, True, False]))
    result = step(options("flex", head="class-rows"), {"head.weight": torch.zeros(3, 2)}, [update])
    assert result["head.weight"].tolist() == [[0, 0], [1, 1], [0, 0]]


# -- all at once ------------------------------------------------------------------------------------------------------

COMBINED: dict[str, dict[str, Any]] = {
    "mean": {},
    "median, clipped": {"combine": "median", "clip": 1.0},
    "trimmed mean, momentum": {"combine": "trimmed-mean", "trim": 0.3, "server": "momentum"},
    "adam, class rows": {"server": "adam", "head": "class-rows"},
}


def fleet(vit: Tiny, previous: Params) -> dict[int, Update]:
    """Devices with different widths, ranks, classes and branches; none has the last attention."""
    updates = {}
    for i, share in enumerate((0.25, 0.5, 0.75, 0.9)):
        kept = random_kept(vit.layers, share, i) | {"blocks.1.attn": NOBODY}
        kept |= {"blocks.0.mlp": NOBODY} if i == 1 else {}
        shapes = {name: tuple(theta.shape) for name, theta in previous.items()}
        layout = device_layout(shapes, vit.layers, plan_of(vit, kept), 1 + i % 2)
        generator = torch.Generator().manual_seed(i)
        own = gather_all(previous, layout)
        own = {name: theta + torch.randn(theta.shape, generator=generator) for name, theta in own.items()}
        updates[i] = Update(own, layout, 10.0 + 7 * i, torch.arange(10) % 5 == i)
    return updates


PAIRS = [(r, c) for r in RULES for c, given in COMBINED.items() if r != "hetlora" or "combine" not in given]


@pytest.mark.parametrize(("rule", "combined"), PAIRS)
def test_different_widths_ranks_and_missing_branches_together(rule: str, combined: str, vit: Tiny) -> None:
    given = options(rule, **COMBINED[combined])
    shapes = global_shapes(vit.model, vit.layers, 2)
    previous = rules.initial(given, shapes, vit.layers, vit.model, torch.Generator().manual_seed(0))
    updates = fleet(vit, previous)

    def aggregate(order: tuple[int, ...]) -> ServerState:
        state, arrived = ServerState(previous), {i: updates[i] for i in order}
        for t in (1, 2):
            sent = [update for _, update in sorted(arrived.items())]
            state = rules.aggregate(given, PrivacyOptions(), state, sent, previous, t, np.random.default_rng(t))
        return state

    want = aggregate((0, 1, 2, 3))
    assert list(want.params) == list(previous)
    for name, theta in want.params.items():
        assert theta.shape == shapes[name] and theta.dtype == torch.float32 and theta.isfinite().all()
        if name.startswith("blocks.1.attn"):  # which no device has
            assert torch.equal(theta, previous[name])
    assert all(moment.dtype == torch.float32 for moment in want.optimizer.values())
    assert bool(want.optimizer) == (given.server != "none")
    got = aggregate((3, 1, 0, 2))
    for mine, theirs in ((got.params, want.params), (got.optimizer, want.optimizer)):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_round_without_updates_leaves_the_state() -> None:
    state = ServerState({A: torch.ones(2, 2)}, {"momentum.x": torch.ones(1)})
    given = options("fedit", server="momentum")
    assert rules.aggregate(given, PrivacyOptions(), state, [], {}, 1, np.random.default_rng()) is state
