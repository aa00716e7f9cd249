"""Small problems for personalisation methods (the golden one and a LoRA regression), and checks on them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from backbones import golden
from torch import Tensor

from tapfl.adapters.layout import Placement, Update
from tapfl.adapters.lora import Pair, interpolate
from tapfl.adapters.rules import RULES
from tapfl.config import TrainOptions
from tapfl.personalize.method import LocalResult, Method, Personal, local_round
from tapfl.training import Objective, Params

SGD = TrainOptions(optimizer="sgd", learning_rate=0.1, epochs=3, steps=3)
ADAM = TrainOptions(optimizer="adam", learning_rate=0.1, epochs=3, steps=3)
UPDATES = ["round", "step", "fixed"]
Moves = Literal["round", "step", "fixed"]

CASE = golden("apfl")
X = frozenset("x")
WHOLE = {"x": Placement((torch.arange(2),))}


def share(alpha: float) -> Tensor:
    return torch.tensor(alpha, dtype=torch.float64)


def of_each(loss: Objective) -> Objective:
    """Returns an objective that also computes the losses of a pair, one after the other."""

    def objective(params: Any, batch: object) -> Tensor:
        if not isinstance(params, Pair):
            return loss(params, batch)
        fixed = {name: theta.detach() for name, theta in params.w.items()}
        return torch.stack([loss(params.w, batch), loss(interpolate(params.v, fixed, params.alpha), batch)])

    return objective


def quadratic(device: int) -> Objective:
    H, c = (torch.tensor(CASE[name][device], dtype=torch.float64) for name in "Hc")
    return of_each(lambda params, batch: (H * (params["x"] - c) ** 2).sum() / 2)


def check_golden(method: Method[Any], update: str) -> None:
    """Fails unless rounds of `method` with the golden α and step sizes give the golden w, v and α to all digits."""
    train = TrainOptions(optimizer="sgd", learning_rate=CASE["lr"])
    w: Params = {"x": torch.zeros(2, dtype=torch.float64)}
    personal: list[Personal | None] = [None, None, None]
    for want in CASE["runs"][update]:
        updates = []
        for i, weight in enumerate(CASE["aggregation_weights"]):
            result = local_round(method, quadratic(i), w, personal[i], range(CASE["local_steps"]), train, X)
            assert result.upload is not None and result.personal is not None
            updates.append(Update(result.upload, WHOLE, weight))
            personal[i] = result.personal
            np.testing.assert_allclose(result.personal.params["x"], want["v"][i], rtol=1e-10, atol=1e-12)
            assert result.personal.mean_alpha == pytest.approx(want["alpha"][i], rel=1e-10)
        w = RULES["fedit"].aggregate(w, updates, w)
        np.testing.assert_allclose(w["x"], want["w"], rtol=1e-10, atol=1e-12)


def check_nonlinear(method: Method[Any], alpha: float) -> None:
    """Fails unless a step on f = (tanh(x) - 1)² is APFL's: there interpolating outputs is not interpolating parameters.

    `method` moves α at each step with η_α = 0.1.
    """
    objective = of_each(lambda params, batch: ((torch.tanh(params["x"]) - 1) ** 2).sum())
    v, w = 1.5, -1.0
    between = alpha * v + (1 - alpha) * w
    slope = 2 * (np.tanh(between) - 1) * (1 - np.tanh(between) ** 2)
    of_w = 2 * (np.tanh(w) - 1) * (1 - np.tanh(w) ** 2)
    start, own = ({"x": torch.tensor([x], dtype=torch.float64)} for x in (w, v))
    result = local_round(method, objective, start, Personal(own, share(alpha)), [0], SGD, X)
    assert result.personal is not None and result.upload is not None
    assert result.loss == pytest.approx((np.tanh(between) - 1) ** 2)
    assert result.personal.mean_alpha == pytest.approx(alpha - 0.1 * slope * (v - w))
    assert float(result.personal.params["x"]) == pytest.approx(v - 0.1 * alpha * slope)
    assert float(result.upload["x"]) == pytest.approx(w - 0.1 * of_w)


ALL = frozenset({"fc.lora_A", "fc.lora_B", "head.weight"})


def problem(seed: int) -> tuple[Objective, list[tuple[Tensor, Tensor]], Params, Params]:
    """Returns a LoRA regression with a head, in fp32: its objective, batches, and two sets of initial adapters."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = draw(3, 4)

    @of_each
    def objective(params: Params, batch: object) -> Tensor:
        x, y = batch  # type: ignore[misc]
        hidden = torch.tanh(x @ (weight + params["fc.lora_B"] @ params["fc.lora_A"]).T)
        return ((hidden @ params["head.weight"].T - y) ** 2).mean()

    v, w = ({"fc.lora_A": draw(2, 4), "fc.lora_B": draw(3, 2), "head.weight": draw(2, 3)} for _ in range(2))
    return objective, [(draw(5, 4), draw(5, 2)) for _ in range(3)], v, w


def run(method: Method, seed: int = 0, *, alpha: float | None = None, train: TrainOptions = SGD) -> LocalResult:
    """Runs a round of `method` from w, with v and α from an earlier round unless `alpha` is None."""
    objective, batches, v, w = problem(seed)
    personal = None if alpha is None else Personal(v, share(alpha))
    return local_round(method, objective, w, personal, batches, train, ALL)


def same_bits(one: Params | None, other: Params | None) -> bool:
    assert one is not None and other is not None and one.keys() == other.keys()
    return all(torch.equal(theta, other[name]) for name, theta in one.items())
