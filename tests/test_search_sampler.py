"""BOHB's brackets, densities and sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase
from optuna.trial import FrozenTrial

from experiments.search.sampler import (
    BOHBSampler,
    Density,
    best_candidate,
    impute,
    split_counts,
    violation_key,
)
from experiments.search.schedule import bracket_tables, cost
from experiments.search.space import decode, encode, uniform

TO_27 = [
    [(27, 1), (9, 3), (3, 9), (1, 27)],
    [(12, 3), (4, 9), (1, 27)],
    [(6, 9), (2, 27)],
    [(4, 27)],
]
TO_9 = [[(9, 1), (3, 3), (1, 9)], [(5, 3), (1, 9)], [(3, 9)]]


@pytest.mark.parametrize(("b_max", "tables", "rounds"), [(27, TO_27, 357), (9, TO_9, 69)])
def test_brackets_are_those_of_the_paper(b_max: int, tables: list, rounds: int) -> None:
    found = bracket_tables(1, b_max, 3)
    assert [list(bracket) for bracket in found] == tables
    assert sum(cost(bracket) for bracket in found) == rounds


@given(st.integers(1, 5), st.integers(1, 200), st.floats(2, 5))
def test_budgets_in_rounds_grow(b_min: int, more: int, eta: float) -> None:
    for bracket in bracket_tables(b_min, b_min + more, eta):
        rounds = [rounds for _, rounds in bracket]
        counts = [count for count, _ in bracket]
        assert rounds == sorted(set(rounds)) and rounds[0] >= b_min and rounds[-1] == b_min + more
        assert counts == sorted(counts, reverse=True) and counts[-1] >= 1


# -- densities: two numbers and a category of three ------------------------------------------------------------------

POINTS = np.array([[0.2, 0.5, 0], [0.4, 0.5, 0], [0.6, 0.5, 2], [0.8, 0.5, 1]])
CHOICES = np.array([0, 0, 3])


def test_bandwidths_by_hand() -> None:
    factor = 1.06 * 4 ** (-1 / 7)
    # σ of 0.2 … 0.8 is √0.05; the second never moves; shares ½, ¼, ¼ give √(½ (¼ + 3/16 + 3/16))
    expected = [factor * math.sqrt(0.05), 1e-3, factor * math.sqrt(0.3125)]
    np.testing.assert_allclose(Density.fit(POINTS, CHOICES).bandwidths, expected, rtol=1e-12)
    np.testing.assert_allclose(expected, [0.19444, 1e-3, 0.48610], atol=1e-5)


def test_a_categorys_bandwidth_is_at_most_even() -> None:
    two = Density.fit(np.array([[0.0], [1.0]]), np.array([2]))
    assert two.bandwidths[0] == pytest.approx(1.06 * 0.5 * 2 ** (-1 / 5)) and two.bandwidths[0] < 0.5
    wide = Density(np.array([[0.0]]), np.array([0.5]), np.array([2]))
    assert wide.log_pdf(np.array([[0.0], [1.0]])) == pytest.approx([math.log(0.5)] * 2)


def naive(density: Density, x: np.ndarray) -> float:
    total = 0.0
    for point in density.points:
        kernel = 1.0
        for j, (a, b, h, c) in enumerate(zip(x, point, density.bandwidths, density.choices, strict=True)):
            assert j < 3
            if c:
                kernel *= 1 - h if a == b else h / (c - 1)
            else:
                kernel *= math.exp(-0.5 * ((a - b) / h) ** 2) / (h * math.sqrt(2 * math.pi))
        total += kernel
    return total / len(density.points)


def test_the_density_is_the_loop_over_points_and_parameters() -> None:
    density = Density.fit(POINTS, CHOICES)
    at = np.array(list(product([0.1, 0.5, 0.9], [0.499, 0.502], [0.0, 1.0, 2.0])))
    np.testing.assert_allclose(np.exp(density.log_pdf(at)), [naive(density, x) for x in at], rtol=1e-10)


def test_candidates_are_around_the_points_and_in_the_cube() -> None:
    density = Density(np.array([[0.0, 0.5, 1]]), np.array([0.1, 0.01, 0.1]), CHOICES)
    drawn = density.draw(4000, np.random.default_rng(0))
    assert drawn[:, :2].min() >= 0 and drawn[:, :2].max() <= 1
    # a half-normal with three bandwidths has its mean at 0.3 √(2 / π)
    assert drawn[:, 0].mean() == pytest.approx(0.3 * math.sqrt(2 / math.pi), abs=0.01)
    assert drawn[:, 1].std() == pytest.approx(0.03, rel=0.05)
    shares = np.bincount(drawn[:, 2].astype(int), minlength=3) / len(drawn)
    assert shares == pytest.approx([0.15, 0.7, 0.15], abs=0.03)


def test_the_candidate_with_the_largest_ratio_is_taken() -> None:
    good, bad = Density.fit(POINTS, CHOICES), Density.fit(1 - POINTS[:, :1] * [1, 1, 0] * 0.5, CHOICES)
    candidates = good.draw(64, np.random.default_rng(3))
    ratios = [naive(good, x) / naive(bad, x) for x in candidates]
    np.testing.assert_array_equal(
        best_candidate(good, bad, np.random.default_rng(3)), candidates[int(np.argmax(ratios))]
    )


@pytest.mark.parametrize(("n", "d", "good", "bad"), [(8, 5, 6, 6), (27, 5, 6, 21), (100, 5, 15, 85), (5, 2, 3, 3)])
def test_numbers_of_good_and_bad_configurations(n: int, d: int, good: int, bad: int) -> None:
    assert split_counts(n, d) == (good, bad)


def test_missing_parameters_are_imputed_from_good_configurations() -> None:
    good = np.array([[0.1, math.nan, math.nan], [0.2, 0.7, math.nan]])
    both = np.vstack([good, [[0.9, math.nan, math.nan]]])
    filled = impute(both, good, np.full((3, 3), 0.25), np.random.default_rng(0))
    np.testing.assert_array_equal(filled, [[0.1, 0.7, 0.25], [0.2, 0.7, 0.25], [0.9, 0.7, 0.25]])


@given(st.integers(0, 2**32))
def test_coordinates_and_values_are_inverse(seed: int) -> None:
    space = {
        "float": FloatDistribution(-2, 5),
        "log": FloatDistribution(1e-6, 10, log=True),
        "step": FloatDistribution(0, 1, step=0.25),
        "int": IntDistribution(3, 9, step=2),
        "log int": IntDistribution(1, 100, log=True),
        "category": CategoricalDistribution(["a", "b", "c"]),
    }
    internal = decode(space, uniform(space, 20, np.random.default_rng(seed)))
    assert all(x._contains(value) for j, x in enumerate(space.values()) for value in internal[:, j])
    np.testing.assert_allclose(decode(space, encode(space, internal)), internal)


# -- the sampler ------------------------------------------------------------------------------------------------------


class OverAnySpace(BOHBSampler):
    """A sampler for Optuna's own tests, which bring their spaces: it draws the parameters that all trials have."""

    def __init__(self) -> None:
        super().__init__(seed=1, space={})

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        self.space = intersection_search_space(study.get_trials(deepcopy=False))
        return super().infer_relative_search_space(study, trial)


class TestConformance(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return OverAnySpace


SPACE = {"x": FloatDistribution(0, 1), "kind": CategoricalDistribution(["a", "b", "c"])}


def study_of(values: dict[int, list[float]], **options: object) -> optuna.Study:
    """Returns a study with trials x = 0, 1/n, … and an intermediate value for each budget."""
    study = optuna.create_study(sampler=BOHBSampler(seed=0, space=SPACE, random_share=0, **options))  # type: ignore[arg-type]
    n = max(len(found) for found in values.values())
    for i in range(n):
        study.add_trial(
            optuna.create_trial(
                params={"x": i / n, "kind": "abc"[i % 3]},
                distributions=SPACE,
                intermediate_values={budget: found[i] for budget, found in values.items() if i < len(found)},
                value=0.0,
            )
        )
    return study


def drawn(study: optuna.Study, n: int = 30) -> list[float]:
    found = []
    for _ in range(n):
        trial = study.ask()
        found.append(trial.suggest_float("x", 0, 1))
        assert trial.suggest_categorical("kind", ["a", "b", "c"]) in "abc"
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return found


def test_the_largest_budget_with_enough_observations_is_the_model() -> None:
    low_is_good = [i / 40 for i in range(40)]
    high_is_good = [-value for value in low_is_good]
    assert np.median(drawn(study_of({1: low_is_good}))) < 0.35
    both = {1: low_is_good, 3: high_is_good}
    assert np.median(drawn(study_of(both))) > 0.65
    # N_min + 2 = 5 with two parameters: four are not enough
    assert np.median(drawn(study_of({1: low_is_good, 3: high_is_good[:4]}))) < 0.35


def test_failed_ones_are_bad_and_constraints_come_first() -> None:
    values = [math.nan if i < 20 else i / 40 for i in range(40)]
    assert np.median(drawn(study_of({1: values}))) > 0.4
    study = study_of({1: [i / 40 for i in range(40)]})
    for trial in study.get_trials(deepcopy=False):
        trial.user_attrs[violation_key(1)] = 1.0 if trial.number < 20 else 0.0
    assert np.median(drawn(study)) > 0.4


def with_failed(study: optuna.Study, values: list[dict[int, float]], x: float = 0.9) -> optuna.Study:
    """Adds failed trials with these intermediate values."""
    for found in values:
        params = {"x": x, "kind": "a"}
        state = optuna.trial.TrialState.FAIL
        study.add_trial(optuna.create_trial(params=params, distributions=SPACE, intermediate_values=found, state=state))
    return study


LOW_IS_GOOD = [i / 40 for i in range(40)]


@pytest.mark.parametrize("reported", [{1: math.nan}, {1: math.inf}, {1: -math.inf}])
@pytest.mark.parametrize("count", [4, 5, 20])
def test_failed_trials_do_not_turn_the_model_off(reported: dict[int, float], count: int) -> None:
    assert np.median(drawn(with_failed(study_of({1: LOW_IS_GOOD}), [reported] * count))) < 0.35


def test_a_budget_at_which_too_few_succeeded_is_no_model() -> None:
    """With two parameters, the density of the good ones needs at least three that succeeded."""
    for succeeded in (2, 3):
        study = study_of({1: LOW_IS_GOOD, 3: [math.nan] * 30 + [-1.0] * succeeded})  # x of 0.75 or more at budget 3
        assert (np.median(drawn(study)) > 0.65) == (succeeded == 3)


def test_results_that_a_trial_does_not_see_have_no_effect() -> None:
    values = [i / 40 for i in range(40)]
    blind = study_of({1: values}, sees=lambda number, other, budget: False)
    empty = optuna.create_study(sampler=BOHBSampler(seed=0, space=SPACE, random_share=0))
    for _ in range(40):
        empty.add_trial(optuna.create_trial(state=optuna.trial.TrialState.RUNNING))
    assert drawn(blind, 5) == drawn(empty, 5)


def test_the_same_history_gives_the_same_draw_and_another_number_another() -> None:
    first, second = (study_of({1: [i / 40 for i in range(40)]}) for _ in range(2))
    assert (found := drawn(first, 5)) == drawn(second, 5) and len(set(found)) == 5


def test_a_conditional_parameter_is_modelled_where_it_exists() -> None:
    space = SPACE | {"only-a": FloatDistribution(0, 1)}
    study = optuna.create_study(sampler=BOHBSampler(seed=0, space=space, random_share=0))
    for i in range(30):
        params = {"x": i / 30, "kind": "abc"[i % 3]} | ({"only-a": 0.9} if i % 3 == 0 else {})
        distributions = {name: space[name] for name in params}
        loss = 0.0 if i % 3 == 0 else 1.0
        study.add_trial(
            optuna.create_trial(
                params=params, distributions=distributions, value=loss, intermediate_values={1: loss + i / 1e3}
            )
        )
    found = []
    for _ in range(20):
        trial = study.ask()
        if trial.suggest_categorical("kind", ["a", "b", "c"]) == "a":
            found.append(trial.suggest_float("only-a", 0, 1))
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert len(found) > 12 and np.median(np.abs(np.array(found) - 0.9)) < 0.1
