"""The private mean: every device counts once, changes the sum by at most the clip, and the noise fits the clip."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from strategies.records import DeviceRecord
from strategies.server_app import Federation
from strategies.state import FederationState
from tapfl.adapters import rules
from tapfl.adapters.layout import LORA_A, LORA_B, Placement, Update, gather_all, pack
from tapfl.adapters.rules import ServerState
from tapfl.config import AdapterOptions, PrivacyOptions, RunConfig
from tapfl.profiles import DeviceProfile
from tapfl.seeds import numpy_generator, of_secret
from tapfl.training import Params
from tapfl.wire import TrainReply

A, B = f"fc.{LORA_A}", f"fc.{LORA_B}"
PREVIOUS: Params = {A: torch.full((4, 1000), 0.5), B: torch.full((3000, 4), 0.25), "head.bias": torch.ones(10)}


def device(rows: range, rank: int, change: float, weight: float = 1.0, scale: float = 1.0) -> Update:
    prefix = torch.arange(rank)
    layout = {
        A: Placement((prefix, torch.arange(1000)), side="embed"),
        B: Placement((torch.tensor(rows), prefix), torch.full((len(rows),), scale), "width"),
        "head.bias": Placement((torch.arange(10),)),
    }
    own = {name: theta + change for name, theta in gather_all(PREVIOUS, layout).items()}
    return Update(own, layout, weight)


def change(updates: list[Update], seed: int = 0, rule: str = "fedit", **privacy: Any) -> Params:
    given = AdapterOptions.model_validate({"rule": rule})
    state = ServerState({name: theta.double() for name, theta in PREVIOUS.items()})
    generator = np.random.default_rng(seed)
    after = rules.aggregate(given, PrivacyOptions(**privacy), state, updates, state.params, 1, generator)
    return {name: theta - state.params[name] for name, theta in after.params.items()}


def norm(params: Params) -> float:
    return float(torch.cat([theta.flatten() for theta in params.values()]).norm())


@pytest.mark.parametrize("rule", ["fedit", "ffa", "rolora", "embed_side"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_one_device_moves_the_sum_by_exactly_the_clip(rule: str, scale: float) -> None:
    # with one device per coordinate, the mean is the sum; on the device's own scale it could be 4 times as large
    moved = change([device(range(3000), 4, 7.0, scale=scale)], rule=rule, dp_clip=1.5)
    assert norm(moved) == pytest.approx(1.5, rel=1e-9)


def test_devices_count_once_for_any_number_of_samples() -> None:
    few = change([device(range(3000), 4, 1e-3, 1.0), device(range(3000), 4, -2e-3, 1.0)], dp_clip=10)
    many = change([device(range(3000), 4, 1e-3, 900.0), device(range(3000), 4, -2e-3, 1.0)], dp_clip=10)
    assert all(torch.equal(few[name], many[name]) for name in few)
    torch.testing.assert_close(few[B], torch.full_like(few[B], -5e-4), rtol=1e-4, atol=0)


def test_noise_has_the_size_that_the_accountant_assumes() -> None:
    # rows 0..999 have three holders, 1000..1999 two, others none; in the first rows directions 2 and 3 have one less
    updates = [device(range(2000), 4, 0.0), device(range(2000), 4, 0.0), device(range(1000), 2, 0.0)]
    moved = change(updates, dp_clip=2.0, dp_noise=1.5)
    std = 1.5 * 2.0
    regions = [
        (moved[B][:1000, :2], 3),
        (moved[B][:1000, 2:], 2),
        (moved[B][1000:2000], 2),
        (moved[A][:2], 3),
        (moved[A][2:], 2),
        (moved["head.bias"], 3),
    ]
    sums = [holders * values.flatten() for values, holders in regions]
    for noise in (*sums, torch.cat(sums)):
        assert noise.std().item() == pytest.approx(std, rel=4 / (2 * len(noise)) ** 0.5)
        assert abs(noise.mean().item()) < 4 * std / len(noise) ** 0.5
    assert not moved[B][2000:].any()  # coordinates without a holder reveal nothing


def test_noise_is_drawn_from_the_generator() -> None:
    updates = [device(range(3000), 4, 0.0)]
    first, again, other = (change(updates, seed, dp_clip=1.0, dp_noise=1.0) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    # independent from tensor to tensor
    assert not torch.equal(first[A].flatten()[:10], first["head.bias"])


@pytest.mark.parametrize("secret", ["", "known only to the server"])
def test_the_servers_noise_has_all_bits_of_its_secret(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is numpy's stream of the whole secret; torch uses 32 bits of a seed, which can be tried one by one."""
    monkeypatch.setenv("TAPFL_SECRET", secret)
    options = {"adapters.rule": "fedit", "adapters.head": "mean", "privacy.dp-clip": 1.0, "privacy.dp-noise": 2.0}
    sent, profile = device(range(3000), 4, 0.0), DeviceProfile(budget=0.5, rank=4)
    server: Any = SimpleNamespace(
        config=RunConfig.from_flat(options | {"seed": 7}), adapters=SimpleNamespace(initial={})
    )
    server._upload_layout = lambda *_: sent.layout
    records = {0: DeviceRecord(device=0, profile=profile, train_samples=9)}
    reply = TrainReply(3, 0.0, 0.0, 0.0, np.zeros(0), np.zeros(0), pack(sent.params, sent.layout), loss=0.0)
    state = FederationState(2, ServerState(PREVIOUS), records, {0: ""})
    after = Federation.aggregate(server, state, 3, {0: reply}).server
    generator = numpy_generator(7, "aggregate", 3, *of_secret(secret))
    for name, theta in PREVIOUS.items():
        noise = 2.0 * torch.from_numpy(generator.standard_normal(tuple(theta.shape)))
        torch.testing.assert_close(after.params[name], (theta + noise).float())


def test_noise_is_added_to_the_clipped_mean() -> None:
    updates = [device(range(3000), 4, 1.0), device(range(3000), 4, 0.5)]
    quiet, loud = (change(updates, dp_clip=3.0, dp_noise=z) for z in (0.0, 0.7))
    noise = change([device(range(3000), 4, 0.0), device(range(3000), 4, 0.0)], dp_clip=3.0, dp_noise=0.7)
    for name in quiet:
        torch.testing.assert_close(loud[name], quiet[name] + noise[name], rtol=1e-6, atol=1e-6)


def test_the_tighter_of_both_clips_is_used() -> None:
    given = AdapterOptions(rule="fedit", clip=0.5)
    state = ServerState({name: theta.double() for name, theta in PREVIOUS.items()})
    sent = [device(range(3000), 4, 7.0)]
    after = rules.aggregate(given, PrivacyOptions(dp_clip=2.0), state, sent, state.params, 1, np.random.default_rng())
    assert norm({name: after.params[name] - state.params[name] for name in PREVIOUS}) == pytest.approx(0.5, rel=1e-9)
