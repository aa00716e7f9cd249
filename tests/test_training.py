"""What local training is made of: batches, optimisers, loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tapfl.training import accuracy, batches, optimizer


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


@pytest.mark.parametrize(("name", "step"), [("sgd", 0.5 * 3.0), ("adam", 0.5)])
def test_a_first_step_is_that_of_the_optimiser_that_was_named(name: str, step: float) -> None:
    theta = torch.tensor([1.0, -2.0], requires_grad=True)
    made = optimizer(name, [theta], 0.5)
    theta.grad = torch.full((2,), 3.0)
    made.step()
    torch.testing.assert_close(theta.detach(), torch.tensor([1.0, -2.0]) - step)


def test_accuracy_is_the_share_that_is_right() -> None:
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75
