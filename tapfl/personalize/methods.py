"""The methods that APFL is compared with, and all methods by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tapfl.adapters.layout import LORA_A, LORA_B
from tapfl.config import PersonalizeOptions, TrainOptions
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.method import Method, Personal, Trainee, wholly
from tapfl.plugin import is_plugin, load_plugin
from tapfl.training import Objective, Params


class FedAvg(Method[Trainee]):
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629): w ← w - η ∇f(w; ξ); nothing is personal."""

    has_local_state: ClassVar[bool] = False

    def init(
        self, received: Params, personal: Personal | None, train: TrainOptions, trained: frozenset[str]
    ) -> Trainee:
        return Trainee.of(received, train, trained)

    def step(self, state: Trainee, objective: Objective, batch: object) -> Tensor:
        loss = objective(state.params, batch)
        state.apply(state.gradients(loss))
        return loss

    def final(self, state: Trainee) -> tuple[Params | None, Personal | None]:
        return state.values(), None


@dataclass(frozen=True)
class FineTuneState:
    """w in training, and v if it is trained beside w."""

    w: Trainee
    v: Trainee | None


@dataclass(frozen=True)
class FineTune(Method[FineTuneState]):
    """FedAvg with local fine-tuning (FedAvg+; Jiang et al. 2019, arXiv 1909.12488).

    A device uses the result of a round's local training on the w just received; it keeps nothing for the next round.

    Attributes:
        learning_rate: of this result v, which is then trained beside the w that is uploaded; 0: v is that w.
    """

    evaluates_after_training: ClassVar[bool] = True
    has_local_state: ClassVar[bool] = False

    learning_rate: float = 0.0

    @property
    def models_per_step(self) -> int:
        return 2 if self.learning_rate else 1

    def init(
        self, received: Params, personal: Personal | None, train: TrainOptions, trained: frozenset[str]
    ) -> FineTuneState:
        own = Trainee.of(received, train, trained, self.learning_rate) if self.learning_rate else None
        return FineTuneState(Trainee.of(received, train, trained), own)

    def step(self, state: FineTuneState, objective: Objective, batch: object) -> Tensor:
        for trainee in filter(None, (state.w, state.v)):
            loss = objective(trainee.params, batch)
            trainee.apply(trainee.gradients(loss))
        return loss

    def final(self, state: FineTuneState) -> tuple[Params | None, Personal | None]:
        return state.w.values(), wholly((state.v or state.w).values())


@dataclass(frozen=True)
class Local(FedAvg):
    """Local training alone: v ← v - η_v ∇f(v; ξ), from the adapters received first; nothing is shared.

    Attributes:
        learning_rate: η_v; 0: that of `train`.
    """

    has_local_state: ClassVar[bool] = True
    shares_adapters: ClassVar[bool] = False

    learning_rate: float = 0.0

    def init(
        self, received: Params, personal: Personal | None, train: TrainOptions, trained: frozenset[str]
    ) -> Trainee:
        return Trainee.of(personal.params if personal else received, train, trained, self.learning_rate)

    def final(self, state: Trainee) -> tuple[Params | None, Personal | None]:
        return None, wholly(state.values())


@dataclass(frozen=True)
class DittoState:
    """w and v in training, and w as it was received."""

    w: Trainee
    v: Trainee
    received: Params


@dataclass(frozen=True)
class Ditto(Method[DittoState]):
    """Ditto (Li et al. 2021, arXiv 2012.04221): a personal model that is pulled towards the shared one.

        w ← w - η ∇f(w; ξ)
        v ← v - η_v (∇f(v; ξ) + λ ∇_v d(v, w_received)),     d = ½ ‖θ(v) - θ(w_received)‖²

    θ are the model's weights, as published. With adapters these are W₀ + s BA, so the distance is one of effective
    weights, ½ s² ‖B_vA_v - B_wA_w‖² for each pair of factors. Many pairs of factors have the same product BA and the
    rule `flex` sends another pair each round, so a distance of raw factors would pull v towards an arbitrary one of
    them. Parameters without factors are compared directly.

    Attributes:
        strength: λ.
        scale: s.
        learning_rate: η_v; 0: η.
    """

    strength: float
    scale: float
    learning_rate: float = 0.0

    def init(
        self, received: Params, personal: Personal | None, train: TrainOptions, trained: frozenset[str]
    ) -> DittoState:
        v = personal.params if personal else received
        own = Trainee.of(v, train, trained, self.learning_rate)
        return DittoState(Trainee.of(received, train, trained), own, received)

    def step(self, state: DittoState, objective: Objective, batch: object) -> Tensor:
        state.w.apply(state.w.gradients(objective(state.w.params, batch)))
        loss = objective(state.v.params, batch)
        gradients = state.v.gradients(loss)
        v = state.v.values()
        pull = (pull_of(name, v, state.received, self.scale) for name in state.v.moving)
        state.v.apply([g + self.strength * p for g, p in zip(gradients, pull, strict=True)])
        return loss

    def final(self, state: DittoState) -> tuple[Params | None, Personal | None]:
        return state.w.values(), wholly(state.v.values())


def pull_of(name: str, v: Params, w: Params, scale: float) -> Tensor:
    """Returns ∂d/∂v[name] of Ditto, without a product of the size of the weights.

    With D = B_vA_v - B_wA_w it is s² B_vᵀD for A_v, s² D A_vᵀ for B_v, and v - w for parameters without factors.
    """
    if name.endswith(LORA_A):
        other = name.removesuffix(LORA_A) + LORA_B
        return scale**2 * ((v[other].T @ v[other]) @ v[name] - (v[other].T @ w[other]) @ w[name])
    if name.endswith(LORA_B):
        other = name.removesuffix(LORA_B) + LORA_A
        return scale**2 * (v[name] @ (v[other] @ v[other].T) - w[name] @ (w[other] @ v[other].T))
    return v[name] - w[name]


def method_of(options: PersonalizeOptions, scale: float) -> Method[Any]:
    """Returns the method that the options name, for adapters of scale s; a plugin is called with (options, scale).

    Raises:
        ConfigError: if it is a plugin that cannot be imported.
    """
    if is_plugin(options.method):
        plugin: Method[Any] = load_plugin("personalize.method", options.method)(options, scale)
        return plugin
    rate = options.learning_rate
    methods: dict[str, Callable[[], Method[Any]]] = {
        "apfl": lambda: Apfl(
            options.alpha, options.alpha_update, options.alpha_learning_rate, options.alpha_per, learning_rate=rate
        ),
        "ditto": lambda: Ditto(options.ditto_lambda, scale, rate),
        "local": lambda: Local(rate),
        "fedavg": FedAvg,
        "fedavg+finetune": lambda: FineTune(rate),
    }
    return methods[options.method]()
