"""Personalisation methods: properties of all methods, Ditto's proximal term, fine-tuning, and the options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from personal_problems import ADAM, ALL, SGD, Params, problem, run, same_bits, share
from torch import Tensor

from tapfl.adapters.lora import Pair
from tapfl.config import AdapterOptions, PersonalizeOptions, RunConfig, TrainOptions
from tapfl.errors import ConfigError, ModelError
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.body_head import FedRep
from tapfl.personalize.fedala import FedAla
from tapfl.personalize.method import Method, Personal, Trainee, local_round
from tapfl.personalize.methods import FedAvg, FineTune, Local, method_of
from tapfl.personalize.perfedavg import PerFedAvg
from tapfl.personalize.proximal import Ditto, FedProx, PFedMe, pull_of

METHODS: dict[str, Method] = {
    "apfl": Apfl(0.5, "step"),
    "ditto": Ditto(0.1, 2.0),
    "fedavg": FedAvg(),
    "tune": FineTune(),
    "local": Local(),
    "fedprox": FedProx(0.1, 2.0),
    "pfedme": PFedMe(0.1, 2.0, inner_steps=1),
    "perfedavg": PerFedAvg(),
    "fedala": FedAla(),
    "fedala of factors": FedAla(products=False),
    "fedrep": FedRep(),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
both_optimizers = pytest.mark.parametrize("train", [SGD, ADAM], ids=["sgd", "adam"])


# -- all of them ------------------------------------------------------------------------------------------------------


@both_optimizers
@every_method
def test_a_round_is_a_function_of_its_arguments(method: Method, train: TrainOptions) -> None:
    objective, batches, v, w = problem(0)
    given = v | {f"w.{name}": theta for name, theta in w.items()}
    before = {name: theta.clone() for name, theta in given.items()}
    first = local_round(method, objective, w, Personal(v, share(0.5)), batches, train, ALL)
    torch.rand(3)  # the global generator is not used
    second = local_round(method, objective, w, Personal(v, share(0.5)), batches, train, ALL)
    assert first.loss == second.loss
    if first.upload is not None:
        assert same_bits(first.upload, second.upload)
    if first.personal is not None:
        assert second.personal is not None and torch.equal(first.personal.alpha, second.personal.alpha)
        assert same_bits(first.personal.params, second.personal.params)
    assert same_bits(before, given)  # the arguments were not changed
    for params in filter(None, (first.upload, first.personal and first.personal.params)):
        assert not any(theta.requires_grad for theta in params.values())


@both_optimizers
@every_method
def test_training_that_diverges_says_at_which_step_and_what_to_lower(method: Method, train: TrainOptions) -> None:
    objective, batches, v, w = problem(0)
    wild = train.model_copy(update={"learning_rate": 1e30})
    said = r"train\.learning-rate = 1e\+30: local training diverged at step \d of \d+ \((its loss|its parameters)"
    with pytest.raises(ModelError, match=said):
        local_round(method, objective, w, Personal(v, share(0.5)), 10 * batches, wild, ALL)
    if hasattr(method, "learning_rate"):
        said = r"train\.learning-rate = 0\.1, personalize\.learning-rate = 1e\+30: local training diverged"
        wild_v = replace(method, learning_rate=1e30)  # type: ignore[type-var]
        with pytest.raises(ModelError, match=said):
            local_round(wild_v, objective, w, Personal(v, share(0.5)), 10 * batches, train, ALL)


@every_method
def test_a_method_behaves_as_its_attributes_say(method: Method) -> None:
    objective, batches, v, w = problem(0)
    result = local_round(method, objective, w, Personal(v, share(0.5)), batches, SGD, ALL)
    assert method.shares_adapters == (result.upload is not None)
    assert (method.has_local_state or method.evaluates_after_training) == (result.personal is not None)
    passes = 0

    def counted(params: Any, batch: object) -> Tensor:
        nonlocal passes
        passes += 2 if isinstance(params, Pair) else 1
        return objective(params, batch)

    twice = SGD.model_copy(update={"steps": 2})
    local_round(method, counted, w, Personal(v, share(0.5)), batches[:2], twice, ALL)
    assert method.models_per_step == passes / 2


@every_method
def test_a_new_device_uses_what_it_received(method: Method) -> None:
    objective, batches, _, w = problem(0)
    torch.testing.assert_close(objective(method.inference(w, None), batches[0]), objective(w, batches[0]))


@both_optimizers
@every_method
def test_only_what_is_trained_moves(method: Method, train: TrainOptions) -> None:
    objective, batches, v, w = problem(0)
    result = local_round(method, objective, w, Personal(v, share(0.5)), batches, train, ALL - {"fc.lora_A"})
    pairs = [(result.upload, w)]
    if result.personal is not None:
        pairs.append(
            (result.personal.params, w if method.evaluates_after_training or isinstance(method, FedAla) else v)
        )
    for after, before in pairs:
        if after is not None:
            assert after.keys() == before.keys()
            assert [torch.equal(after[name], before[name]) for name in sorted(ALL)] == [True, False, False]


@both_optimizers
def test_a_step_does_not_depend_on_how_tensors_lie_in_memory(train: TrainOptions) -> None:
    theta, gradient = adapters(0)["fc.lora_A"], adapters(1)["fc.lora_A"]
    results = []
    for of_theta in (theta, theta.T.contiguous().T):
        for of_gradient in (gradient, gradient.T.contiguous().T):
            trainee = Trainee.of({"x": of_theta}, train, frozenset("x"))
            trainee.apply([of_gradient])
            trainee.apply([of_gradient])
            results.append(trainee.values()["x"])
    assert all(torch.equal(result, results[0]) for result in results)
    assert bool(((results[0] - theta) * gradient < 0).all())  # the loss decreases in every coordinate


@both_optimizers
@pytest.mark.parametrize("method", [Apfl(0.7, "step"), Ditto(0.3, 2.0), FineTune()], ids=["apfl", "ditto", "tune"])
def test_w_is_that_of_fedavg_to_the_bit(method: Method, train: TrainOptions) -> None:
    assert same_bits(run(method, alpha=0.7, train=train).upload, run(FedAvg(), train=train).upload)


def test_the_loss_is_the_mean_over_the_steps() -> None:
    objective, batches, _, w = problem(0)
    frozen = TrainOptions(optimizer="sgd", learning_rate=1e-12)
    result = local_round(FedAvg(), objective, w, None, batches, frozen, ALL)
    assert result.loss == pytest.approx(sum(float(objective(w, batch)) for batch in batches) / 3, rel=1e-6)


# -- Ditto ------------------------------------------------------------------------------------------------------------


def adapters(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"fc.lora_A": (2, 4), "fc.lora_B": (3, 2), "head.weight": (2, 3)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def distance(v: Params, w: Params, scale: float) -> Tensor:
    """Returns ½ ‖θ(v) - θ(w)‖², computed with the products."""
    D = scale * (v["fc.lora_B"] @ v["fc.lora_A"] - w["fc.lora_B"] @ w["fc.lora_A"])
    return ((D**2).sum() + ((v["head.weight"] - w["head.weight"]) ** 2).sum()) / 2


@given(seed=st.integers(0, 999), scale=st.floats(0.1, 4))
def test_the_proximal_gradient_is_that_of_the_distance_of_effective_weights(seed: int, scale: float) -> None:
    v, w = adapters(seed), adapters(seed + 1)
    leaves = {name: theta.clone().requires_grad_() for name, theta in v.items()}
    wanted = torch.autograd.grad(distance(leaves, w, scale), list(leaves.values()))
    for name, want in zip(v, wanted, strict=True):
        torch.testing.assert_close(pull_of(name, v, w, scale), want, rtol=1e-10, atol=1e-10)


def test_the_proximal_gradient_by_hand() -> None:
    """A = 3, B = 2 against A = 1, B = 1, s = 2: D = 5, so s² B D = 40 and s² D A = 60."""
    v, w = ({"fc.lora_A": torch.tensor([[a]]), "fc.lora_B": torch.tensor([[b]])} for a, b in ((3.0, 2.0), (1.0, 1.0)))
    assert pull_of("fc.lora_A", v, w, 2.0).item() == 40 and pull_of("fc.lora_B", v, w, 2.0).item() == 60
    head = {"head.bias": torch.tensor([3.0])}, {"head.bias": torch.tensor([1.0])}
    assert pull_of("head.bias", *head, 2.0).item() == 2


def test_there_is_no_proximal_gradient_between_factorings_of_the_same_weight() -> None:
    v = adapters(0)
    turn = torch.tensor([[0.0, -2.0], [0.5, 0.0]], dtype=torch.float64)
    w = v | {"fc.lora_A": turn @ v["fc.lora_A"], "fc.lora_B": v["fc.lora_B"] @ torch.linalg.inv(turn)}
    assert (v["fc.lora_A"] - w["fc.lora_A"]).abs().max() > 1
    for name in v:
        assert float(pull_of(name, v, w, 2.0).abs().max()) < 1e-12


def test_a_step_of_ditto() -> None:
    objective, batches, v, w = problem(3)
    strength, scale = 0.3, 2.0
    result = local_round(Ditto(strength, scale), objective, w, Personal(v, share(1.0)), batches[:1], SGD, ALL)
    leaves = {name: theta.clone().requires_grad_() for name, theta in v.items()}
    loss = objective(leaves, batches[0]) + strength * distance(leaves, w, scale)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert result.personal is not None and result.personal.mean_alpha == 1
    for name, g in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(result.personal.params[name], v[name] - SGD.learning_rate * g, rtol=1e-5, atol=1e-5)


def test_the_proximal_term_is_to_the_received_w_not_to_the_new_one() -> None:
    objective, batches, _, w = problem(0)
    method = Ditto(0.5, 2.0)
    state = method.init(w, None, SGD, ALL)
    for batch in batches:
        method.step(state, objective, batch)
    assert same_bits(state.w.start, problem(0)[3]) and not same_bits(state.w.values(), w)


@both_optimizers
def test_ditto_without_proximal_term_is_local_training_and_fedavg(train: TrainOptions) -> None:
    got, local = run(Ditto(0.0, 2.0), alpha=1.0, train=train), run(Local(), alpha=1.0, train=train)
    assert got.personal is not None and local.personal is not None
    assert same_bits(got.personal.params, local.personal.params)


def test_a_strong_proximal_term_keeps_v_close_to_w() -> None:
    def away(strength: float) -> float:
        result = run(Ditto(strength, 1.0), train=TrainOptions(optimizer="sgd", learning_rate=0.02))
        assert result.personal is not None
        return float(distance(result.personal.params, problem(0)[3], 1.0))

    assert away(2.0) < 0.9 * away(0.0)


# -- fine-tuning ------------------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_what_arrives_each_time() -> None:
    result, again = run(FineTune(), alpha=None), run(FineTune(), alpha=0.9)
    assert result.personal is not None and again.personal is not None and result.upload is not None
    assert same_bits(result.personal.params, again.personal.params)  # independent of earlier state
    assert same_bits(result.personal.params, result.upload)
    received = problem(7)[3]
    assert same_bits(FineTune().inference(received, result.personal), result.personal.params)


@both_optimizers
@pytest.mark.parametrize("method", [Apfl, Ditto, FineTune, Local])
def test_the_personal_part_has_a_learning_rate_of_its_own(method: type[Method], train: TrainOptions) -> None:
    """v is trained with this rate and w with the rate of `train`; 0 means the rate of `train`."""

    def made(rate: float) -> Method:
        given = {Apfl: (0.7, "fixed"), Ditto: (0.0, 2.0)}.get(method, ())
        return method(*given, learning_rate=rate)  # type: ignore[call-arg]

    def of_v(rate: float, train: TrainOptions) -> Params:
        objective, batches, v, w = problem(0)
        result = local_round(made(rate), objective, w, Personal(v, share(0.7)), batches[:1], train, ALL)
        assert result.personal is not None
        return result.personal.params

    slow = train.model_copy(update={"learning_rate": 0.01})
    assert same_bits(of_v(0.01, train), of_v(0.0, slow)) and not same_bits(of_v(0.01, train), of_v(0.0, train))
    assert same_bits(of_v(train.learning_rate, train), of_v(0.0, train))
    if method is not Local:
        assert same_bits(run(made(0.01), alpha=0.7, train=train).upload, run(FedAvg(), train=train).upload)


def test_fine_tuning_at_its_own_rate_trains_two_models() -> None:
    assert FineTune().models_per_step == 1 and FineTune(0.1).models_per_step == 2


def test_a_model_that_lasts_only_one_round_is_evaluated_after_it() -> None:
    assert {name for name, method in METHODS.items() if method.evaluates_after_training} == {
        "tune",
        "pfedme",
        "perfedavg",
    }


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "check"),
    [
        (
            {
                "alpha": 0.2,
                "alpha-update": "step",
                "alpha-learning-rate": 0.3,
                "alpha-per": "layer",
                "alpha-on": "train",
            },
            lambda method: method == Apfl(0.2, "step", 0.3, "layer"),
        ),
        (
            {"method": "ditto", "ditto-lambda": 0.7, "learning-rate": 0.1},
            lambda method: method == Ditto(0.7, 2.0, 0.1),
        ),
        ({"method": "local", "learning-rate": 0.1}, lambda method: method == Local(0.1)),
        ({"method": "fedavg+finetune", "learning-rate": 0.1}, lambda method: method == FineTune(0.1)),
        ({"method": "apfl", "learning-rate": 0.1}, lambda method: method.learning_rate == 0.1),
        ({"method": "fedavg"}, lambda method: type(method) is FedAvg),
        ({"method": "fedavg+finetune"}, lambda method: type(method) is FineTune),
        ({"method": "local"}, lambda method: type(method) is Local),
        ({"method": "fedprox", "prox-mu": 0.3}, lambda method: method == FedProx(0.3, 2.0)),
        (
            {"method": "pfedme", "pfedme-lambda": 3, "inner-steps": 7, "learning-rate": 0.1},
            lambda method: method == PFedMe(3, 2.0, 7, 0.1) and method.models_per_step == 7,
        ),
        ({"method": "perfedavg", "inner-learning-rate": 0.3}, lambda method: method == PerFedAvg(0.3)),
        (
            {"method": "fedala", "ala-learning-rate": 0.5, "ala-layers": 2},
            lambda method: method == FedAla(0.5, 2, products=True),
        ),
        ({"method": "fedper"}, lambda method: type(method) is FedAvg),
        ({"method": "fedrep", "head-epochs": 2, "learning-rate": 0.1}, lambda method: method == FedRep(2, 0.1)),
    ],
)
def test_methods_by_name(options: dict[str, object], check: Callable[[Method], bool]) -> None:
    assert check(method_of(PersonalizeOptions.model_validate(options), AdapterOptions(), 5))


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        (
            "method",
            "scaffold",
            "local, pooled, fedavg, fedavg+finetune, fedprox, pfedme, perfedavg, fedala, fedper, fedrep, or module",
        ),
        ("alpha", 1.5, "less than or equal to 1"),
        ("alpha-update", "never", "'round', 'step' or 'fixed'"),
        ("alpha-per", "head", "'device' or 'layer'"),
        ("learning-rate", -0.1, "greater than or equal to 0"),
        ("ditto-lambda", -0.1, "greater than or equal to 0"),
        ("ditto-lambda", float("inf"), "finite"),
    ],
)
def test_refused_options_name_value_and_what_is_accepted(option: str, value: object, accepted: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_flat({f"personalize.{option}": value})
    message = str(refused.value)
    assert f"personalize.{option} = {value!r}" in message and accepted in message and "\n" not in message


@pytest.mark.parametrize(("rule", "products"), [("flex", True), ("fedit", False), ("embed_side", False)])
def test_fedala_mixes_what_the_rule_averages(rule: str, products: bool) -> None:
    options = PersonalizeOptions(method="fedala")
    assert method_of(options, AdapterOptions(rule=rule), 1).products is products  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"method": "fedala", "adapters.rule": "rolora"}, "accepted: the other rules"),
        ({"method": "fedper"}, "personalize.method=fedper keeps the head on the device"),
        ({"method": "fedrep", "adapters.head": "mean"}, "accepted: adapters.head=personal"),
        ({"method": "fedrep", "adapters.head": "personal", "train.epochs": 2, "head-epochs": 2}, "fewer than train"),
        ({"method": "fedrep", "adapters.head": "personal", "train.steps": 9}, "steps=0"),
    ],
)
def test_methods_that_do_not_fit_the_run_are_refused(options: dict[str, object], accepted: str) -> None:
    flat = {name if "." in name else f"personalize.{name}": value for name, value in options.items()}
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_flat(flat)
    assert accepted in str(refused.value) and "\n" not in str(refused.value)
    changed = flat | {"adapters.head": "personal", "adapters.rule": "ffa", "train.steps": 0, "train.epochs": 3}
    assert RunConfig.from_flat(changed).personalize.method == options["method"]
