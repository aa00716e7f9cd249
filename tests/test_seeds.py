"""Random streams: different names give different numbers."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tapfl.seeds import numpy_generator, of_secret, torch_generator

numbers = st.sampled_from([0, 1, 2, 3, 2**32 - 1, 2**32, 2**32 + 1, 2**64, 2**64 + 2**32]) | st.integers(0, 2**70)
names = st.tuples(numbers, st.lists(numbers | st.sampled_from(["metric", "train", "a"]), max_size=6).map(tuple))
METRIC = 2278960867  # CRC-32 of the text


def first(name: tuple[int, tuple]) -> list[int]:
    seed, path = name
    return list(numpy_generator(seed, *path).integers(2**63, size=3))


@given(names, names)
@example((0, ("metric",)), (0, ("metric", 0)))
@example((0, ("metric", 0)), (0, ("metric", 0, 0)))
@example((1, ("train", 2, 0)), (1, ("train", 2, 0, 0)))
@example((0, ()), (0, (0,)))
@example((0, (2**32,)), (0, (0, 1)))
@example((2**32 + 5, ()), (5, (1,)))
@example((0, ("metric", 0)), (0, ("metric", 0, 1, 1, 1, 3, 0, 0)))
@example((0, ("metric", 0)), (0, ("metric", 0, 1, 1, 1, 3)))
def test_other_names_are_other_streams(one: tuple[int, tuple], other: tuple[int, tuple]) -> None:
    assume(one != other)
    assert first(one) != first(other)
    bits = [torch_generator(seed, *path).initial_seed() for seed, path in (one, other)]
    assert bits[0] != bits[1]


@given(names)
def test_a_stream_can_be_drawn_again(name: tuple[int, tuple]) -> None:
    assert first(name) == first(name)


def test_unambiguous_names_keep_their_numbers() -> None:
    for path, words in [(("metric",), [METRIC]), (("metric", 3), [METRIC, 3]), (("metric", 0, 3), [METRIC, 0, 3])]:
        before = np.random.default_rng([7, *words]).integers(2**63, size=3)
        np.testing.assert_array_equal(numpy_generator(7, *path).integers(2**63, size=3), before)


def test_a_secret_is_a_stream_of_its_own() -> None:
    streams = [first((0, ("summary-noise", 0, *of_secret(secret)))) for secret in ("", "a", "b")]
    assert len({tuple(stream) for stream in streams}) == 3
