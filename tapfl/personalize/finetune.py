"""FedAvg with local fine-tuning (FedAvg+; Jiang et al. 2019, arXiv 1909.12488)."""

from __future__ import annotations

from typing import ClassVar

from tapfl.personalize.fedavg import FedAvg
from tapfl.personalize.method import Personal, wholly
from tapfl.personalize.trainee import Trainee
from tapfl.training import Params


class FineTune(FedAvg):
    """FedAvg whose devices use what a round's local training makes of the w just received; nothing is carried over."""

    evaluates_after_training: ClassVar[bool] = True

    def final(self, state: Trainee) -> tuple[Params | None, Personal | None]:
        tuned = state.values()
        return tuned, wholly(tuned)

    def inference(self, received: Params, personal: Personal | None) -> Params:
        return personal.params if personal else received
