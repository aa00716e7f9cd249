"""The methods that people compare APFL with, each against its publication's formula in plain numbers.

The model has three numbers, one pair of factors and a head: f(a, b, h; x, y) = ½ (h b a x - y)², with s = 2 in the
distance of effective weights, d = ½ s² (b a - b' a')² + ½ (h - h')².
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clients.storage import DeviceState, DeviceStorage
from tapfl.config import TrainOptions
from tapfl.personalize.body_head import FedRep
from tapfl.personalize.fedala import FIRST_EPOCHS, FedAla, of_factors, of_products
from tapfl.personalize.held_out import Losses
from tapfl.personalize.method import LocalResult, Method, Personal, local_round
from tapfl.personalize.methods import FedAvg
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
    return ((h @ b @ a * x - y) ** 2).sum() / 2


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
    """Of two epochs with two steps, the first trains the head with its own rate, the second trains the body."""
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
    """Batches come in pairs; a last single batch is its own pair. The device uses one step from what it received."""
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


def test_the_inner_steps_of_pfedme_approach_the_moreau_envelope() -> None:
    """At the solution of the inner problem λ (θ - w) is minus the gradient of f at θ (equation 4), for the head too."""
    method = PFedMe(5.0, SCALE, 4000, 0.02)
    result = result_of(method, batches=BATCHES[:1])
    assert result.personal is not None
    theta = numbers(result.personal.params)
    forces = plus(gradient(theta, BATCHES[0]), 5.0, pull(theta, START))
    assert forces == pytest.approx((0, 0, 0), abs=1e-9)


OWN: Numbers = (-0.3, 0.9, 0.6)


def own(alpha: list[float] | float) -> Personal:
    return Personal(params(OWN), torch.tensor(alpha, dtype=torch.float64))


def of_image(batch: Pair) -> Losses:
    return lambda p: loss(p, batch).reshape(1)


def mixed(fc: float, head: float) -> Numbers:
    (a, b, h), (a0, b0, h0) = OWN, START
    return a0 + fc * (a - a0), b0 + fc * (b - b0), h0 + head * (h - h0)


def learnt(fc: float, head: float, epochs: int, rate: float) -> tuple[float, float]:
    """Returns α = 1 - W of the two layers after gradient steps on each image."""
    (a, b, h), (a0, b0, h0) = OWN, START
    for batch in BATCHES * epochs:
        of_a, of_b, of_h = gradient(mixed(fc, head), batch)
        fc, head = fc - rate * (of_a * (a - a0) + of_b * (b - b0)), head - rate * of_h * (h - h0)
        fc, head = min(max(fc, 0.0), 1.0), min(max(head, 0.0), 1.0)
    return fc, head


@pytest.mark.parametrize(("before", "epochs"), [(0.0, FIRST_EPOCHS), ([0.4, 0.7], 1)])
def test_fedala(before: float | list[float], epochs: int) -> None:
    """W is trained (for more epochs the first time); then the mixture is used, trained and sent."""
    method = FedAla(0.1, products=False)
    weighed = method.weigh(params(START), own(before), [of_image(batch) for batch in BATCHES])
    fc, head = learnt(*(before if isinstance(before, list) else (0.0, 0.0)), epochs, 0.1)
    assert weighed.alpha.tolist() == pytest.approx([fc, head], rel=1e-12) and 0 < fc < 1
    used = mixed(fc, head)
    assert numbers(method.inference(params(START), weighed)) == pytest.approx(used, rel=1e-12)
    for batch in BATCHES:
        used = moved(used, RATE, gradient(used, batch))
    result = result_of(method, weighed)
    assert result.personal is not None and torch.equal(result.personal.alpha, weighed.alpha)
    for kept in (result.upload, result.personal.params):
        assert numbers(kept) == pytest.approx(used, rel=1e-12)


def test_fedala_of_products() -> None:
    """α of the product: ∂f/∂α = r h x (b a - b0 a0). The factors of the mixture are balanced, with b > 0."""
    (a, b, h), (a0, b0, h0) = OWN, START
    fc, head = 0.4, 0.7
    for x, y in BATCHES:
        product, top = b0 * a0 + fc * (b * a - b0 * a0), h0 + head * (h - h0)
        r = top * product * x - y
        of_fc, of_head = r * top * x * (b * a - b0 * a0), r * product * x * (h - h0)
        fc, head = min(max(fc - 0.1 * of_fc, 0.0), 1.0), min(max(head - 0.1 * of_head, 0.0), 1.0)
    weighed = FedAla(0.1).weigh(params(START), own([0.4, 0.7]), [of_image(batch) for batch in BATCHES])
    assert weighed.alpha.tolist() == pytest.approx([fc, head], rel=1e-12)
    product = b0 * a0 + fc * (b * a - b0 * a0)
    root = abs(product) ** 0.5
    used = numbers(FedAla().inference(params(START), weighed))
    assert used == pytest.approx((root if product > 0 else -root, root, h0 + head * (h - h0)), rel=1e-12)


def test_fedala_of_the_last_layers_takes_w_below_them() -> None:
    weighed = FedAla(0.1, layers=1).weigh(params(START), own(0.0), [of_image(batch) for batch in BATCHES])
    assert weighed.alpha[0] == 0 and weighed.alpha[1] > 0
    used = FedAla().inference(params(START), weighed)
    assert all(torch.equal(used[name], params(START)[name]) for name in NAMES[:2])


def test_before_its_first_round_a_device_of_fedala_uses_and_trains_w() -> None:
    result = result_of(FedAla())
    assert numbers(result.upload) == numbers(result_of(FedAvg()).upload)
    assert result.personal is not None and result.personal.alpha.dim() == 0 and not result.personal.alpha


def test_a_mixture_of_products_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"fc.lora_A": (2, 5), "fc.lora_B": (4, 2), "head.bias": (3,)}
    v, w = ({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2))
    found = of_products(v, w, torch.tensor([0.3, 0.6], dtype=torch.float64))
    assert {name: tuple(theta.shape) for name, theta in found.items()} == shapes
    of_v, of_w, product = (p["fc.lora_B"].double() @ p["fc.lora_A"].double() for p in (v, w, found))
    U, S, Vh = torch.linalg.svd(0.3 * of_v + 0.7 * of_w, full_matrices=False)
    torch.testing.assert_close(product, U[:, :2] * S[:2] @ Vh[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["head.bias"], 0.6 * v["head.bias"] + 0.4 * w["head.bias"])


def test_equal_factors_stay_equal_to_the_bit() -> None:
    w = {name: theta.float() / 3 for name, theta in params(START).items()}
    found = of_factors(w | {"head.weight": 2 * w["head.weight"]}, w, torch.tensor(0.37, dtype=torch.float64))
    assert [torch.equal(found[name], w[name]) for name in NAMES] == [True, True, False]


def test_a_device_keeps_a_tensor_that_is_both_personal_and_a_private_part_of_w(tmp_path: Path) -> None:
    """FedALA's v is the w that the device trained, and with `adapters.head=personal` the head of w also stays there."""
    result, storage = result_of(FedAla()), DeviceStorage(tmp_path)
    assert result.upload is not None
    state = DeviceState(result.personal, {"head.weight": result.upload["head.weight"]})
    storage.save_state(0, 1, state, before=0)
    found = storage.load_state(0, 1)
    assert found.personal is not None and numbers(found.personal.params) == numbers(result.upload)
    assert torch.equal(found.private["head.weight"], result.upload["head.weight"])
