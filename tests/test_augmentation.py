"""Random changes of training images: flips and crops, which are the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tapfl.data.augmentation import _part, augmented


def images(n: int = 64, side: int = 12) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(n, 3, side, side)).astype(np.float32))


@pytest.mark.parametrize("how", ["none", "flip", "crop"])
def test_the_same_seed_gives_the_same_images(how: str) -> None:
    first, again, other = (augmented(images(), how, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and first.shape == images().shape and first.dtype == torch.float32
    assert torch.equal(first, other) == (how == "none")
    assert torch.equal(first, images()) == (how == "none")


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_others() -> None:
    x = images()
    y = augmented(x, "flip", np.random.default_rng(0))
    same = (y == x).flatten(1).all(1)
    assert torch.equal(y[~same], x[~same].flip(-1)) and 16 < int(same.sum()) < 48


def test_a_crop_of_a_ramp_is_a_part_of_it() -> None:
    ramp = torch.linspace(0, 1, 32).expand(64, 1, 32, 32).contiguous()
    y = augmented(ramp, "crop", np.random.default_rng(0))
    width = y[:, 0, 16, -1] - y[:, 0, 16, 0]
    assert (width.abs() > 0.55).all() and len(width.sign().unique()) == 2  # of both directions
    assert (y >= 0).all() and (y <= 1).all() and len(width.unique()) > 8


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 999))
def test_a_crop_lies_within_the_image_and_has_the_least_area(height: int, width: int, seed: int) -> None:
    top, left, tall, wide = _part(height, width, np.random.default_rng(seed))
    assert 0 <= top <= height - tall and 0 <= left <= width - wide and tall >= 1 and wide >= 1
    if min(height, width) >= 20:
        assert tall * wide >= 0.4 * height * width
