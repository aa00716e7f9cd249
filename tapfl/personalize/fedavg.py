"""FedAvg, and the methods that differ from it in a second model or in what is shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from tapfl.config import TrainOptions
from tapfl.personalize.method import Method, Names, Personal, Trainee, wholly
from tapfl.training import Objective, Params


class FedAvg(Method[Trainee]):
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629): w ← w - η ∇f(w; ξ); nothing is personal."""

    has_local_state: ClassVar[bool] = False
    together: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: Names) -> Trainee:
        return Trainee.of(received, train, trained)

    def step(self, state: Trainee, objective: Objective, batch: object) -> Tensor:
        loss = objective(state.params, batch)
        state.apply(state.gradients(loss))
        return loss

    def final(self, state: Trainee) -> tuple[Params | None, Personal | None]:
        return state.values(), None


@dataclass(frozen=True)
class Local(FedAvg):
    """Local training alone: v ← v - η_v ∇f(v; ξ), from the adapters received first; nothing is shared.

    Attributes:
        learning_rate: η_v; 0: that of `train`.
    """

    has_local_state: ClassVar[bool] = True
    shares_adapters: ClassVar[bool] = False

    learning_rate: float = 0.0

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: Names) -> Trainee:
        return Trainee.of(personal.params if personal else received, train, trained, self.learning_rate)

    def final(self, state: Trainee) -> tuple[Params | None, Personal | None]:
        return None, wholly(state.values())


@dataclass(frozen=True)
class Pooled(Local):
    """`Local` on the training images of all devices, which only a simulation has: an upper bound for a device's model.

    The device's smaller model, its test images and the optimiser are as in every other method.
    """

    trains_on: ClassVar[str] = "pooled"


class Beside(NamedTuple):
    """w in training, and v in training beside it; one and the same where v is w."""

    w: Trainee
    v: Trainee


class TwoModels(Method[Beside]):
    """A method that uploads w and uses v. A round begins with the v that stayed, if it does, and otherwise with v = w.

    Attributes:
        learning_rate: of v; 0: that of `train`.
    """

    learning_rate: float

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: Names) -> Beside:
        v = personal.params if personal and self.has_local_state else received
        return Beside(Trainee.of(received, train, trained), Trainee.of(v, train, trained, self.learning_rate))

    def final(self, state: Beside) -> tuple[Params | None, Personal | None]:
        return state.w.values(), wholly(state.v.values())


@dataclass(frozen=True)
class FineTune(TwoModels):
    """FedAvg with local fine-tuning (FedAvg+; Jiang et al. 2019, arXiv 1909.12488).

    A device uses the result v of a round's local training on the w just received; it keeps nothing for the next round.
    Without a learning rate of its own v is the w that is uploaded.
    """

    evaluates_after_training: ClassVar[bool] = True
    has_local_state: ClassVar[bool] = False
    together: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    learning_rate: float = 0.0

    @property
    def models_per_step(self) -> int:
        return 2 if self.learning_rate else 1

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: Names) -> Beside:
        w = Trainee.of(received, train, trained)
        return Beside(w, Trainee.of(received, train, trained, self.learning_rate) if self.learning_rate else w)

    def step(self, state: Beside, objective: Objective, batch: object) -> Tensor:
        for trainee in state[: self.models_per_step]:
            loss = objective(trainee.params, batch)
            trainee.apply(trainee.gradients(loss))
        return loss
