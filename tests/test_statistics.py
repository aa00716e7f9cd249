"""Paired tests over devices, and what a caption says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.output import caption, command
from experiments.statistics import paired

accuracies = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=8)


@settings(max_examples=30, deadline=None)
@given(accuracies)
def test_the_p_value_is_that_of_all_sign_flips(pairs: list[tuple[int, int]]) -> None:
    values, reference = ({i: pair[side] / 20 for i, pair in enumerate(pairs)} for side in (0, 1))
    differences = np.array([a - b for a, b in pairs])
    flips = np.array(list(itertools.product([1, -1], repeat=len(pairs)))) @ differences
    least_side = min((flips >= differences.sum()).mean(), (flips <= differences.sum()).mean())
    found = paired(values, reference)
    assert found.p == pytest.approx(min(1.0, 2 * least_side))
    assert found.difference == pytest.approx(differences.mean() / 20) and found.n == len(pairs)
    assert paired(reference, values).p == pytest.approx(found.p)


def test_ten_devices_that_all_gain_are_as_sure_as_ten_can_be() -> None:
    values = {i: 0.5 + i / 100 for i in range(10)}
    found = paired(values | {"only here": 0.0}, dict.fromkeys(range(10), 0.4))
    assert found.n == 10 and found.p == pytest.approx(2 / 2**10) and found.difference == pytest.approx(0.145)


def test_many_devices_are_tested_by_drawn_flips_to_the_same_bits() -> None:
    generator = np.random.default_rng(0)
    values = dict(enumerate(generator.normal(size=40)))
    first, again = (paired(values, dict.fromkeys(values, 0.0)) for _ in range(2))
    assert first == again and first.p == pytest.approx(0.6, abs=0.4)
    assert paired({i: v + 3 for i, v in values.items()}, dict.fromkeys(values, 0.0)).p < 1e-3


def test_nothing_in_common_is_an_error_and_no_difference_is_none() -> None:
    with pytest.raises(ValueError, match="no device"):
        paired({0: 0.5}, {1: 0.5})
    assert paired({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}).p == 1.0


def test_a_caption_says_how_it_was_made_and_not_on_which_machine() -> None:
    made_by = command("sweep", "--config", "a/b.toml", "--set", "data.source=/home/me/data/val", "--out", "/tmp/x y")
    assert made_by == "tapfl sweep --config a/b.toml --set data.source=…/val --out '…/x y'"
    assert command("--at", "https://host/x/y", "--set", "a=b/c") == "tapfl --at https://host/x/y --set a=b/c"
    said = caption(made_by, [2, 0], {"torch": "2.6"}, ["digits at 8 px"])
    assert said == f"made by `{made_by}`; seeds 0, 2; digits at 8 px; torch 2.6."
