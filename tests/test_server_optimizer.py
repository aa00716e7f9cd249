"""The server's optimiser: two rounds by hand, coordinates without a holder, and products (not factors) for flex."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_flex import A, B, noise, update
from torch import Tensor

from tapfl.adapters import rules
from tapfl.adapters.layout import Placement, Update
from tapfl.adapters.rules import ServerState
from tapfl.config import AdapterOptions, PrivacyOptions
from tapfl.errors import ModelError

F64 = torch.float64


def options(**given: Any) -> AdapterOptions:
    return AdapterOptions.model_validate({"rule": "fedit", "head": "mean"} | given)


def advance(given: AdapterOptions, state: ServerState, updates: list[Update]) -> ServerState:
    return rules.aggregate(given, PrivacyOptions(), state, updates, state.params, 1, np.random.default_rng())


def says(*values: float, at: list[int] | None = None) -> list[Update]:
    place = Placement((torch.tensor(at if at is not None else range(len(values))),))
    return [Update({"h": torch.tensor(values, dtype=F64)}, {"h": place}, 1.0)]


def start(*values: float) -> ServerState:
    return ServerState({"h": torch.tensor(values, dtype=F64)})


def test_momentum_over_two_rounds_by_hand() -> None:
    given = options(server="momentum", server_learning_rate=0.5, server_momentum=0.9)
    state = advance(given, start(1.0), says(2.0))  # g = -1, m = -1
    assert state.params["h"].item() == 1.5
    assert state.optimizer["momentum.h"].item() == -1
    state = advance(given, state, says(2.0))  # g = -0.5, m = -0.9 - 0.5
    assert state.params["h"].item() == pytest.approx(1.5 + 0.5 * 1.4, rel=1e-7)
    assert state.optimizer["momentum.h"].item() == pytest.approx(-1.4, rel=1e-7)


def test_adam_over_two_rounds_by_hand() -> None:
    given = options(server="adam", server_learning_rate=0.1, server_momentum=0.9, server_epsilon=0.5)
    # g = -1: m = -0.1, v = 0.99 · 0.25 + 0.01 · 1 = 0.2575; θ = 1 + 0.1 · 0.1 / (0.5074446 + 0.5)
    state = advance(given, start(1.0), says(2.0))
    assert state.params["h"].item() == pytest.approx(1.0099261043, rel=1e-7)
    # g = -2: m = -0.29, v = 0.254925 + 0.01 · 4 = 0.294925; θ += 0.1 · 0.29 / (0.5430700 + 0.5)
    state = advance(given, state, says(state.params["h"].item() + 2))
    assert state.params["h"].item() == pytest.approx(1.0099261043 + 0.02780255, rel=1e-7)
    moments = {name: theta.item() for name, theta in state.optimizer.items()}
    assert moments == pytest.approx({"momentum.h": -0.29, "variance.h": 0.294925}, rel=1e-6)


@pytest.mark.parametrize(("server", "rate"), [("momentum", 1.0), ("adam", 0.01)])
def test_learning_rate_zero_is_the_default_of_each(server: str, rate: float) -> None:
    unsaid = advance(options(server=server), start(1.0), says(2.0)).params["h"]
    said = advance(options(server=server, server_learning_rate=rate), start(1.0), says(2.0)).params["h"]
    assert torch.equal(unsaid, said) and unsaid != 1


def test_momentum_zero_gives_the_mean() -> None:
    given = options(server="momentum", server_momentum=0.0)
    assert advance(given, start(1.0, 5.0), says(2.5, -3.0)).params["h"].tolist() == [2.5, -3]


@pytest.mark.parametrize("server", ["momentum", "adam"])
def test_a_coordinate_without_a_holder_does_not_move(server: str) -> None:
    given = options(server=server)
    first = advance(given, start(0.0, 0.0), says(1.0, 1.0))
    second = advance(given, first, says(2.0, at=[0]))
    assert second.params["h"][1] == first.params["h"][1] and second.params["h"][0] != first.params["h"][0]
    for name, moment in second.optimizer.items():
        assert moment[1] == first.optimizer[name][1] and moment[0] != first.optimizer[name][0], name
    # and a tensor that no device sent keeps its moments
    other = [Update({}, {}, 1.0)]
    third = advance(given, second, other)
    assert torch.equal(third.params["h"], second.params["h"])
    assert all(torch.equal(third.optimizer[name], moment) for name, moment in second.optimizer.items())


def test_the_previous_state_is_not_changed() -> None:
    given = options(server="adam")
    first = advance(given, start(0.0), says(1.0))
    copies = {name: moment.clone() for name, moment in first.optimizer.items()}
    advance(given, first, says(5.0))
    assert all(torch.equal(first.optimizer[name], moment) for name, moment in copies.items())


# -- products ---------------------------------------------------------------------------------------------------------


def product_of(state: ServerState) -> Tensor:
    return state.params[B] @ state.params[A]


def test_flex_moves_the_products() -> None:
    generator = np.random.default_rng(0)
    given = options(rule="flex", server="momentum", server_learning_rate=0.5, server_momentum=0.9)
    zero = ServerState({B: torch.zeros(4, 4, dtype=F64), A: torch.eye(4, dtype=F64)})
    rows, products, state = [0, 1, 2, 3], [], zero
    states = []
    for _ in range(2):
        b, a = noise(generator, 4, 3), noise(generator, 3, 4)
        products.append(b @ a)
        state = advance(given, state, [update(b, a, rows, 1.0)])
        states.append(state)
    first = 0.5 * products[0]  # m = -P₁
    torch.testing.assert_close(product_of(states[0]), first, rtol=1e-6, atol=1e-6)
    second = first + 0.5 * (0.9 * products[0] - (first - products[1]))
    torch.testing.assert_close(product_of(states[1]), second, rtol=1e-6, atol=1e-6)
    assert {name: tuple(m.shape) for name, m in state.optimizer.items()} == {"momentum.fc.product": (4, 4)}


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_parts_of_a_product_without_holders_do_not_move(side: str) -> None:
    generator = np.random.default_rng(0)
    given = options(rule="flex", server="momentum")
    state = ServerState({B: torch.zeros(4, 4, dtype=F64), A: torch.eye(4, dtype=F64)})
    kinds = [[0, 1, 2, 3], [0, 2]]
    for kept in kinds:
        before = state
        b = noise(generator, len(kept) if side == "rows" else 4, 2)
        a = noise(generator, 2, len(kept) if side == "columns" else 4)
        state = advance(given, state, [update(b, a, kept, 1.0, side)])
    gone, held = [1, 3], [0, 2]
    was, now = (s if side == "rows" else s.T for s in (product_of(before), product_of(state)))
    torch.testing.assert_close(now[gone], was[gone], rtol=1e-6, atol=1e-6)
    assert (now[held] - was[held]).abs().min() > 1e-3


def test_flex_without_memory_is_flex() -> None:
    generator = np.random.default_rng(0)
    state = ServerState({B: noise(generator, 5, 2), A: noise(generator, 2, 4)})
    updates = [update(noise(generator, 3, 2), noise(generator, 2, 4), [0, 2, 3], 1.0 + i) for i in range(3)]
    plain = advance(options(rule="flex"), state, updates)
    stepped = advance(options(rule="flex", server="momentum", server_momentum=0.0), state, updates)
    torch.testing.assert_close(product_of(stepped), product_of(plain), rtol=1e-9, atol=1e-9)


def test_exploding_adapters_are_refused_with_the_cause() -> None:
    wild = options(server="adam", server_learning_rate=1e20)
    with pytest.raises(
        ModelError, match=r"adapters\.server-learning-rate = 1e\+20: the shared adapters reach .* round 1"
    ):
        advance(wild, start(1.0), says(2.0))
    with pytest.raises(ModelError, match=r"train\.learning-rate: the shared adapters reach 2e\+13"):
        advance(options(), start(1.0), says(2e13))
    with pytest.raises(ModelError, match=r"the shared adapters reach nan"):
        advance(options(), start(1.0), says(float("nan")))
    noisy = PrivacyOptions.model_validate({"dp_clip": 1.0, "dp_noise": 1e20})
    with pytest.raises(ModelError, match=r"privacy\.dp-noise = 1e\+20: the shared adapters reach"):
        rules.aggregate(options(rule="ffa"), noisy, start(1.0), says(2.0), {}, 1, np.random.default_rng())
