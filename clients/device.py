"""What one device does with a message: a function of the message, its own images and its own storage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients import caches
from clients.storage import DeviceStorage
from tapfl.adapters.layout import Params, pack, unpack
from tapfl.adapters.peft_format import save_peft
from tapfl.config import RunConfig
from tapfl.errors import RunError
from tapfl.models.cost import measure_cost
from tapfl.models.dense import DenseCache
from tapfl.personalize.method import Method, Personal, local_round, method_of
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.surgery import rebuild, save_pruned, shrink
from tapfl.seeds import numpy_generator
from tapfl.store import cache_folder
from tapfl.summary.descriptors import Projection, image_features
from tapfl.summary.mixture import fit_mixture
from tapfl.training import accuracy, batches, cross_entropy, predict
from tapfl.wire import (
    Evaluate,
    EvaluateReply,
    Hello,
    HelloReply,
    Prune,
    PruneReply,
    Summarize,
    SummaryReply,
    Train,
    TrainReply,
)


@dataclass(frozen=True)
class Device:
    """One device of a federation: which it is, what it can do, and where it keeps what is its own."""

    config: RunConfig
    partition_id: int
    devices: int
    budget: float
    rank: int
    storage: DeviceStorage

    def hello(self, message: Hello) -> HelloReply:
        """Says who the device is and what it can do."""
        return HelloReply(
            partition_id=self.partition_id,
            budget=self.budget,
            rank=self.rank,
            train_samples=len(self._part("train")[1]),
            holds_backbone=DenseCache(self._cache).holds(message.backbone_key),
        )

    def summarize(self, message: Summarize) -> SummaryReply:
        """Fits the mixture of the training part; its test part serves the report alone."""
        self._receive_backbone(message)
        model = caches.dense(self._cache, message.backbone_key, message.backbone_spec)
        project = Projection(message.projection_mean, message.projection_components)
        inputs, labels = self._part("train")
        drawn = int(numpy_generator(self.config.seed, "mixture", self.partition_id).integers(2**31))
        summary = fit_mixture(project(image_features(model, inputs.split(256))), self.config.summary, drawn)
        test_inputs, test_labels = self._part("test")
        return SummaryReply(
            weights=summary.weights,
            means=summary.means,
            covariances=summary.covariances,
            n=summary.n,
            dense_accuracy=accuracy(predict(model, test_inputs), test_labels),
            test_samples=len(test_labels),
            classes=len(labels.unique()),
        )

    def prune(self, message: Prune) -> PruneReply:
        """Keeps the smaller model: the one that was sent, or the backbone cut as the plan says.

        All of it stays as it is but the head, which is trained as a whole and comes with the adapters of each round.

        Raises:
            PlanError: if the plan does not fit the backbone, or the weights do not fit the plan.
        """
        plan = PruningPlan.from_json(message.plan)
        if message.weights:
            small = rebuild(plan, message.weights)
        else:
            dense = caches.dense(self._cache, message.backbone_key, plan.backbone.model_dump_json())
            small = shrink(dense, plan)
        save_pruned(small, plan, self.storage.pruned, replace=True)
        cost = measure_cost(small)
        inputs, labels = self._part("test")
        return PruneReply(params=cost.params, macs=cost.macs, pruned_accuracy=accuracy(predict(small, inputs), labels))

    def train(self, message: Train) -> TrainReply:
        """Evaluates what arrived, trains on it, keeps the personal part and returns the shared one."""
        own = self._pruned()
        received = unpack(message.adapters, own.layout)
        personal = self.storage.load_state(before=message.round)
        global_accuracy, personal_accuracy = self._evaluate(own, received, personal)
        inputs, labels = self._part("train")

        def objective(params: Params, batch: object) -> Tensor:
            index = torch.from_numpy(batch)
            return cross_entropy(own.adapted(params, inputs[index]), labels[index])

        options = self.config.train
        order = numpy_generator(self.config.seed, "train", message.round, self.partition_id)
        result = local_round(
            self._method(),
            objective,
            received,
            personal,
            batches(len(labels), options.batch, options.epochs, order),
            options,
            frozenset(own.layout),
        )
        if result.personal is not None:
            self.storage.save_state(message.round, result.personal)
        return TrainReply(
            round=message.round,
            adapters=np.zeros(0, np.float32) if result.upload is None else pack(result.upload, own.layout),
            loss=result.loss,
            alpha=result.personal.mean_alpha if result.personal else 0.0,
            global_accuracy=global_accuracy,
            personal_accuracy=personal_accuracy,
        )

    def evaluate(self, message: Evaluate) -> EvaluateReply:
        """Evaluates what arrived last, and writes the personal model as an adapter that stock peft loads."""
        own = self._pruned()
        received = unpack(message.adapters, own.layout)
        personal = self.storage.load_state(before=message.round)
        global_accuracy, personal_accuracy = self._evaluate(own, received, personal)
        final = self._method().inference(received, personal)
        save_peft(final, self.config.adapters.scale, self.storage.personal, base=str(self.storage.pruned))
        return EvaluateReply(
            round=message.round,
            alpha=personal.mean_alpha if personal else 0.0,
            global_accuracy=global_accuracy,
            personal_accuracy=personal_accuracy,
        )

    def _evaluate(self, own: caches.PrunedDevice, received: Params, personal: Personal | None) -> tuple[float, float]:
        """Accuracy on the test part: of the adapters as received, and of the model that the device would use."""
        inputs, labels = self._part("test")
        used = self._method().inference(received, personal)

        def score(params: Params) -> float:
            return accuracy(predict(partial(own.adapted, params), inputs), labels)

        return score(received), score(used)

    def _method(self) -> Method[Any]:
        return method_of(self.config.personalize, self.config.adapters.scale)

    def _receive_backbone(self, message: Summarize) -> None:
        cache = DenseCache(self._cache)
        if message.backbone_weights:
            cache.receive(message.backbone_key, message.backbone_weights)
        elif not cache.holds(message.backbone_key):
            raise RunError(f"device {self.partition_id}: has no backbone {message.backbone_key} and was sent none")

    def _part(self, name: str) -> tuple[Tensor, Tensor]:
        return caches.part(self.config, self.devices, self.partition_id, name)

    def _pruned(self) -> caches.PrunedDevice:
        return caches.pruned(self.storage.pruned, self.rank, self.config.adapters.scale)

    @property
    def _cache(self) -> Path:
        return cache_folder(self.config.cache)
