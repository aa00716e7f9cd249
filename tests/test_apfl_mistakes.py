"""Mistakes made in other implementations of APFL: each is written here as a method, and our checks must fail for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from personal_problems import CASE, SGD, X, check_golden, check_nonlinear, quadratic, same_bits, share
from torch import Tensor

from tapfl.personalize.apfl import Apfl, ApflState
from tapfl.personalize.method import LocalResult, Method, Personal, local_round
from tapfl.personalize.methods import FedAvg, Local
from tapfl.training import Objective, Params


class ByHand(Apfl):
    """APFL with one parameter x, written out; each mistake replaces one of its parts."""

    def step(self, state: ApflState, objective: Objective, batch: object) -> Tensor:
        w, v, a = state.w.params["x"].detach(), state.v.params["x"].detach(), float(state.alpha)
        of_w, _ = gradient(objective, w)
        w = self.shared(w, of_w)
        of_between, loss = gradient(objective, a * v + (1 - a) * w)
        slope = self.slope(objective, w, v, a, of_between)
        state.w.apply([of_w + self.leak(a) * of_between])
        state.v.apply([self.factor(a) * self.v_gradient(objective, v, of_between)])
        state.alpha = share(min(max(a - self.alpha_learning_rate * slope, 0.0), 1.0))
        self.afterwards(state)
        return loss

    def shared(self, w: Tensor, of_w: Tensor) -> Tensor:
        return w

    def leak(self, a: float) -> float:
        return 0.0

    def factor(self, a: float) -> float:
        return a

    def v_gradient(self, objective: Objective, v: Tensor, of_between: Tensor) -> Tensor:
        return of_between

    def slope(self, objective: Objective, w: Tensor, v: Tensor, a: float, of_between: Tensor) -> float:
        return float(of_between @ (v - w))

    def afterwards(self, state: ApflState) -> None:
        pass


def gradient(objective: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    loss = objective({"x": x}, 0)
    return torch.autograd.grad(loss, x)[0], loss.detach()


class OutputsInterpolated(ByHand):
    """α interpolates outputs instead of weights, and the gradient of α is the difference of the losses."""

    def v_gradient(self, objective: Objective, v: Tensor, of_between: Tensor) -> Tensor:
        return gradient(objective, v)[0]

    def slope(self, objective: Objective, w: Tensor, v: Tensor, a: float, of_between: Tensor) -> float:
        return float(gradient(objective, v)[1] - gradient(objective, w)[1])


class WrongSign(ByHand):
    """The hand-written gradient of α is ⟨∇f, w - v⟩."""

    def slope(self, objective: Objective, w: Tensor, v: Tensor, a: float, of_between: Tensor) -> float:
        return -super().slope(objective, w, v, a, of_between)


class SteppedTwice(ByHand):
    """zero_grad is missing, so the gradient of the interpolation's loss with respect to w is added to w's own."""

    def leak(self, a: float) -> float:
        return 1 - a


class Overwritten(ByHand):
    """v is replaced by the interpolation after each step."""

    def afterwards(self, state: ApflState) -> None:
        with torch.no_grad():
            state.v.params["x"].lerp_(state.w.params["x"], 1 - float(state.alpha))


class AlphaMissing(ByHand):
    """The step of v lacks its factor α."""

    def factor(self, a: float) -> float:
        return 1.0


class Regularised(ByHand):
    """0.02 α is added to the gradient of α."""

    def slope(self, objective: Objective, w: Tensor, v: Tensor, a: float, of_between: Tensor) -> float:
        return super().slope(objective, w, v, a, of_between) + 0.02 * a


class NewW(ByHand):
    """The interpolation uses the w that was just updated."""

    def shared(self, w: Tensor, of_w: Tensor) -> Tensor:
        return w - CASE["lr"] * of_w


MISTAKES = [OutputsInterpolated, WrongSign, SteppedTwice, Overwritten, AlphaMissing, Regularised, NewW]
Check = Callable[[Callable[..., Apfl]], None]


# -- the checks -------------------------------------------------------------------------------------------------------


def golden(method: Callable[..., Apfl]) -> None:
    check_golden(method(CASE["alpha0"], "step", CASE["lr_alpha"]), "step")


def nonlinear(method: Callable[..., Apfl]) -> None:
    check_nonlinear(method(0.4, "step", 0.1), 0.4)


def one_round(method: Method, alpha: float, v: Params | None) -> LocalResult:
    """Three steps on the golden problem of one device, from w = 1, 2."""
    personal = None if v is None else Personal(v, share(alpha))
    return local_round(method, quadratic(0), W, personal, range(3), SGD, X)


W, V = {"x": torch.tensor([1.0, 2.0]).double()}, {"x": torch.tensor([-1.0, 0.5]).double()}


def alpha_0_leaves_v_alone(method: Callable[..., Apfl]) -> None:
    result = one_round(method(0.0, "step", 0.0), 0.0, V)
    assert result.personal is not None and same_bits(result.personal.params, V)


def alpha_1_is_local_training(method: Callable[..., Apfl]) -> None:
    result, local = one_round(method(1.0, "step", 0.0), 1.0, V), one_round(Local(), 1.0, V)
    assert result.personal is not None and local.personal is not None
    torch.testing.assert_close(result.personal.params, local.personal.params)


def w_is_fedavgs(method: Callable[..., Apfl]) -> None:
    for alpha in (0.0, 0.3, 1.0):
        assert same_bits(one_round(method(alpha, "step", 0.1), alpha, V).upload, one_round(FedAvg(), 0, None).upload)


def alpha_rests_where_v_is_w(method: Callable[..., Apfl]) -> None:
    result = local_round(method(0.3, "step", 0.1), quadratic(0), W, None, [0], SGD, X)
    assert result.personal is not None and result.personal.mean_alpha == 0.3


CHECKS = [golden, nonlinear, alpha_0_leaves_v_alone, alpha_1_is_local_training, w_is_fedavgs, alpha_rests_where_v_is_w]


@pytest.mark.parametrize("check", CHECKS)
def test_our_method_and_the_one_by_hand_pass(check: Check) -> None:
    check(Apfl)
    check(ByHand)


@pytest.mark.parametrize("check", [golden, nonlinear])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_golden_and_nonlinear_problem_detect_each_mistake(mistake: Callable[..., Apfl], check: Check) -> None:
    with pytest.raises(AssertionError):
        check(mistake)


@pytest.mark.parametrize(
    ("invariant", "mistake"),
    [
        (alpha_0_leaves_v_alone, AlphaMissing),
        (alpha_0_leaves_v_alone, Overwritten),
        (w_is_fedavgs, SteppedTwice),
        (alpha_rests_where_v_is_w, Regularised),
        (alpha_rests_where_v_is_w, NewW),
    ],
)
def test_invariants_detect_what_breaks_them(invariant: Check, mistake: Callable[..., Apfl]) -> None:
    with pytest.raises(AssertionError):
        invariant(mistake)
