"""Parameters in training, of which some may be constants of the round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tapfl.config import TrainOptions
from tapfl.training import Params, optimizer


@dataclass(frozen=True)
class Trainee:
    """Parameters with the optimizer of those that move.

    Attributes:
        params: all of them, in the order in which they were given.
        moving: those that are trained; the others stay to the bit.
        optimizer: over `moving`.
    """

    params: Params
    moving: Params
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, params: Params, train: TrainOptions, trained: frozenset[str]) -> Trainee:
        """Returns copies in training, of which those named in `trained` move."""
        copies = {name: theta.detach().clone(memory_format=torch.contiguous_format) for name, theta in params.items()}
        return cls.over(copies, train, trained)

    @classmethod
    def over(cls, memory: Params, train: TrainOptions, trained: frozenset[str]) -> Trainee:
        """The same without copies: these tensors themselves, which must be contiguous, change at each step."""
        params = {name: theta.detach().requires_grad_(name in trained) for name, theta in memory.items()}
        moving = {name: theta for name, theta in params.items() if name in trained}
        return cls(params, moving, optimizer(train.optimizer, list(moving.values()), train.learning_rate, fused=True))

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of `moving`."""
        return torch.autograd.grad(loss, list(self.moving.values()))

    def apply(self, gradients: Sequence[Tensor]) -> None:
        """One step with these gradients of `moving`; they replace whatever gradients there were."""
        for parameter, gradient in zip(self.moving.values(), gradients, strict=True):
            parameter.grad = gradient.contiguous()  # fused Adam reads the memory of both as it lies
        self.optimizer.step()

    def values(self) -> Params:
        """Returns the parameters as they are now, as constants."""
        return {name: parameter.detach() for name, parameter in self.params.items()}
