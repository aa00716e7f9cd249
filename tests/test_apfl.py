"""APFL: golden runs, and properties that hold for any data, α and optimiser."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from personal_problems import (
    ADAM,
    ALL,
    CASE,
    SGD,
    UPDATES,
    Moves,
    check_golden,
    of_each,
    problem,
    run,
    same_bits,
    share,
)
from torch import Tensor

from tapfl.config import TrainOptions
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.method import Personal, local_round
from tapfl.personalize.methods import FedAvg, Local
from tapfl.training import Params


@pytest.mark.parametrize("per", ["device", "layer"])
@pytest.mark.parametrize("update", UPDATES)
def test_golden_runs(update: Moves, per: Literal["device", "layer"]) -> None:
    """The golden problem has one layer, so α per layer equals α per device."""
    check_golden(Apfl(CASE["alpha0"], update, CASE["lr_alpha"], per), update)


# -- what holds for any device ----------------------------------------------------------------------------------------


@given(
    alpha=st.floats(0, 1),
    update=st.sampled_from(UPDATES),
    optimizer=st.sampled_from(["sgd", "adam"]),
    seed=st.integers(0, 99),
)
def test_w_is_that_of_fedavg_for_any_alpha(alpha: float, update: Moves, optimizer: str, seed: int) -> None:
    train = SGD if optimizer == "sgd" else ADAM
    assert same_bits(
        run(Apfl(alpha, update), seed, alpha=alpha, train=train).upload, run(FedAvg(), seed, train=train).upload
    )


@pytest.mark.parametrize("train", [SGD, ADAM], ids=["sgd", "adam"])
def test_alpha_0_is_fedavg_with_frozen_v(train: TrainOptions) -> None:
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
    for received in (w, problem(7)[3]):  # v does not depend on w
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
    # v starts as w, so the interpolation is the same for every α
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
def test_alpha_scales_the_step_of_v_with_any_optimizer(train: TrainOptions) -> None:
    """On a linear loss the steps differ only by α. Adam would take equal steps, because it normalises the gradient."""
    slope = torch.tensor([0.3, -2.0, 1e-4])
    objective = of_each(lambda params, batch: (slope * params["a.x"]).sum() + (slope * params["b.x"]).sum())
    start = {"a.x": torch.zeros(3), "b.x": torch.zeros(3)}

    def moved(alpha: Tensor, per: Literal["device", "layer"]) -> Params:
        method = Apfl(0.5, "fixed", per=per)
        result = local_round(method, objective, start, Personal(start, alpha), range(3), train, frozenset(start))
        assert result.personal is not None
        return result.personal.params

    whole, little, each = moved(share(1.0), "device"), moved(share(0.001), "device"), share(1.0).repeat(2)
    each[1] = 0.001
    apart = moved(each, "layer")
    assert bool((whole["a.x"] * slope < 0).all())
    for name in start:
        torch.testing.assert_close(1000 * little[name], whole[name], rtol=1e-5, atol=0)
    assert torch.equal(apart["a.x"], whole["a.x"]) and torch.equal(apart["b.x"], little["b.x"])


# -- one α a layer ----------------------------------------------------------------------------------------------------


def test_equal_fixed_alphas_equal_a_single_alpha() -> None:
    objective, batches, v, w = problem(1)
    one = local_round(Apfl(0.3, "fixed"), objective, w, Personal(v, share(0.3)), batches, SGD, ALL)
    each = local_round(
        Apfl(0.3, "fixed", per="layer"), objective, w, Personal(v, share(0.3).repeat(2)), batches, SGD, ALL
    )
    assert one.personal is not None and each.personal is not None
    assert same_bits(one.personal.params, each.personal.params) and same_bits(one.upload, each.upload)


def test_the_gradient_of_one_alpha_is_the_sum_of_those_of_the_layers() -> None:
    objective, batches, v, w = problem(1)
    moved = []
    for per, start in (("device", share(0.5)), ("layer", share(0.5).repeat(2))):
        method = Apfl(0.5, "step", 1e-3, per)  # type: ignore[arg-type]
        result = local_round(method, objective, w, Personal(v, start), batches[:1], SGD, ALL)
        assert result.personal is not None
        moved.append(result.personal.alpha - 0.5)
    assert moved[1].shape == (2,) and moved[1][0] != moved[1][1]
    assert float(moved[1].sum()) == pytest.approx(float(moved[0]), rel=1e-5)


def test_a_new_device_has_an_alpha_for_every_layer() -> None:
    personal = run(Apfl(0.3, "fixed", per="layer")).personal
    assert personal is not None and personal.alpha.tolist() == [0.3, 0.3] and personal.alpha.dtype == torch.float64
    assert personal.mean_alpha == pytest.approx(0.3)


def test_each_layer_is_interpolated_with_its_own_alpha() -> None:
    _, _, v, w = problem(0)
    used = Apfl(per="layer").inference(w, Personal(dict(reversed(v.items())), torch.tensor([1.0, 0.0])))
    torch.testing.assert_close(used["fc.lora_B"] @ used["fc.lora_A"], v["fc.lora_B"] @ v["fc.lora_A"])
    assert torch.equal(used["head.weight"], w["head.weight"])  # the order is that of w, in whatever order v was stored


# -- what does not move -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [{"fc.lora_A"}, {"fc.lora_B"}, {"fc.lora_A", "head.weight"}], ids=sorted)
def test_constants_of_a_round_do_not_change_and_are_interpolated_exactly(frozen: set[str]) -> None:
    objective, batches, v, w = problem(2)
    method = Apfl(0.4, "step", 0.1)
    result = local_round(method, objective, w, Personal(v, share(0.4)), batches, ADAM, ALL - frozen)
    assert result.upload is not None and result.personal is not None
    for name in ALL:
        moved = not torch.equal(result.upload[name], w[name]), not torch.equal(result.personal.params[name], v[name])
        assert moved == (name not in frozen, name not in frozen)
    # the trained interpolation is that of both models, so its loss equals the first step's for any frozen part
    whole = local_round(method, objective, w, Personal(v, share(0.4)), batches[:1], ADAM, ALL)
    part = local_round(method, objective, w, Personal(v, share(0.4)), batches[:1], ADAM, ALL - frozen)
    assert whole.loss == part.loss and whole.personal and part.personal
    assert torch.equal(whole.personal.alpha, part.personal.alpha)
