"""The methods that people compare APFL with, each against its publication's formula in plain numbers.

The model has three numbers, one pair of factors and a head: f(a, b, h; x, y) = ½ (h b a x - y)², with s = 2 in the
distance of effective weights, d = ½ s² (b a - b' a')² + ½ (h - h')².
"""

from __future__ import annotations

import pytest
import torch

from tapfl.config import TrainOptions
from tapfl.personalize.body_head import FedRep
from tapfl.personalize.method import LocalResult, Method, Personal, local_round
from tapfl.personalize.perfedavg import PerFedAvg
from tapfl.personalize.proximal import FedProx, PFedMe
from tapfl.training import Params

Numbers = tuple[float, float, float]  # a, b, h
Pair = tuple[float, float]  # x, y

NAMES = ("fc.lora_A", "fc.lora_B", "head.weight")
START: Numbers = (0.7, -0.4, 1.3)
BATCHES: list[Pair] = [(1.0, 0.8), (-0.5, 1.1), (2.0, -0.3), (0.4, 0.9)]
SCALE, RATE = 2.0, 0.05
TRAIN = TrainOptions(optimizer="sgd", learning_rate=RATE, epochs=2, steps=4)


def params(numbers: Numbers) -> Params:
    return {name: torch.tensor([[x]], dtype=torch.float64) for name, x in zip(NAMES, numbers, strict=True)}


def numbers(found: Params | None) -> Numbers:
    assert found is not None
    a, b, h = (float(found[name]) for name in NAMES)
    return a, b, h


def loss(p: Params, batch: object) -> torch.Tensor:
    x, y = batch  # type: ignore[misc]
    a, b, h = (p[name] for name in NAMES)
    return ((h * b * a * x - y) ** 2).sum() / 2


def gradient(p: Numbers, batch: Pair) -> Numbers:
    (a, b, h), (x, y) = p, batch
    r = h * b * a * x - y
    return r * h * b * x, r * h * a * x, r * b * a * x


def pull(p: Numbers, to: Numbers) -> Numbers:
    """∂d(p, to)/∂p."""
    (a, b, h), (a0, b0, h0) = p, to
    D = SCALE**2 * (b * a - b0 * a0)
    return D * b, D * a, h - h0


def moved(p: Numbers, rate: float, direction: Numbers) -> Numbers:
    a, b, h = (x - rate * g for x, g in zip(p, direction, strict=True))
    return a, b, h


def plus(one: Numbers, factor: float, other: Numbers) -> Numbers:
    return moved(one, -factor, other)


def result_of(method: Method, personal: Personal | None = None, batches: list[Pair] = BATCHES) -> LocalResult:
    train = TRAIN.model_copy(update={"steps": len(batches)})
    return local_round(method, loss, params(START), personal, batches, train, frozenset(NAMES))


def test_fedprox() -> None:
    w = START
    for batch in BATCHES:
        w = moved(w, RATE, plus(gradient(w, batch), 0.3, pull(w, START)))
    result = result_of(FedProx(0.3, SCALE))
    assert numbers(result.upload) == pytest.approx(w, rel=1e-12) and result.personal is None
    assert w != pytest.approx(numbers(result_of(FedProx(0.0, SCALE)).upload), rel=1e-3)


def test_fedrep_trains_the_head_and_then_the_body() -> None:
    """The first of two epochs of two steps at the head's own rate, the second at that of the body."""
    a, b, h = START
    for batch in BATCHES[:2]:
        h -= 0.2 * gradient((a, b, h), batch)[2]
    for batch in BATCHES[2:]:
        of_a, of_b, _ = gradient((a, b, h), batch)
        a, b = a - RATE * of_a, b - RATE * of_b
    result = result_of(FedRep(1, 0.2))
    assert numbers(result.upload) == pytest.approx((a, b, h), rel=1e-12) and result.personal is None


@pytest.mark.parametrize("count", [4, 3, 1])
def test_perfedavg(count: int) -> None:
    """Pairs of batches; the last of an odd number is its own pair. The device uses one step from what it received."""
    batches, w = BATCHES[:count], START
    for first in range(0, count, 2):
        adapted = moved(w, 0.2, gradient(w, batches[first]))
        w = moved(w, RATE, gradient(adapted, batches[min(first + 1, count - 1)]))
    result = result_of(PerFedAvg(0.2), batches=batches)
    assert numbers(result.upload) == pytest.approx(w, rel=1e-12)
    assert result.personal is not None and result.personal.mean_alpha == 1
    used = moved(START, 0.2, gradient(START, BATCHES[0]))
    assert numbers(result.personal.params) == pytest.approx(used, rel=1e-12)
    assert PerFedAvg.evaluates_after_training and not PerFedAvg.has_local_state


def test_pfedme() -> None:
    w = theta = START
    for batch in BATCHES:
        for _ in range(3):
            theta = moved(theta, 0.02, plus(gradient(theta, batch), 1.5, pull(theta, w)))
        w = moved(w, RATE * 1.5, pull(w, theta))
    result = result_of(PFedMe(1.5, SCALE, 3, 0.02))
    assert numbers(result.upload) == pytest.approx(w, rel=1e-12)
    assert result.personal is not None
    assert numbers(result.personal.params) == pytest.approx(theta, rel=1e-12)


def test_the_inner_steps_of_pfedme_go_to_the_moreau_envelope() -> None:
    """Where the inner problem is solved, λ (θ - w) is minus the gradient of f at θ (equation 4), for the head too."""
    method = PFedMe(5.0, SCALE, 4000, 0.02)
    result = result_of(method, batches=BATCHES[:1])
    assert result.personal is not None
    theta = numbers(result.personal.params)
    forces = plus(gradient(theta, BATCHES[0]), 5.0, pull(theta, START))
    assert forces == pytest.approx((0, 0, 0), abs=1e-9)
