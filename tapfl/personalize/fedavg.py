"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): nothing is personal; the point of comparison."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from tapfl.config import TrainOptions
from tapfl.personalize.method import Personal
from tapfl.personalize.trainee import Trainee
from tapfl.training import Objective, Params


class FedAvg:
    """w ← w - η ∇f(w; ξ)."""

    evaluates_after_training: ClassVar[bool] = False
    has_local_state: ClassVar[bool] = False
    shares_adapters: ClassVar[bool] = True
    models_per_step: ClassVar[int] = 1

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

    def inference(self, received: Params, personal: Personal | None) -> Params:
        return received
