"""α from held-out images: which images are held out, how α is chosen, and α in federations with known optima."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from personal_problems import of_each
from torch import Tensor
from typer.testing import CliRunner

from experiments import cli
from strategies.records import read_summary
from tapfl.config import AdapterOptions, PersonalizeOptions, RunConfig, TrainOptions
from tapfl.errors import ConfigError
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.held_out import held_out_alpha, hold_out
from tapfl.personalize.method import Personal, local_round
from tapfl.personalize.methods import method_of, never_begins
from tapfl.training import Params

# -- which images -----------------------------------------------------------------------------------------------------


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8).filter(lambda c: sum(c) > 1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_the_two_parts_are_disjoint_complete_and_of_the_given_share(counts: list[int], share: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    trained, held = hold_out(labels, share, np.random.default_rng(seed))
    assert sorted([*trained, *held]) == list(range(len(labels))) and len(trained) >= 1 and len(held) >= 1
    assert len(held) == min(max(1, round(share * len(labels))), len(labels) - 1)
    taken = Counter(labels[held].tolist())
    assert all(abs(taken[label] - share * count) <= 1 for label, count in enumerate(counts))
    again = hold_out(labels, share, np.random.default_rng(seed))
    assert np.array_equal(trained, again[0]) and np.array_equal(held, again[1])


def test_classes_with_few_images_are_spared() -> None:
    labels = np.array([0] * 6 + [1] * 4 + [2, 3])
    _, held = hold_out(labels, 0.25, np.random.default_rng(0))
    assert Counter(labels[held].tolist()) == {0: 2, 1: 1}


def test_other_devices_hold_out_others() -> None:
    labels = np.repeat(np.arange(4), 10)
    assert len({tuple(hold_out(labels, 0.25, np.random.default_rng(seed))[1]) for seed in range(5)}) == 5


# -- what they choose -------------------------------------------------------------------------------------------------

V, W = {"x": torch.ones(1, dtype=torch.float64)}, {"x": torch.zeros(1, dtype=torch.float64)}


def chosen(best: float, images: int, curvature: float = 1.0) -> float:
    """Returns α if the loss of each image is ½ c (α - best)²."""
    return float(held_out_alpha(V, W, [lambda p: (curvature / 2 * (p["x"] - best) ** 2).expand(images)]))


def test_the_formula_by_hand() -> None:
    grid = np.linspace(0, 1, 11)
    p = np.exp(-2 * grid - 3 * 0.5 * 4 * (grid - 0.6) ** 2)
    assert chosen(0.6, images=3, curvature=4) == pytest.approx(float((grid * p).sum() / p.sum()), rel=1e-12)


@pytest.mark.parametrize("best", [0.0, 0.25, 0.5, 1.0])
def test_many_images_choose_the_best_alpha(best: float) -> None:
    assert chosen(best, images=2000) == pytest.approx(best, abs=0.03)


def test_few_images_move_alpha_only_a_little() -> None:
    """One image that slightly favours v moves α slightly; the best value of the grid would be 1."""
    assert chosen(1.0, images=1, curvature=0.1) == pytest.approx(chosen(1.0, images=1, curvature=0.0), abs=0.02)
    alphas = [chosen(1.0, images=n) for n in (1, 4, 16, 64, 256)]
    assert alphas == sorted(alphas) and alphas[0] < 0.5 and alphas[-1] > 0.9


def test_alpha_stays_at_its_prior_if_v_equals_w_and_v_does_not_change() -> None:
    personal = Apfl().weigh(W, Personal(W, torch.tensor(0.9).double()), [lambda p: p["x"].square()])
    assert float(personal.alpha) == pytest.approx(0.31, abs=0.01) and personal.params is W
    assert personal.alpha.dtype == torch.float64 and personal.alpha.dim() == 0


def test_images_in_two_batches_choose_as_in_one_and_without_any_the_prior_does() -> None:
    grid = np.linspace(0, 1, 11)
    prior = float((grid * np.exp(-2 * grid)).sum() / np.exp(-2 * grid).sum())
    assert float(held_out_alpha(V, W, [])) == pytest.approx(prior, rel=1e-12)
    loss = lambda p: ((p["x"] - 0.7) ** 2).expand(5)  # noqa: E731
    assert float(held_out_alpha(V, W, [loss, loss])) == pytest.approx(chosen(0.7, images=10, curvature=2), rel=1e-12)


# -- where α goes -----------------------------------------------------------------------------------------------------

DEVICES, SIZE, ROUNDS = 8, 24, 12
TRAIN = TrainOptions(optimizer="sgd", learning_rate=0.05)


def federation(apart: float, images: int, held_out: bool) -> tuple[float, float]:
    """Returns mean α and mean oracle α of a federation of linear regressions whose optima are `apart` from each other.

    A device has `images` points of which a quarter is held out for α, or none, and α is learnt in training as
    published. The oracle minimises the loss on 500 other points.
    """
    draw = np.random.default_rng(0)
    middle = draw.normal(size=SIZE) / SIZE**0.5
    away = [apart * draw.normal(size=SIZE) / SIZE**0.5 for _ in range(DEVICES)]

    def points(n: int, i: int) -> tuple[Tensor, Tensor]:
        x = draw.normal(size=(n, SIZE))
        return torch.tensor(x), torch.tensor(x @ (middle + away[i]) + 0.5 * draw.normal(size=n))

    def losses(params: Params, batch: object) -> Tensor:
        x, y = batch  # type: ignore[misc]
        return (x @ params["x"] - y) ** 2 / (2 * 0.5**2)

    objective = of_each(lambda params, batch: losses(params, batch).mean())
    kept = images - (images // 4 if held_out else 0)
    data, fresh = [points(images, i) for i in range(DEVICES)], [points(500, i) for i in range(DEVICES)]
    method = Apfl(0.5, "fixed" if held_out else "round", 0.1)
    w: Params = {"x": torch.zeros(SIZE, dtype=torch.float64)}
    personal: list[Personal | None] = [None] * DEVICES
    for t in range(ROUNDS + 1):
        uploads = []
        for i, (x, y) in enumerate(data):
            own = personal[i]
            if own is not None and held_out:
                own = method.weigh(w, own, [lambda p, x=x, y=y: losses(p, (x[kept:], y[kept:]))])  # type: ignore[misc]
            result = local_round(method, objective, w, own, [(x[:kept], y[:kept])] * 8, TRAIN, frozenset("x"))
            uploads.append(result.upload["x"])  # type: ignore[index]
            personal[i] = own if t == ROUNDS else result.personal
        if t < ROUNDS:
            w = {"x": torch.stack(uploads).mean(0)}
    grid = np.linspace(0, 1, 101)
    oracle = [
        grid[np.argmin([float(objective({"x": a * p.params["x"] + (1 - a) * w["x"]}, new)) for a in grid])]
        for p, new in zip(personal, fresh, strict=True)
        if p is not None
    ]
    return float(np.mean([p.mean_alpha for p in personal if p is not None])), float(np.mean(oracle))


FEW, MANY = 12, 100


@pytest.mark.parametrize(
    ("apart", "images", "least", "most"),
    [
        (0.0, FEW, 0.0, 0.2),
        pytest.param(1.0, FEW, 0.25, 0.5, marks=pytest.mark.slow),
        (1.0, 48, 0.5, 0.7),
        pytest.param(2.0, 48, 0.8, 0.9, marks=pytest.mark.slow),
        (5.0, MANY, 0.93, 1.0),
    ],
)
def test_alpha_goes_to_0_where_w_is_better_to_1_where_v_is_and_between_elsewhere(
    apart: float, images: int, least: float, most: float
) -> None:
    alpha, oracle = federation(apart, images, held_out=True)
    assert least <= alpha <= most and alpha == pytest.approx(oracle, abs=0.12)


def test_the_published_rule_trusts_v_where_w_is_better() -> None:
    """The reason that held-out images are the default: v has memorised the training batch."""
    alpha, oracle = federation(0.0, FEW, held_out=False)
    assert oracle < 0.15 and alpha > 0.6


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"alpha-update": "step"}, "accepted with alpha-on=held-out: round, fixed"),
        ({"alpha-per": "layer"}, "accepted with it: alpha-on=train"),
        ({"alpha-on": "test"}, "'held-out' or 'train'"),
        ({"held-out-share": 1.0}, "less than 1"),
        ({"from-round": 0}, "greater than or equal to 1"),
    ],
)
def test_incompatible_options_are_refused(options: dict[str, object], accepted: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_flat({f"personalize.{name}": value for name, value in options.items()})
    (name,) = options
    assert name in str(refused.value) and accepted in str(refused.value) and "\n" not in str(refused.value)


def test_images_are_held_out_only_where_they_choose_alpha() -> None:
    def holds_out(**options: object) -> bool:
        return RunConfig.from_flat(
            {f"personalize.{k.replace('_', '-')}": v for k, v in options.items()}
        ).personalize.holds_out

    assert holds_out() and holds_out(method="apfl", from_round=9)
    assert not holds_out(alpha_on="train") and not holds_out(alpha_update="fixed") and not holds_out(method="ditto")
    assert not holds_out(alpha_update="fixed", alpha_per="layer")


def test_v_begins_as_w_in_the_federations_round() -> None:
    for method in ("apfl", "ditto"):
        options, rule = PersonalizeOptions(method=method, from_round=3), AdapterOptions()
        assert [method_of(options, rule, t).has_local_state for t in (1, 2, 3, 9)] == [
            False,
            False,
            True,
            True,
        ]
        late = method_of(options, rule, 9).init(W, None, TRAIN, frozenset("x"))  # a device that joins in round 9
        assert torch.equal(late.v.params["x"].detach(), W["x"])
    assert never_begins(RunConfig.from_flat({"train.rounds": 4}))
    assert not never_begins(RunConfig.from_flat({"train.rounds": 5}))
    assert not never_begins(RunConfig.from_flat({"train.rounds": 4, "personalize.method": "local"}))
    for method in ("local", "fedavg", "fedavg+finetune"):
        options, rule = PersonalizeOptions(method=method, from_round=3), AdapterOptions()
        assert type(method_of(options, AdapterOptions(), 1)) is type(method_of(options, AdapterOptions(), 9))


# -- whole federations ------------------------------------------------------------------------------------------------

FEW_IMAGES = [
    *("data.public-share=0.2", "metric.size=128", "train.rounds=16", "train.epochs=2", "train.batch=20"),
    "train.evaluate-every=16",
]
ALIKE = ["devices.count=20", "data.partition=iid", "data.test-share=0.75"]
DISJOINT = ["devices.count=5", "data.partition=class-blocks", "data.classes-per-device=2", "data.test-share=0.9375"]


@pytest.mark.slow
def test_on_digits_the_personal_model_is_near_the_shared_one_or_above_it(cache: Path, tmp_path: Path) -> None:
    """18 training images per device, none held out. The published rule loses much of w if all devices are alike."""

    def run(name: str, *options: str) -> tuple[float, float, float]:
        sets = [part for each in [*FEW_IMAGES, *options, f"cache={cache}"] for part in ("--set", each)]
        command = ["run", "--engine", "inprocess", "--no-report", "--out", str(tmp_path / name), *sets]
        done = CliRunner().invoke(cli.app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        summary = read_summary(tmp_path / name)
        alpha = float(np.mean([device.alpha for device in summary.devices]))
        return summary.personal_accuracy, summary.global_accuracy, alpha

    alike, apart = run("alike", *ALIKE), run("apart", *DISJOINT)
    published = run("published", *ALIKE, "personalize.alpha-on=train", "personalize.from-round=1")
    assert [alike[2], apart[2]] == pytest.approx([0.3146] * 2, abs=1e-4) and published[2] > 0.5
    assert alike[0] > alike[1] - 0.02 and apart[0] > apart[1]
    assert published[0] < published[1] - 0.03 and published[0] < alike[0] - 0.03
