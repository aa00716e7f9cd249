"""A shared body with a personal head: FedRep.

The body is the adapters that the rule shares, and the head is the classifier. FedPer (Arivazhagan et al. 2019, arXiv
1912.00818, Algorithm 1) trains body and head together and averages the bodies; here it is FedAvg with
`adapters.head=personal`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tapfl.adapters.layout import LORA_A, LORA_B
from tapfl.config import TrainOptions
from tapfl.personalize.method import Method, Names, Personal, Trainee
from tapfl.training import Objective, Params


@dataclass
class FedRepState:
    """The state of a round: first the head is trained, then the body.

    Attributes:
        now: w in training: first its head, later its body.
        train: the training options.
        body: names of the tensors of the body that are trained.
        left: remaining steps of the head; at 0 the training of the body begins.
    """

    now: Trainee
    train: TrainOptions
    body: frozenset[str]
    left: int = 0


@dataclass(frozen=True)
class FedRep(Method[FedRepState]):
    """FedRep (Collins et al. 2021, arXiv 2102.07078, Algorithm 1): trains the personal head, then the shared body.

        h ← h - η_h ∇_h f(h, φ_received; ξ)     in the first `head_epochs` epochs of a round
        φ ← φ - η ∇_φ f(h, φ; ξ)                in the other epochs, with the new h fixed

    Both h and φ are parts of w. The server never gets h, because `adapters.head` is `personal`.

    Attributes:
        head_epochs: number of epochs of a round in which the head is trained.
        learning_rate: η_h; 0 means η.
    """

    has_local_state: ClassVar[bool] = False  # the head is kept as a part of w that is not shared

    head_epochs: int = 1
    learning_rate: float = 0.0

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: Names) -> FedRepState:
        body = frozenset(name for name in trained if name.endswith((LORA_A, LORA_B)))
        head = Trainee.of(received, train, trained - body, self.learning_rate)
        return FedRepState(head, train, body, self.head_epochs * train.steps // train.epochs)

    def step(self, state: FedRepState, objective: Objective, batch: object) -> Tensor:
        if state.left == 0:
            state.now = Trainee.of(state.now.values(), state.train, state.body)
        state.left -= 1
        loss = objective(state.now.params, batch)
        state.now.apply(state.now.gradients(loss))
        return loss

    def final(self, state: FedRepState) -> tuple[Params | None, Personal | None]:
        return state.now.values(), None
