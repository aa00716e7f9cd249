"""Local training alone: the device starts from the adapters it received first, and shares nothing."""

from __future__ import annotations

from torch import Tensor

from tapfl.config import TrainOptions
from tapfl.personalize.fedavg import Trainee
from tapfl.personalize.method import Personal
from tapfl.training import Objective, Params


class Local:
    """v ← v - η ∇f(v; ξ)."""

    def init(self, received: Params, personal: Personal | None, train: TrainOptions) -> Trainee:
        return Trainee.of(personal.params if personal else received, train)

    def step(self, state: Trainee, objective: Objective, batch: object) -> Tensor:
        loss = objective(state.params, batch)
        state.apply(state.gradients(loss))
        return loss

    def final(self, state: Trainee) -> tuple[Params | None, Personal | None]:
        return None, Personal(state.result(), 1.0)

    def inference(self, received: Params, personal: Personal | None) -> Params:
        return personal.params if personal else received
