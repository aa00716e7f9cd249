"""Recorded and replayed training steps give the same bits, for one device and for several together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from backbones import Tiny
from recording import Recording
from test_together import task

from tapfl.adapters.stack import flat
from tapfl.compute import Compute, Recorder
from tapfl.config import ComputeOptions, TrainOptions
from tapfl.errors import ConfigError
from tapfl.personalize import method as methods_module
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.fedala import FedAla
from tapfl.personalize.method import LocalResult, Method
from tapfl.personalize.methods import FedAvg, FineTune, Local
from tapfl.personalize.proximal import Ditto, FedProx
from tapfl.personalize.together import LocalTask, all_of

STEADY: dict[str, Method[Any]] = {
    "fedavg": FedAvg(),
    "local": Local(1e-3),
    "finetune": FineTune(2e-3),
    "ditto": Ditto(0.1, 2.0),
    "fedprox": FedProx(0.1, 2.0),
    "apfl": Apfl(0.3, "round"),
    "apfl, α at each step": Apfl(0.3, "step"),
    "apfl, α fixed": Apfl(0.3, "fixed"),
}
SIZES = (4, 3, 4, 4, 3, 4, 2, 4)  # a frequent shape, one that is too rare to be recorded, and one that comes once


@pytest.fixture(autouse=True)
def _worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_module, "WORTH", 1)


def assert_same(got: object, want: object) -> None:
    assert isinstance(got, LocalResult) and isinstance(want, LocalResult)
    assert got.loss == want.loss
    pairs = [(got.upload, want.upload)]
    if want.personal:
        assert got.personal and torch.equal(got.personal.alpha, want.personal.alpha)
        pairs.append((got.personal.params, want.personal.params))
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(flat(mine), flat(theirs or {}))


def round_of(backbone: Tiny, method: Method[Any], train: TrainOptions, recorder: Recorder | None) -> LocalTask:
    made = partial(task, backbone, method, train, seed=1, kept={}, rank=2, informed=True)
    return replace(made(sizes=SIZES), recorder=recorder)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((name, "adam") for name in STEADY), ("fedavg", "sgd"), ("apfl, α at each step", "sgd")],
)
def test_a_recorded_step_gives_the_same_bits(name: str, optimizer: str, vit: Tiny) -> None:
    momentum = 0.9 if optimizer == "sgd" else 0.0
    train = TrainOptions(optimizer=optimizer, momentum=momentum, clip_gradient=0.05)
    recording = Recording()
    got = round_of(vit, STEADY[name], train, recording).alone()
    assert (recording.recorded, recording.replayed) == (1, 3)  # the fourth batch of four images, and those after it
    assert_same(got, round_of(vit, STEADY[name], train, None).alone())


@pytest.mark.parametrize("name", ["fedavg", "apfl"])
def test_devices_together_are_recorded_as_one(name: str, vit: Tiny) -> None:
    def tasks(recorder: Recorder | None) -> list[LocalTask]:
        other = task(vit, STEADY[name], TrainOptions(), seed=2, kept={}, rank=1, sizes=(4,) * 6)
        own = task(vit, STEADY[name], TrainOptions(), seed=3, kept={}, rank=3, sizes=(4, 3, 4, 4))
        return [replace(each, recorder=recorder) for each in (own, other)]

    recording = Recording()
    for got, want in zip(all_of(tasks(recording)), all_of(tasks(None)), strict=True):
        assert_same(got, want)
    assert (recording.recorded, recording.replayed) == (1, 4)


def test_steps_that_cannot_be_recorded_or_are_rare_are_not(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording()
    round_of(vit, FedAla(), TrainOptions(), recording).alone()
    monkeypatch.setattr(methods_module, "WORTH", len(SIZES) + 1)
    round_of(vit, FedAvg(), TrainOptions(), recording).alone()
    assert recording.recorded == 0


class Branching(FedAvg):
    """Not steady: it reads its loss."""

    def step(self, state: Any, objective: Any, batch: object) -> torch.Tensor:
        loss = super().step(state, objective, batch)
        return loss if float(loss.detach()) > 0 else -loss


def test_the_stand_in_refuses_what_a_gpu_refuses(vit: Tiny) -> None:
    with pytest.raises(RuntimeError, match="_local_scalar_dense: not permitted when a stream is capturing"):
        round_of(vit, Branching(), TrainOptions(), Recording()).alone()


class Rebinding(FedAvg):
    """Not steady: it counts the steps in Python."""

    def step(self, state: Any, objective: Any, batch: object) -> torch.Tensor:
        object.__setattr__(self, "count", getattr(self, "count", 0) + 1)
        return super().step(state, objective, batch) * self.count


def test_the_stand_in_replays_operations_but_not_python(vit: Tiny) -> None:
    train = TrainOptions()
    recorded = round_of(vit, Rebinding(), train, Recording()).alone()
    assert recorded.loss != round_of(vit, Rebinding(), train, None).alone().loss


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_graphs_without_a_gpu_are_refused(device: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=f"compute.graphs = true: compute.device = '{device}' is the CPU; accepted:"):
        Compute.of(ComputeOptions(device=device, graphs=True))
    assert Compute().recorder is None
