"""Paired tests over devices, and captions."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.output import caption, command
from experiments.statistics import Paired, as_text, corrected, from_text, holm, image_error, paired

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


def test_ten_devices_that_all_gain_have_the_smallest_p() -> None:
    values = {i: 0.5 + i / 100 for i in range(10)}
    found = paired(values | {"only here": 0.0}, dict.fromkeys(range(10), 0.4))
    assert found.n == 10 and found.p == pytest.approx(2 / 2**10) and found.difference == pytest.approx(0.145)


def test_many_devices_are_tested_reproducibly_by_random_flips() -> None:
    generator = np.random.default_rng(0)
    values = dict(enumerate(generator.normal(size=40)))
    first, again = (paired(values, dict.fromkeys(values, 0.0)) for _ in range(2))
    assert first == again and first.p == pytest.approx(0.6, abs=0.4)
    assert paired({i: v + 3 for i, v in values.items()}, dict.fromkeys(values, 0.0)).p < 1e-3


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4·0.005, 3·0.01, 2·0.03, and for 0.04 at least that
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([0.6, 0.5, 0.01], [1.0, 1.0, 0.03]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_holms_correction_by_hand(p: list[float], expected: list[float]) -> None:
    assert holm(p) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_holms_correction_keeps_the_order_and_never_helps(p: list[float], random: Random) -> None:
    found = holm(p)
    assert all(a <= b <= 1 for a, b in zip(p, found, strict=True))
    assert all(a <= min(1.0, len(p) * b) for a, b in zip(found, p, strict=True))  # no stricter than Bonferroni
    assert all(found[i] <= found[j] for i in range(len(p)) for j in range(len(p)) if p[i] <= p[j])
    assert min(found) == pytest.approx(min(1.0, len(p) * min(p)))
    more = holm([*p, 0.0])[:-1]  # one more test, with a small p
    assert more == pytest.approx(found)
    order = random.sample(range(len(p)), len(p))
    assert holm([p[i] for i in order]) == [found[i] for i in order]


def test_tests_are_corrected_over_those_with_the_same_reference() -> None:
    tests = {"a": Paired(0.1, 0.01, 8), "b": Paired(0.2, 0.03, 8), "c": Paired(0.3, 0.03, 8)}
    found = corrected(tests, {"a": "x", "b": "x", "c": "y"})
    assert {key: test.holm for key, test in found.items()} == {"a": 0.02, "b": 0.03, "c": 0.03}
    assert str(found["a"]) == "+0.100 (p = 0.010, Holm 0.020, n = 8)"
    assert str(Paired(0.1, 0.0001, 8, 0.0002)) == "+0.100 (p < 0.001, Holm < 0.001, n = 8)"
    assert str(tests["b"]) == "+0.200 (p = 0.030, n = 8)"
    assert str(Paired(0.2, 0.03, 8, 0.06, 0.0123)) == "+0.200 ± 0.012 (p = 0.030, Holm 0.060, n = 8)"


@given(st.lists(st.booleans(), max_size=40))
def test_correctly_classified_images_round_trip_as_text(right: list[bool]) -> None:
    assert from_text(as_text(right)).tolist() == right


def test_the_error_over_images_by_hand() -> None:
    one = np.array([1, 0, 0, -1])  # variance 2/3, of the mean 1/6
    assert image_error({"a": [one]}) == pytest.approx(np.sqrt(1 / 6))
    assert image_error({"a": [one, one]}) == pytest.approx(np.sqrt(1 / 6))  # another seed, the same images
    assert image_error({"a": [one], "b": [0 * one]}) == pytest.approx(np.sqrt(1 / 6) / 2)
    assert image_error({i: [one] for i in range(4)}) == pytest.approx(np.sqrt(1 / 24))


def test_nothing_in_common_is_an_error_and_no_difference_is_none() -> None:
    with pytest.raises(ValueError, match="no device"):
        paired({0: 0.5}, {1: 0.5})
    assert paired({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}).p == 1.0


def test_a_caption_names_the_command_but_not_the_machine() -> None:
    made_by = command("sweep", "--config", "a/b.toml", "--set", "data.source=/home/me/data/val", "--out", "/tmp/x y")
    assert made_by == "tapfl sweep --config a/b.toml --set data.source=…/val --out '…/x y'"
    assert command("--at", "https://host/x/y", "--set", "a=b/c") == "tapfl --at https://host/x/y --set a=b/c"
    said = caption(made_by, [2, 0], {"torch": "2.6"}, ["digits at 8 px"])
    assert said == f"made by `{made_by}`; seeds 0, 2; digits at 8 px; torch 2.6."
