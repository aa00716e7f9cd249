"""One device: each reply is a function of the message, the device's images and its storage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clients import caches
from clients.storage import DeviceState, DeviceStorage
from tapfl.adapters import rules
from tapfl.adapters.combination import clip_update
from tapfl.adapters.layout import pack, unpack
from tapfl.adapters.peft_format import save_peft
from tapfl.config import RunConfig
from tapfl.data.augmentation import augmented
from tapfl.data.contents import fingerprints
from tapfl.errors import RunError
from tapfl.models.cost import measure_cost
from tapfl.models.dense import DenseCache
from tapfl.models.forward import image_features
from tapfl.personalize.method import LocalResult, Method, Personal, local_round
from tapfl.personalize.methods import method_of
from tapfl.profiles import DeviceProfile
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.surgery import rebuild, save_pruned, shrink
from tapfl.seeds import numpy_generator
from tapfl.store import cache_folder
from tapfl.summary.metric_set import Projection
from tapfl.summary.mixture import device_mixture
from tapfl.training import Params, accuracy, is_evaluated, local_batches, local_steps, predict, rate_factor
from tapfl.wire import (
    PROFILE_FIELDS,
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
    """One device of a federation: its number, its profile and its storage.

    Attributes:
        source: images that all belong to this device; empty: its part of the run's `data.source`.
    """

    config: RunConfig
    partition_id: int
    devices: int
    profile: DeviceProfile
    storage: DeviceStorage
    source: str = ""
    secret: str = field(default="", repr=False)

    def hello(self, message: Hello) -> HelloReply:
        """Returns the device's number and profile.

        Raises:
            DataError: if its images are not those that the run began with.
        """
        self.storage.begin(fingerprints([self._images]))
        _, split = caches.images_of(self.config, self.devices, self.partition_id, self.source, self._fingerprint)
        return HelloReply(
            partition_id=self.partition_id,
            **{name: getattr(self.profile, name) for name in PROFILE_FIELDS},
            train_samples=len(split.train),
            holds_backbone=DenseCache(self._cache).holds(message.backbone_key),
        )

    def summarize(self, message: Summarize) -> SummaryReply:
        """Fits the mixture to the training part; the test part is used for the report only."""
        self._receive_backbone(message)
        classes: list[str] = json.loads(message.classes)
        if self.source:
            self.storage.save_classes(classes)
        model = caches.dense(self._cache, message.backbone_key, message.backbone_spec)
        project = Projection(message.projection_mean, message.projection_components)
        inputs, labels = self._part("train")
        points = project(image_features(model, inputs.split(256)))
        summary = device_mixture(points, self.config.summary, self.config.seed, self.partition_id, self.secret)
        test_inputs, test_labels = self._part("test")
        held, tested = (each.bincount(minlength=len(classes)) for each in (labels, test_labels))
        self.storage.save_images(classes, held.tolist(), tested.tolist())
        reports_classes = self.config.adapters.head == "class-rows"
        return SummaryReply(
            **vars(summary),
            dense_accuracy=accuracy(predict(model, test_inputs), test_labels),
            test_samples=len(test_labels),
            classes=len(labels.unique()),
            held_classes=held.clamp(max=1).float().numpy() if reports_classes else np.zeros(0, np.float32),
        )

    def prune(self, message: Prune) -> PruneReply:
        """Stores the smaller model: the one that was sent, or the backbone cut by the plan.

        It is frozen except for the head, which is trained as a whole and arrives with the adapters of each round.

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
        """Evaluates the received adapters, trains, stores the personal part and returns the shared part."""
        state, method = self._state(message.state_round), self._method()
        received = self._whole(state, message.adapters)
        before = method.inference(received, state.personal)
        result = self._local_round(received, state.personal, message.round)
        used = method.inference(received, result.personal) if method.evaluates_after_training else before
        due = is_evaluated(self.config.train, message.round - 1)
        global_accuracy, personal_accuracy = self._evaluate(received, used) if due else (0.0, 0.0)
        trained = result.upload or {}
        private = {name: trained[name] for name in self._pruned.private if name in trained}
        if method.has_local_state or self._pruned.private:
            kept = DeviceState(result.personal if method.has_local_state else None, private)
            self.storage.save_state(self.partition_id, message.round, kept, before=message.state_round)
        return TrainReply(
            round=message.round,
            adapters=self._upload(received, trained, message.round),
            loss=result.loss,
            alpha=_alpha(result.personal),
            global_accuracy=global_accuracy,
            personal_accuracy=personal_accuracy,
        )

    def evaluate(self, message: Evaluate) -> EvaluateReply:
        """Evaluates the last adapters, and writes the personal model as an adapter that stock peft loads."""
        state, method = self._state(message.state_round), self._method()
        received, personal = self._whole(state, message.adapters), state.personal
        if method.evaluates_after_training:
            personal = self._local_round(received, personal, message.round).personal
        final = method.inference(received, personal)
        accuracies = self._evaluate(received, final)
        save_peft(final, self.config.adapters.scale, self.storage.personal, base=str(self.storage.pruned))
        return EvaluateReply(message.round, _alpha(state.personal), *accuracies)

    def _method(self, factor: float = 1.0) -> Method[Any]:
        """Returns the method with its learning rate times `factor`."""
        options = self.config.personalize
        scaled = options.model_copy(update={"learning_rate": factor * options.learning_rate})
        return method_of(scaled, self.config.adapters.scale)

    @cached_property
    def _pruned(self) -> caches.PrunedDevice:
        return caches.pruned(self.storage.pruned, self.partition_id, self.profile.rank, self.config)

    def _state(self, round: int) -> DeviceState:
        kept = self._method().has_local_state or self._pruned.private
        return self.storage.load_state(self.partition_id, round) if kept else DeviceState(None, {})

    def _whole(self, state: DeviceState, adapters: np.ndarray) -> Params:
        """Returns all of w: the tensors that arrived, and those never sent: frozen and private ones.

        With a method that shares nothing, w arrives once; after that the device's personal parameters take its place.
        """
        if not adapters.size and not self._method().shares_adapters and state.personal is not None:
            return state.personal.params
        layout = self._pruned.layout
        whole = self._pruned.start | state.private | unpack(adapters, rules.down(self.config.adapters, layout))
        return {name: whole[name] for name in layout}

    def _local_round(self, received: Params, personal: Personal | None, round: int) -> LocalResult:
        inputs, labels = self._part("train")
        own, options, seed = self._pruned, self.config.train, self.config.seed

        def objective(params: Params, batch: Any) -> Tensor:
            x, y = batch
            return F.cross_entropy(own.adapted(params, x), y, label_smoothing=options.label_smoothing)

        def drawn() -> Iterator[tuple[Tensor, Tensor]]:
            order = numpy_generator(seed, "train", round, self.partition_id)
            changes = numpy_generator(seed, "augment", round, self.partition_id)
            for index in map(torch.from_numpy, local_batches(len(labels), options, order)):
                yield augmented(inputs[index], options.augment, changes), labels[index]

        factor, trained = rate_factor(options, round), rules.trained(self.config.adapters, own.layout, round)
        update = {"learning_rate": factor * options.learning_rate, "steps": local_steps(len(labels), options)}
        train = options.model_copy(update=update)
        return local_round(self._method(factor), objective, received, personal, drawn(), train, trained)

    def _upload(self, received: Params, trained: Params, round: int) -> np.ndarray:
        """Returns the upload as one flat vector; with differential privacy, within `dp-clip` of the received w."""
        layout = rules.up(self.config.adapters, self._pruned.layout, round) if trained else {}
        shared = {name: trained[name] for name in layout}
        if shared and self.config.privacy.dp_clip:
            shared = clip_update(shared, received, layout, self.config.privacy.dp_clip)
        return pack(shared, layout) if layout else np.zeros(0, np.float32)

    def _evaluate(self, received: Params, used: Params) -> tuple[float, float]:
        """Returns accuracies on the test part: of the received adapters, and of the model that the device uses."""
        inputs, labels = self._part("test")

        def score(params: Params) -> float:
            return accuracy(predict(partial(self._pruned.adapted, params), inputs), labels)

        shared = score(received)
        return shared, shared if used is received else score(used)

    def _receive_backbone(self, message: Summarize) -> None:
        cache = DenseCache(self._cache)
        if message.backbone_weights:
            cache.receive(message.backbone_key, message.backbone_weights)
        elif not cache.holds(message.backbone_key):
            raise RunError(f"device {self.partition_id}: backbone {message.backbone_key} is neither cached nor sent")

    def _part(self, name: str) -> tuple[Tensor, Tensor]:
        classes = self.storage.classes if self.source else ()
        owner = (self.config, self.devices, self.partition_id)
        return caches.part(*owner, name, self.source, self._fingerprint, classes)

    @property
    def _images(self) -> tuple[str, str]:
        """The option that names the device's images, and its value."""
        return ("data", self.source) if self.source else ("data.source", self.config.data.source)

    @cached_property
    def _fingerprint(self) -> str:
        """Of the images that the run began with; empty if they are built in."""
        return next(iter(self.storage.source.values()), "")

    @property
    def _cache(self) -> Path:
        return cache_folder(self.config.cache)


def _alpha(personal: Personal | None) -> float:
    return personal.mean_alpha if personal else 0.0
