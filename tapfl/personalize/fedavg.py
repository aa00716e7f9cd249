"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): nothing is personal; the point of comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tapfl.config import TrainOptions
from tapfl.personalize.method import Personal
from tapfl.training import Objective, Params, leaves, optimizer


@dataclass
class Trainee:
    """Parameters in training with their optimizer."""

    params: Params
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, params: Params, train: TrainOptions) -> Trainee:
        copies = leaves(params)
        return cls(copies, optimizer(train.optimizer, list(copies.values()), train.learning_rate))

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(self.params.values()))

    def apply(self, gradients: tuple[Tensor, ...]) -> None:
        """One step with these gradients; they replace whatever gradients there were."""
        for parameter, gradient in zip(self.params.values(), gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def result(self) -> Params:
        return {name: parameter.detach() for name, parameter in self.params.items()}


class FedAvg:
    """w ← w - η ∇f(w; ξ)."""

    def init(self, received: Params, personal: Personal | None, train: TrainOptions) -> Trainee:
        return Trainee.of(received, train)

    def step(self, state: Trainee, objective: Objective, batch: object) -> Tensor:
        loss = objective(state.params, batch)
        state.apply(state.gradients(loss))
        return loss

    def final(self, state: Trainee) -> tuple[Params | None, Personal | None]:
        return state.result(), None

    def inference(self, received: Params, personal: Personal | None) -> Params:
        return received
