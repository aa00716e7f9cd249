"""Medians, trimmed means and clipping: by hand, against numpy on dense products, and against a hostile device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_flex import A, B, federations, noise, update
from torch import Tensor

from tapfl.adapters import combination, flex, rules
from tapfl.adapters.combination import Combination, clip_update
from tapfl.adapters.layout import Part, Placement, Update, to_global_scale
from tapfl.adapters.rules import RULES, ServerState
from tapfl.config import AdapterOptions, PrivacyOptions
from tapfl.training import Params

F64 = torch.float64
MEDIAN = combination.scatter_trimmed(combination.median_cut)


def at(*axes: list[int], row_scale: list[float] | None = None) -> Placement:
    scale = None if row_scale is None else torch.tensor(row_scale, dtype=F64)
    return Placement(tuple(torch.tensor(axis) for axis in axes), scale)


def vectors(*values: list[float]) -> list[Part]:
    return [(torch.tensor(v, dtype=F64), at(list(range(len(v)))), 1.0 + i) for i, v in enumerate(values)]


def test_median_by_hand() -> None:
    # coordinate 0 has five holders, 1 has four, 2 has one, 3 has none; weights have no effect
    parts = vectors([1, 10, 7], [5, 40], [2, 20], [1e6, 30], [3])
    assert MEDIAN(torch.full((4,), 0.5, dtype=F64), parts).tolist() == [3, 25, 7, 0.5]


@pytest.mark.parametrize(
    ("trim", "want"), [(0.0, (1 + 2 + 3 + 5 + 1e6) / 5), (0.19, (1 + 2 + 3 + 5 + 1e6) / 5), (0.2, 10 / 3), (0.4, 3)]
)
def test_trimmed_mean_by_hand(trim: float, want: float) -> None:
    parts = vectors([1], [5], [2], [1e6], [3])
    combine = combination.scatter_trimmed(combination.trimmed_cut(trim))
    assert combine(torch.zeros(1, dtype=F64), parts).item() == pytest.approx(want, rel=1e-12)


def test_a_share_that_is_a_whole_number_of_devices_is_not_rounded_down() -> None:
    assert [combination.trimmed_cut(0.29)(100), combination.trimmed_cut(0.1)(10), combination.trimmed_cut(0.1)(9)] == [
        29,
        1,
        0,
    ]


def test_rows_are_compared_on_the_global_scale() -> None:
    parts = [
        (torch.tensor([[2.0], [2.0]]), at([0, 1], [0], row_scale=[0.5, 1.0]), 1.0),  # 4 and 2
        (torch.tensor([[3.0], [3.0]]), at([0, 2], [0]), 1.0),
        (torch.tensor([[9.0]]), at([0], [0]), 1.0),
    ]
    assert MEDIAN(torch.zeros(3, 1), parts).tolist() == [[4], [2], [3]]


@given(case=federations(), trim=st.sampled_from([None, 0.0, 0.3, 0.49]), block=st.sampled_from([1, 20, 2**20]))
def test_products_are_those_of_numpy_and_blocks_change_nothing(
    case: tuple[tuple[Tensor, Tensor], list[Update], Tensor], trim: float | None, block: int
) -> None:
    (previous_B, previous_A), updates, _ = case
    before = previous_B @ previous_A
    stacked = np.full((len(updates), *before.shape), np.nan)
    for values, u in zip(stacked, updates, strict=True):
        rows, columns = u.layout[B].index[0].numpy(), u.layout[A].index[1].numpy()
        values[np.ix_(rows, columns)] = (u.params[B] @ u.params[A]).numpy()
    want = before.numpy().copy()
    for j in np.ndindex(*want.shape):
        values = np.sort(stacked[(slice(None), *j)])
        values = values[~np.isnan(values)]
        if len(values):
            k = int(trim * len(values)) if trim is not None else 0
            want[j] = np.median(values) if trim is None else values[k : len(values) - k].mean()
    combine = MEDIAN if trim is None else combination.scatter_trimmed(combination.trimmed_cut(trim))
    whole = flex.combined_products(before, updates, B, A, combine)
    torch.testing.assert_close(whole, torch.from_numpy(want), rtol=1e-10, atol=1e-10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combination, "BLOCK", block)
        in_blocks = flex.combined_products(before, updates, B, A, combine)
    torch.testing.assert_close(in_blocks, whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_the_median_of_products_then_takes_the_best_rank(side: str) -> None:
    generator = np.random.default_rng(0)
    zero = torch.zeros(6, 2, dtype=F64), torch.zeros(2, 7, dtype=F64)
    size = 6 if side == "rows" else 7
    updates = []
    for _ in range(3):
        b, a = noise(generator, 6, 2), noise(generator, 2, 7)
        updates.append(update(b, a, list(range(size)), 1.0, side))
    median = torch.stack([u.params[B] @ u.params[A] for u in updates]).median(0).values
    result = flex.aggregate({B: zero[0], A: zero[1]}, updates, {A: zero[1]}, Combination(MEDIAN))
    U, S, Vh = torch.linalg.svd(median)
    torch.testing.assert_close(result[B] @ result[A], U[:, :2] * S[:2] @ Vh[:2], rtol=1e-9, atol=1e-9)


# -- hostile devices --------------------------------------------------------------------------------------------------


def five_and_one_liar(rule: str) -> tuple[Params, list[Update]]:
    generator = np.random.default_rng(1)
    shared = {A: noise(generator, 2, 4), B: noise(generator, 5, 2)}
    previous = shared | {"head.bias": torch.zeros(3, dtype=F64)}
    place = {
        A: Placement((torch.arange(2), torch.arange(4)), side="embed"),
        B: Placement((torch.arange(5), torch.arange(2)), side="width"),
        "head.bias": Placement((torch.arange(3),)),
    }
    updates = [
        Update({name: theta + 0.01 * noise(generator, *theta.shape) for name, theta in previous.items()}, place, 1.0)
        for _ in range(6)
    ]
    liar = {name: 1e6 * torch.sign(noise(generator, *theta.shape)) for name, theta in previous.items()}
    updates[2] = Update(liar, place, 1e9)  # the number of samples that it claims
    return previous, updates


def after(given: AdapterOptions, previous: Params, updates: list[Update]) -> Params:
    state = ServerState(previous)
    return rules.aggregate(given, PrivacyOptions(), state, updates, previous, 1, np.random.default_rng()).params


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "hetlora"])
@pytest.mark.parametrize("robust", [{"combine": "median"}, {"combine": "trimmed-mean", "trim": 0.2}])
def test_one_liar_is_outvoted_although_it_wrecks_the_mean(rule: str, robust: dict[str, Any]) -> None:
    previous, updates = five_and_one_liar(rule)

    def moved(given: AdapterOptions) -> float:
        params = after(given, previous, updates)
        product = params[B] @ params[A] - previous[B] @ previous[A]
        return max(float(product.abs().max()), float(params["head.bias"].abs().max()))

    assert moved(AdapterOptions(rule=rule)) > 1e5  # type: ignore[arg-type]
    assert moved(AdapterOptions.model_validate({"rule": rule} | robust)) < 0.2


@pytest.mark.parametrize("rule", ["fedit", "ffa", "embed_side"])
def test_clipping_bounds_what_one_liar_can_do(rule: str) -> None:
    previous, updates = five_and_one_liar(rule)
    params = after(AdapterOptions.model_validate({"rule": rule, "clip": 0.5}), previous, updates)
    change = torch.cat([(params[name] - previous[name]).flatten() for name in previous])
    assert 0.4 < change.norm() <= 0.5 + 1e-9


# -- clipping ---------------------------------------------------------------------------------------------------------


def test_clip_by_hand() -> None:
    layout = {"a": at([0, 1]), "b": at([0], [0])}
    received = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[2.0]])}
    params = {"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([[5.0]])}  # changes 0, 4 and 3: norm 5
    clipped = clip_update(params, received, layout, 2.5)
    assert clipped["a"].tolist() == [1, 3] and clipped["b"].tolist() == [[3.5]]
    untouched = clip_update(params, received, layout, 5.0)
    assert all(torch.equal(untouched[name], params[name]) for name in params)


@given(bound=st.floats(1e-3, 10), seed=st.integers(0, 999))
def test_the_norm_on_the_global_scale_is_exactly_the_bound(bound: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = {"b": at([0, 2], [0, 1], row_scale=[0.25, 1.0]), "h": at([0, 1, 2])}
    received, params = (
        {name: torch.randn(place.shape, generator=generator) for name, place in layout.items()} for _ in range(2)
    )

    def norm(values: Params) -> float:
        changes = [to_global_scale(values[n].double() - received[n].double(), layout[n]).flatten() for n in layout]
        return float(torch.cat(changes).norm())

    clipped = clip_update(params, received, layout, bound)
    assert norm(clipped) == pytest.approx(min(bound, norm(params)), rel=1e-12)
    # towards the received values, equally in all coordinates
    ratios = [(clipped[n].double() - received[n]) / (params[n].double() - received[n]) for n in layout]
    flat = torch.cat([ratio.flatten() for ratio in ratios])
    torch.testing.assert_close(flat, flat[0].expand_as(flat), rtol=1e-9, atol=1e-9)


def test_the_result_does_not_depend_on_the_block_size() -> None:
    part = (torch.arange(6.0).view(3, 2), at([1, 4, 5], [0, 2], row_scale=[0.5, 1.0, 1.0]), 2.0)
    rows: Callable[[int, int], Part] = lambda start, stop: combination.rows_of(part, start, stop)  # noqa: E731
    values, placement, weight = rows(0, 5)
    assert values.tolist() == [[0, 2], [2, 3]] and weight == 2
    assert [axis.tolist() for axis in placement.index] == [[1, 4], [0, 2]] and placement.row_scale is None
    assert rows(2, 4)[0].shape == (0, 2) and rows(5, 6)[1].index[0].tolist() == [0]
