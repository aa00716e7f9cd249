"""Differential privacy: the clip bounds what one device can change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tapfl.privacy import clip_to_norm, l2_norm


def test_an_update_is_clipped_as_a_whole() -> None:
    """‖(3, 4), (12)‖ = 13: clipped to 6.5 every value is halved."""
    update = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[12.0]])}
    clipped = clip_to_norm(update, 6.5)
    torch.testing.assert_close(clipped, {"a": torch.tensor([1.5, 2.0]), "b": torch.tensor([[6.0]])})


def test_a_short_update_stays_bit_for_bit() -> None:
    update = {"a": torch.tensor([3.0, 4.0])}
    assert torch.equal(clip_to_norm(update, 5.0)["a"], update["a"])
    assert torch.equal(clip_to_norm({"a": torch.zeros(3)}, 1e-9)["a"], torch.zeros(3))


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    norm=st.floats(1e-6, 1e6),
    cut=st.integers(0, 30),
)
def test_no_update_is_longer_than_the_clip(values: list[float], norm: float, cut: int) -> None:
    update = {"a": torch.tensor(values[:cut]), "b": torch.tensor(values[cut:])}
    clipped = clip_to_norm(update, norm)
    assert l2_norm(clipped) <= norm
    whole, before = torch.cat(list(clipped.values())).double(), torch.tensor(values, dtype=torch.float64)
    expected = before * min(1.0, norm / float(before.norm())) if before.any() else before
    assert whole.numpy() == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-12)
