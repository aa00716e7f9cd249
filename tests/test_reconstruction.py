"""Reconstruction: gradient steps on a pruned branch never increase its error on held-out images."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from backbones import Tiny, random_kept
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compensation import images, refitted, sequential
from torch import Tensor, nn

from tapfl.errors import ModelError
from tapfl.pruning import reconstruction
from tapfl.pruning.reconstruction import Call, reconstruct
from tapfl.training import apart

THIRTY_STEPS = {"compensation": "reconstruction", "compensation_steps": 30, "compensation_learning_rate": 3e-3}


def alike(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def calls_of(y: Tensor, target: Tensor, batch: int) -> list[Call]:
    parts = zip(y.split(batch), target.split(batch), strict=True)
    return [Call(len(a), ((a,), {}), t, torch.ones(t.shape[:2]).flatten()) for a, t in parts]


def test_one_step_by_hand() -> None:
    """One weight, three images with one token, the last one held out: Adam's first step equals the learning rate."""
    branch = nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(branch.weight, 1.0)
    y = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    before, after = reconstruct(branch, calls_of(y, 2 * y, 2), steps=1, learning_rate=0.5)
    assert branch.weight.item() == pytest.approx(1.5) and not branch.weight.requires_grad
    assert (before, after) == (pytest.approx(9.0), pytest.approx(2.25))  # (3 w - 6)²


def test_rows_are_weighted() -> None:
    branch = nn.Linear(1, 1, bias=False)
    y, target = torch.ones(4, 2, 1), torch.tensor([3.0, -1.0]).view(1, 2, 1).expand(4, 2, 1)
    weights = torch.tensor([1.0, 0.0]).repeat(4)  # the second token of every image has zero weight
    before, after = reconstruct(branch, [Call(4, ((y,), {}), target, weights)], steps=200, learning_rate=0.1)
    assert branch.weight.item() == pytest.approx(3.0, abs=0.05) and after < 0.01 < before


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(1e-4, 10), st.integers(1, 25), st.integers(2, 12))
def test_the_held_out_error_never_rises(seed: int, rate: float, steps: int, count: int) -> None:
    """This holds for any rate, and if the targets are noise; then the branch does not change."""
    generator = torch.Generator().manual_seed(seed)
    y, target = (torch.randn(count, 2, 3, generator=generator) for _ in range(2))
    branch = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3)).requires_grad_(False)
    given = copy.deepcopy(branch)
    before, after = reconstruct(branch, calls_of(y, target, 5), steps, rate)
    held = apart(count, reconstruction.HELD_OUT, "")[1]
    errors = [float((each(y[held]) - target[held]).square().mean()) for each in (given, branch)]
    assert after <= before and (before, after) == pytest.approx(errors, rel=1e-5)
    assert after < before or alike(given, branch)


@given(st.integers(2, 400), st.floats(0.001, 0.999))
def test_the_held_out_images_are_a_share_spread_evenly(count: int, share: float) -> None:
    trained, held = apart(count, share, "")
    assert sorted([*trained, *held]) == list(range(count)) and len(trained) and len(held)
    assert len(held) == min(max(round(count * share), 1), count - 1)
    gaps = np.diff([-1, *held])
    assert gaps.max() - gaps.min() <= 1 and held[-1] == count - 1


def test_one_image_is_too_few_to_train_and_judge(vit: Tiny) -> None:
    with pytest.raises(ModelError, match="reconstruction needs at least two images"):
        refitted(vit.model, random_kept(vit.layers, 0.5), vit.inputs[:1], 1, **THIRTY_STEPS)


def test_a_rate_that_diverges_is_named() -> None:
    y = torch.full((6, 1, 1), 1e18)
    with pytest.raises(
        ModelError, match=r"pruning\.compensation-learning-rate = 1e\+30: reconstruction diverged at step 2"
    ):
        reconstruct(nn.Linear(1, 1), calls_of(y, y, 6), steps=3, learning_rate=1e30)


@pytest.mark.parametrize("family", ["vit", pytest.param("deit", marks=pytest.mark.slow), "swin"])
def test_every_branch_is_judged_on_its_input_in_the_pruned_model(
    family: str, small_families: dict[str, Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors are those of r = f(x') - f'(x') + γ drift, and the whole model is closer to the dense one."""
    backbone, errors = small_families[family], []

    def watched(branch: nn.Module, calls: Sequence[Call], steps: int, rate: float) -> tuple[float, float]:
        errors.append(reconstruct(branch, calls, steps, rate))
        return errors[-1]

    monkeypatch.setattr("tapfl.pruning.compensation.reconstruct", watched)
    fitted, kept = images(backbone, 100), random_kept(backbone.layers, 0.4)
    given = (backbone.model, kept, fitted, 30)  # a last batch that is not full
    small = refitted(*given, **THIRTY_STEPS)
    assert len(errors) == len(backbone.layers) and all(after <= before for before, after in errors)
    assert sum(after < before for before, after in errors) >= len(errors) / 2
    plain = sequential(*given)
    with torch.no_grad():
        apart_of = [float((each(fitted) - backbone.model(fitted)).square().mean()) for each in (small, plain)]
    assert apart_of[0] < apart_of[1]
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    torch.manual_seed(3)
    again = refitted(*given, **THIRTY_STEPS)  # the same bits for any state of torch's global generator
    assert alike(small, again)
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_layers_that_lose_no_unit_do_not_change(vit: Tiny) -> None:
    kept = {"blocks.0.mlp": random_kept(vit.layers, 0.5)["blocks.0.mlp"]}
    small = refitted(vit.model, kept, vit.inputs, 3, **THIRTY_STEPS)
    changed = {name for name, tensor in small.state_dict().items() if not _same(tensor, vit.model.state_dict()[name])}
    assert changed == {f"blocks.0.mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
