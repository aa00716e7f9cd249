"""FedAvg, and methods that add a second model to it or share less."""

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
    """Local training only: v ← v - η_v ∇f(v; ξ), starting from the adapters received first. Nothing is shared.

    Attributes:
        learning_rate: η_v; 0 means that of `train`.
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

    The device's pruned model, its test images and the optimiser are the same as in every other method.
    """

    trains_on: ClassVar[str] = "pooled"


class Trainees(NamedTuple):
    """w and v in training; the same object if v is w."""

    w: Trainee
    v: Trainee


class TwoModels(Method[Trainees]):
    """A method that uploads w and evaluates v. A round starts from the device's last v if it is kept, else from v = w.

    Attributes:
        learning_rate: of v; 0 means that of `train`.
    """

    learning_rate: float

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: Names) -> Trainees:
        v = personal.params if personal and self.has_local_state else received
        return Trainees(Trainee.of(received, train, trained), Trainee.of(v, train, trained, self.learning_rate))

    def final(self, state: Trainees) -> tuple[Params | None, Personal | None]:
        return state.w.values(), wholly(state.v.values())


@dataclass(frozen=True)
class FineTune(TwoModels):
    """FedAvg with local fine-tuning (FedAvg+; Jiang et al. 2019, arXiv 1909.12488).

    A device uses v, the result of training the w just received for one round, and keeps nothing for the next round. If
    v has no learning rate of its own, it is the w that is uploaded.
    """

    evaluates_after_training: ClassVar[bool] = True
    has_local_state: ClassVar[bool] = False
    together: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    learning_rate: float = 0.0

    @property
    def models_per_step(self) -> int:
        return 2 if self.learning_rate else 1

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: Names) -> Trainees:
        w = Trainee.of(received, train, trained)
        return Trainees(w, Trainee.of(received, train, trained, self.learning_rate) if self.learning_rate else w)

    def step(self, state: Trainees, objective: Objective, batch: object) -> Tensor:
        for trainee in state[: self.models_per_step]:
            loss = objective(trainee.params, batch)
            trainee.apply(trainee.gradients(loss))
        return loss
