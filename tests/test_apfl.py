"""APFL: golden runs, the mistakes that others made with it, and what holds for any data, α and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from backbones import golden
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tapfl.adapters import fedit
from tapfl.adapters.layout import Placement, Update
from tapfl.config import TrainOptions
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.fedavg import FedAvg
from tapfl.personalize.local import Local
from tapfl.personalize.method import LocalResult, Method, Personal, local_round
from tapfl.training import Objective, Params

SGD = TrainOptions(optimizer="sgd", learning_rate=0.1)
ADAM = TrainOptions(optimizer="adam", learning_rate=0.1)
UPDATES = ["round", "step", "fixed"]
Moves = Literal["round", "step", "fixed"]

CASE = golden("apfl")
X = frozenset("x")
WHOLE = {"x": Placement((torch.arange(2),))}


def share(alpha: float) -> Tensor:
    return torch.tensor(alpha, dtype=torch.float64)


def quadratic(device: int) -> Objective:
    H, c = (torch.tensor(CASE[name][device], dtype=torch.float64) for name in "Hc")
    return lambda params, batch: (H * (params["x"] - c) ** 2).sum() / 2


# -- golden numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", UPDATES)
def test_golden_runs(update: Moves) -> None:
    method = Apfl(CASE["alpha0"], update, CASE["lr_alpha"])
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
        w = fedit.aggregate(w, updates, w)
        np.testing.assert_allclose(w["x"], want["w"], rtol=1e-10, atol=1e-12)


# -- known mistakes ---------------------------------------------------------------------------------------------------


@dataclass
class Iterates:
    """One device's w, v and α, in plain numbers."""

    w: np.ndarray
    v: np.ndarray
    alpha: float


Gradient = Callable[[np.ndarray], np.ndarray]
LR, LR_ALPHA = CASE["lr"], CASE["lr_alpha"]


def correct(at: Iterates, gradient: Gradient) -> Iterates:
    mixture = at.alpha * at.v + (1 - at.alpha) * at.w
    slope = gradient(mixture) @ (at.v - at.w)
    return Iterates(
        at.w - LR * gradient(at.w),
        at.v - LR * at.alpha * gradient(mixture),
        float(np.clip(at.alpha - LR_ALPHA * slope, 0, 1)),
    )


def alpha_gradient_of_wrong_sign(at: Iterates, gradient: Gradient) -> Iterates:
    mixture = at.alpha * at.v + (1 - at.alpha) * at.w
    right = correct(at, gradient)
    right.alpha = float(np.clip(at.alpha + LR_ALPHA * gradient(mixture) @ (at.v - at.w), 0, 1))
    return right


def w_stepped_twice(at: Iterates, gradient: Gradient) -> Iterates:
    mixture = at.alpha * at.v + (1 - at.alpha) * at.w
    right = correct(at, gradient)
    right.w = right.w - LR * (1 - at.alpha) * gradient(mixture)
    return right


def v_overwritten_by_the_mixture(at: Iterates, gradient: Gradient) -> Iterates:
    right = correct(at, gradient)
    right.v = right.alpha * right.v + (1 - right.alpha) * right.w
    return right


def v_step_without_alpha(at: Iterates, gradient: Gradient) -> Iterates:
    mixture = at.alpha * at.v + (1 - at.alpha) * at.w
    right = correct(at, gradient)
    right.v = at.v - LR * gradient(mixture)
    return right


def alpha_with_a_regulariser(at: Iterates, gradient: Gradient) -> Iterates:
    mixture = at.alpha * at.v + (1 - at.alpha) * at.w
    right = correct(at, gradient)
    slope = gradient(mixture) @ (at.v - at.w) + 0.02 * at.alpha
    right.alpha = float(np.clip(at.alpha - LR_ALPHA * slope, 0, 1))
    return right


def mixture_of_the_new_w(at: Iterates, gradient: Gradient) -> Iterates:
    moved = Iterates(at.w - LR * gradient(at.w), at.v, at.alpha)
    right = correct(moved, gradient)
    right.w = moved.w
    return right


MISTAKES = [
    alpha_gradient_of_wrong_sign,
    w_stepped_twice,
    v_overwritten_by_the_mixture,
    v_step_without_alpha,
    alpha_with_a_regulariser,
    mixture_of_the_new_w,
]


def distance_to_golden(step: Callable[[Iterates, Gradient], Iterates]) -> float:
    """Largest difference to the golden run with α moving at each step, over all rounds, devices and quantities."""
    devices = [Iterates(np.zeros(2), np.zeros(2), CASE["alpha0"]) for _ in range(3)]
    H, c = np.array(CASE["H"]), np.array(CASE["c"])
    w, largest = np.zeros(2), 0.0
    for want in CASE["runs"]["step"]:
        for i in range(3):
            devices[i].w = w
            for _ in range(CASE["local_steps"]):
                devices[i] = step(devices[i], lambda x, i=i: H[i] * (x - c[i]))
        w = np.array(CASE["aggregation_weights"]) @ np.stack([device.w for device in devices])
        for got, golden_values in (
            (w, want["w"]),
            (np.stack([device.v for device in devices]), want["v"]),
            (np.array([device.alpha for device in devices]), want["alpha"]),
        ):
            largest = max(largest, float(np.abs(got - np.array(golden_values)).max()))
    return largest


def test_plain_numbers_give_the_golden_run() -> None:
    assert distance_to_golden(correct) < 1e-12


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_golden_run_tells_each_known_mistake(mistake: Callable[[Iterates, Gradient], Iterates]) -> None:
    assert distance_to_golden(mistake) > 1e-3


def test_models_are_mixed_not_their_logits() -> None:
    """f = (tanh(x) - 1)², where a mixture of outputs has another gradient than that of the mixed parameter."""
    v, w, alpha = 1.5, -1.0, 0.4
    objective: Objective = lambda params, batch: ((torch.tanh(params["x"]) - 1) ** 2).sum()  # noqa: E731
    mixture = alpha * v + (1 - alpha) * w
    slope = 2 * (np.tanh(mixture) - 1) * (1 - np.tanh(mixture) ** 2)
    logits = alpha * np.tanh(v) + (1 - alpha) * np.tanh(w)
    tensor = {name: {"x": torch.tensor([x], dtype=torch.float64)} for name, x in (("v", v), ("w", w))}
    result = local_round(
        Apfl(alpha, "step", 0.1), objective, tensor["w"], Personal(tensor["v"], share(alpha)), [0], SGD, X
    )
    assert result.personal is not None
    assert result.loss == pytest.approx((np.tanh(mixture) - 1) ** 2)
    assert result.personal.mean_alpha == pytest.approx(alpha - 0.1 * slope * (v - w))
    assert float(result.personal.params["x"]) == pytest.approx(v - 0.1 * alpha * slope)
    of_logits = alpha - 0.1 * 2 * (logits - 1) * (np.tanh(v) - np.tanh(w))
    assert abs(result.personal.mean_alpha - of_logits) > 0.01


# -- what holds for any device ----------------------------------------------------------------------------------------


ALL = frozenset({"fc.lora_A", "fc.lora_B", "head.weight"})


def problem(seed: int) -> tuple[Objective, list[tuple[Tensor, Tensor]], Params, Params]:
    """A LoRA regression with a head, in fp32: its objective, batches, and two sets of adapters to start from."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = draw(3, 4)

    def objective(params: Params, batch: object) -> Tensor:
        x, y = batch  # type: ignore[misc]
        hidden = torch.tanh(x @ (weight + params["fc.lora_B"] @ params["fc.lora_A"]).T)
        return ((hidden @ params["head.weight"].T - y) ** 2).mean()

    v, w = ({"fc.lora_A": draw(2, 4), "fc.lora_B": draw(3, 2), "head.weight": draw(2, 3)} for _ in range(2))
    return objective, [(draw(5, 4), draw(5, 2)) for _ in range(3)], v, w


def run(method: Method, seed: int = 0, *, alpha: float | None = None, train: TrainOptions = SGD) -> LocalResult:
    """A round of `method` from w, with v and α from an earlier round unless `alpha` is None."""
    objective, batches, v, w = problem(seed)
    personal = None if alpha is None else Personal(v, share(alpha))
    return local_round(method, objective, w, personal, batches, train, ALL)


def same_bits(one: Params | None, other: Params | None) -> bool:
    assert one is not None and other is not None and one.keys() == other.keys()
    return all(torch.equal(theta, other[name]) for name, theta in one.items())


@given(
    alpha=st.floats(0, 1),
    update=st.sampled_from(UPDATES),
    optimizer=st.sampled_from(["sgd", "adam"]),
    seed=st.integers(0, 99),
)
def test_w_is_that_of_fedavg_whatever_alpha(alpha: float, update: Moves, optimizer: str, seed: int) -> None:
    train = SGD if optimizer == "sgd" else ADAM
    assert same_bits(
        run(Apfl(alpha, update), seed, alpha=alpha, train=train).upload, run(FedAvg(), seed, train=train).upload
    )


@pytest.mark.parametrize("train", [SGD, ADAM], ids=["sgd", "adam"])
def test_alpha_0_is_fedavg_with_v_frozen(train: TrainOptions) -> None:
    method = Apfl(0.0, "fixed")
    objective, batches, v, w = problem(0)
    result = local_round(method, objective, w, Personal(v, share(0.0)), batches, train, ALL)
    assert result.personal is not None and result.personal.alpha == 0
    assert same_bits(result.personal.params, v)
    received = problem(7)[3]
    for batch in batches:
        torch.testing.assert_close(
            objective(method.inference(received, result.personal), batch),
            objective(FedAvg().inference(received, None), batch),
        )


@pytest.mark.parametrize("train", [SGD, ADAM], ids=["sgd", "adam"])
def test_alpha_1_is_local_training(train: TrainOptions) -> None:
    method = Apfl(1.0, "fixed")
    objective, batches, v, w = problem(0)
    local = local_round(Local(), objective, w, Personal(v, share(1.0)), batches, train, ALL)
    assert local.upload is None and local.personal is not None
    for received in (w, problem(7)[3]):  # v does not depend on what w is
        result = local_round(method, objective, received, Personal(v, share(1.0)), batches, train, ALL)
        assert result.personal is not None and result.personal.alpha == 1
        for name, theta in local.personal.params.items():
            torch.testing.assert_close(result.personal.params[name], theta, rtol=1e-4, atol=1e-5)
        assert result.loss == pytest.approx(local.loss, rel=1e-5)
        torch.testing.assert_close(
            objective(method.inference(received, result.personal), batches[0]),
            objective(Local().inference(received, local.personal), batches[0]),
            rtol=1e-4,
            atol=1e-5,
        )


@given(
    start=st.floats(0, 1),
    rate=st.floats(0, 1e6),
    update=st.sampled_from(UPDATES),
    seed=st.integers(0, 99),
)
def test_alpha_stays_between_0_and_1(start: float, rate: float, update: Moves, seed: int) -> None:
    personal = run(Apfl(0.5, update, rate), seed, alpha=start).personal
    assert personal is not None and 0 <= personal.alpha <= 1
    if update == "fixed":
        assert personal.alpha == start


def test_the_first_gradient_of_alpha_is_0() -> None:
    # v starts as w, so the mixture is the same for every α
    personal = run(Apfl(0.3, "round", 10.0)).personal
    assert personal is not None and personal.mean_alpha == pytest.approx(0.3, abs=1e-4)


def test_alpha_moves_once_a_round_or_at_every_step() -> None:
    objective, batches, v, w = problem(0)

    def alphas(update: Moves) -> list[float]:
        method = Apfl(0.5, update, 0.01)
        state, seen = method.init(w, Personal(v, share(0.5)), SGD, ALL), []
        for batch in batches:
            method.step(state, objective, batch)
            seen.append(float(state.alpha))
        return seen

    by_round, by_step = alphas("round"), alphas("step")
    assert by_round[0] == by_round[1] == by_round[2] == by_step[0] != 0.5
    assert len(set(by_step)) == 3
    assert set(alphas("fixed")) == {0.5}


@pytest.mark.parametrize("train", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("method", [Apfl(0.5, "step"), FedAvg(), Local()], ids=["apfl", "fedavg", "local"])
def test_a_round_is_a_function_of_its_arguments(method: Method, train: TrainOptions) -> None:
    objective, batches, v, w = problem(0)
    before = {name: theta.clone() for name, theta in (v | {f"w.{name}": theta for name, theta in w.items()}).items()}
    first = local_round(method, objective, w, Personal(v, share(0.5)), batches, train, ALL)
    torch.rand(3)  # the global generator is not asked
    second = local_round(method, objective, w, Personal(v, share(0.5)), batches, train, ALL)
    assert first.loss == second.loss
    if first.upload is not None:
        assert same_bits(first.upload, second.upload)
    if first.personal is not None:
        assert second.personal is not None and first.personal.alpha == second.personal.alpha
        assert same_bits(first.personal.params, second.personal.params)
    assert same_bits(before, v | {f"w.{name}": theta for name, theta in w.items()})  # nothing given was changed
    for params in filter(None, (first.upload, first.personal and first.personal.params)):
        assert not any(theta.requires_grad for theta in params.values())


@pytest.mark.parametrize("method", [Apfl(0.5), FedAvg(), Local()], ids=["apfl", "fedavg", "local"])
def test_a_device_without_a_past_uses_what_it_received(method: Method) -> None:
    objective, batches, _, w = problem(0)
    torch.testing.assert_close(objective(method.inference(w, None), batches[0]), objective(w, batches[0]))


def test_the_loss_is_the_mean_over_the_steps() -> None:
    objective, batches, _, w = problem(0)
    frozen = TrainOptions(optimizer="sgd", learning_rate=1e-12)
    result = local_round(FedAvg(), objective, w, None, batches, frozen, ALL)
    assert result.loss == pytest.approx(sum(float(objective(w, batch)) for batch in batches) / 3, rel=1e-6)
