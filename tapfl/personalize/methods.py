"""FedAvg, local training and what lies between them; and all methods by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tapfl.config import AdapterOptions, PersonalizeOptions, RunConfig, TrainOptions
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.body_head import FedRep
from tapfl.personalize.fedala import FedAla
from tapfl.personalize.method import Method, Personal, Trainee, wholly
from tapfl.personalize.perfedavg import PerFedAvg
from tapfl.personalize.proximal import Ditto, FedProx, PFedMe
from tapfl.plugin import is_plugin, load_plugin
from tapfl.training import Objective, Params

BEGIN_LATER = ("apfl", "ditto")  # `personalize.from-round`: v beside w, begun as w


class FedAvg(Method[Trainee]):
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629): w ← w - η ∇f(w; ξ); nothing is personal."""

    has_local_state: ClassVar[bool] = False
    together: ClassVar[bool] = True
    steady: ClassVar[bool] = True

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
    together: ClassVar[bool] = True
    steady: ClassVar[bool] = True

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
class Pooled(Local):
    """`Local` on the training images of all devices, which only a simulation has: an upper bound for a device's model.

    The device's smaller model, its test images and the optimiser are as in every other method.
    """

    trains_on: ClassVar[str] = "pooled"


def method_of(options: PersonalizeOptions, adapters: AdapterOptions, round: int) -> Method[Any]:
    """Returns the method of a round (1 is the first).

    Before `personalize.from-round` the personal parameters are w, which is what `FedAvg` trains and uses. A plugin is
    called with (options, scale s of the adapters), once for each message.

    Raises:
        ConfigError: if it is a plugin that cannot be imported.
    """
    if is_plugin(options.method):
        plugin: Method[Any] = load_plugin("personalize.method", options.method)(options, adapters.scale)
        return plugin
    if options.method in BEGIN_LATER and round < options.from_round:
        return FedAvg()
    rate, scale = options.learning_rate, adapters.scale
    methods: dict[str, Callable[[], Method[Any]]] = {
        "apfl": lambda: Apfl(
            options.alpha,
            "fixed" if options.holds_out else options.alpha_update,
            options.alpha_learning_rate,
            options.alpha_per,
            rate,
        ),
        "ditto": lambda: Ditto(options.ditto_lambda, scale, rate),
        "local": lambda: Local(rate),
        "pooled": lambda: Pooled(rate),
        "fedavg": FedAvg,
        "fedavg+finetune": lambda: FineTune(rate),
        "fedprox": lambda: FedProx(options.prox_mu, scale),
        "pfedme": lambda: PFedMe(options.pfedme_lambda, scale, options.inner_steps, rate),
        "perfedavg": lambda: PerFedAvg(options.inner_learning_rate),
        "fedala": lambda: FedAla(options.ala_learning_rate, options.ala_layers, adapters.rule == "flex"),
        "fedper": FedAvg,  # of the body; its head is personal by `adapters.head`, and both are trained together
        "fedrep": lambda: FedRep(options.head_epochs, rate),
    }
    return methods[options.method]()


def never_begins(config: RunConfig) -> bool:
    """Returns whether the run is over before the personal parameters of its method begin."""
    return config.personalize.method in BEGIN_LATER and config.personalize.from_round > config.train.rounds
