"""Parts of local training: batches, optimisers, loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tapfl.config import TrainOptions
from tapfl.errors import ModelError
from tapfl.training import (
    accuracy,
    batches,
    images_seen,
    is_evaluated,
    local_batches,
    optimizer,
    rate_factor,
    train_dense,
)


@given(size=st.integers(1, 50), batch=st.integers(1, 60), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_epoch_sees_every_image_once(size: int, batch: int, epochs: int, seed: int) -> None:
    found = list(batches(size, batch, epochs, np.random.default_rng(seed)))
    an_epoch = -(-size // batch)
    assert len(found) == epochs * an_epoch
    for epoch in range(epochs):
        parts = found[epoch * an_epoch : (epoch + 1) * an_epoch]
        assert sorted(np.concatenate(parts).tolist()) == list(range(size))
        lengths = [len(part) for part in parts]
        assert max(lengths) <= batch and max(lengths) - min(lengths) <= 1


def after_two_steps(**values: object) -> torch.Tensor:
    """Returns (1, -2) after two steps with rate 0.5 and a gradient of 3."""
    theta = torch.tensor([1.0, -2.0], requires_grad=True)
    made = optimizer(TrainOptions.model_validate(values), [theta], 0.5)
    for _ in range(2):
        theta.grad = torch.full((2,), 3.0)
        made.step()
    return theta.detach()


@pytest.mark.parametrize(
    ("values", "change"),
    [({"optimizer": "sgd"}, 3.0), ({"optimizer": "sgd", "momentum": 0.5}, 3.75), ({"optimizer": "adam"}, 1.0)],
    ids=["sgd", "momentum", "adam"],
)
def test_steps_are_those_of_the_named_optimiser(values: dict, change: float) -> None:
    torch.testing.assert_close(after_two_steps(**values), torch.tensor([1.0, -2.0]) - change)


def test_weight_decay_is_in_the_gradient_of_sgd_and_decoupled_in_adamw() -> None:
    theta = torch.tensor([1.0, -2.0])
    sgd = after_two_steps(optimizer="sgd", weight_decay=0.2)
    torch.testing.assert_close(sgd, (theta * 0.9 - 1.5) * 0.9 - 1.5)
    adamw = after_two_steps(optimizer="adamw", weight_decay=0.2)
    torch.testing.assert_close(adamw, (theta * 0.9 - 0.5) * 0.9 - 0.5)


@given(size=st.integers(1, 40), batch=st.integers(1, 20), steps=st.integers(1, 30), epochs=st.integers(1, 3))
def test_a_round_has_its_steps_or_its_epochs(size: int, batch: int, steps: int, epochs: int) -> None:
    by_steps = TrainOptions(batch=batch, steps=steps, epochs=epochs)
    drawn = list(local_batches(size, by_steps, np.random.default_rng(0)))
    assert len(drawn) == steps and images_seen(size, by_steps) == pytest.approx(steps * size / -(-size // batch))
    by_epochs = TrainOptions(batch=batch, epochs=epochs)
    whole = list(local_batches(size, by_epochs, np.random.default_rng(0)))
    assert sum(map(len, whole)) == images_seen(size, by_epochs) == epochs * size
    for left, right in zip(drawn, whole, strict=False):
        np.testing.assert_array_equal(left, right)


def test_learning_rates_warm_up_and_follow_the_schedule() -> None:
    def factors(schedule: str, warm_up: int) -> list[float]:
        options = TrainOptions(rounds=6, schedule=schedule, warmup_rounds=warm_up)
        return [rate_factor(options, t) for t in range(1, 8)]

    assert factors("constant", 0) == [1.0] * 7
    assert factors("constant", 2) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1])
    assert factors("linear", 2) == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0.25])
    assert factors("cosine", 2) == pytest.approx([1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447, 0.146447], abs=1e-6)


@given(st.integers(1, 12), st.integers(0, 11), st.sampled_from(["constant", "linear", "cosine"]))
def test_learning_rates_stay_above_0_and_never_rise_after_warm_up(rounds: int, warm_up: int, schedule: str) -> None:
    if warm_up >= rounds:
        with pytest.raises(ValueError, match="warmup-rounds"):
            TrainOptions(rounds=rounds, warmup_rounds=warm_up)
        return
    options = TrainOptions(rounds=rounds, schedule=schedule, warmup_rounds=warm_up)
    factors = [rate_factor(options, t) for t in range(1, rounds + 2)]
    assert all(0 < factor <= 1 for factor in factors) and factors[warm_up] == 1
    assert factors[warm_up:] == sorted(factors[warm_up:], reverse=True) and factors[-1] == factors[-2]


def test_devices_evaluate_before_the_first_round_and_after_every_so_many() -> None:
    options = TrainOptions(evaluate_every=3)
    assert [t for t in range(8) if is_evaluated(options, t)] == [0, 3, 6]


def test_accuracy_is_the_share_of_correct_predictions() -> None:
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


def trained_at(learning_rate: float, epochs: int = 4) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=generator), torch.arange(40) % 4
    model = torch.nn.Linear(6, 4)
    how = {"epochs": epochs, "batch": 10, "learning_rate": learning_rate, "generator": np.random.default_rng(0)}
    train_dense(model, lambda index: x[torch.from_numpy(index)], y, name="head", **how)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(
    ("learning_rate", "epochs", "said"),
    [
        (1e30, 4, r"model\.learning-rate = 1e\+30: head diverged at step \d of 16 \(its loss is (nan|inf)"),
        (1e4, 4, r"model\.learning-rate = 10000: head diverged at step 16 of 16 \(its weights reach \d"),
        (100, 4, r"model\.learning-rate = 100: head diverged at step 16 of 16 \(its loss is .*guessing is 1\.39"),
    ],
)
def test_training_that_diverges_says_at_which_step_and_what_to_lower(
    learning_rate: float, epochs: int, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        trained_at(learning_rate, epochs)


def test_bad_training_has_not_diverged() -> None:
    """A rate at which nothing is learnt, and no training at all, are valid results."""
    for learning_rate, epochs in ((1.0, 2), (1e-9, 1), (1e30, 0)):
        assert all(bool(tensor.isfinite().all()) for tensor in trained_at(learning_rate, epochs).parameters())


def test_weights_that_the_last_step_made_invalid_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def ruin(self: torch.optim.AdamW) -> None:
        self.param_groups[0]["params"][0].data.fill_(torch.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    x = torch.zeros(4, 2)
    with pytest.raises(ModelError, match=r"training diverged at step 1 of 1 \(its weights reach inf\)"):
        train_dense(
            torch.nn.Linear(2, 3),
            lambda index: x[torch.from_numpy(index)],
            torch.zeros(4, dtype=torch.long),
            epochs=1,
            batch=4,
            learning_rate=1e-3,
            generator=np.random.default_rng(0),
        )
