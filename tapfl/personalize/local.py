"""Local training alone: the device starts from the adapters it received first, and shares nothing."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from tapfl.config import TrainOptions
from tapfl.personalize.method import Personal, wholly
from tapfl.personalize.trainee import Trainee
from tapfl.training import Objective, Params


class Local:
    """v ← v - η ∇f(v; ξ)."""

    evaluates_after_training: ClassVar[bool] = False
    has_local_state: ClassVar[bool] = True
    shares_adapters: ClassVar[bool] = False
    models_per_step: ClassVar[int] = 1

    def init(
        self, received: Params, personal: Personal | None, train: TrainOptions, trained: frozenset[str]
    ) -> Trainee:
        return Trainee.of(personal.params if personal else received, train, trained)

    def step(self, state: Trainee, objective: Objective, batch: object) -> Tensor:
        loss = objective(state.params, batch)
        state.apply(state.gradients(loss))
        return loss

    def final(self, state: Trainee) -> tuple[Params | None, Personal | None]:
        return None, wholly(state.values())

    def inference(self, received: Params, personal: Personal | None) -> Params:
        return personal.params if personal else received
