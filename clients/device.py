"""One device: computes each reply from the message, the device's images and its storage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clients import caches
from clients.images import OwnImages
from clients.references import References
from clients.storage import ALPHAS_FILE, DeviceState, DeviceStorage
from tapfl.adapters import rules
from tapfl.adapters.combination import clip_update
from tapfl.adapters.layout import pack, unpack
from tapfl.adapters.lora import interpolate
from tapfl.adapters.peft_format import save_peft
from tapfl.compute import HERE, Compute, home
from tapfl.config import RunConfig
from tapfl.data.augmentation import augmented
from tapfl.data.decoded import ahead
from tapfl.errors import DataError, RunError
from tapfl.models.cost import measure_cost
from tapfl.models.dense import DenseCache
from tapfl.models.forward import image_features
from tapfl.models.new_head import fill_with_prototypes
from tapfl.personalize.label_prior import informed, log_prior, with_prior
from tapfl.personalize.method import Method, Personal
from tapfl.personalize.methods import method_of
from tapfl.personalize.together import LocalTask, Training, carried_out
from tapfl.profiles import DeviceProfile
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.surgery import save_pruned, smaller_model
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

SHOWN_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # α at which the interpolation is tested at the end, for the report


@dataclass(frozen=True)
class Device:
    """One device of a federation: its number, its profile and its storage.

    Attributes:
        source: images that all belong to this device; empty: it has a part of the run's `data.source`.
        compute: the CPU or GPU for models, images and parameters in use. Sent and stored tensors are on the CPU.
    """

    config: RunConfig
    partition_id: int
    devices: int
    profile: DeviceProfile
    storage: DeviceStorage
    source: str = ""
    secret: str = field(default="", repr=False)
    compute: Compute = HERE

    def hello(self, message: Hello) -> HelloReply:
        """Returns the device's number and profile.

        Raises:
            DataError: if its images differ from those at the start of the run, and must not change.
        """
        return HelloReply(
            partition_id=self.partition_id,
            **{name: getattr(self.profile, name) for name in PROFILE_FIELDS},
            train_samples=self._images.begin(),
            holds_backbone=DenseCache(self._cache).holds(message.backbone_key),
            class_names=json.dumps(self._images.reported),
        )

    def summarize(self, message: Summarize) -> SummaryReply:
        """Fits the mixture to the training images. The test images are used only for the report."""
        self._receive_backbone(message)
        classes: Sequence[str] = json.loads(message.classes)
        if (self.source or self._images.names) and not self._images.keeps_names:
            self.storage.save_classes(classes)
        if self._images.too_few:
            raise DataError(f"device {self.partition_id}: has too few images now")
        model = caches.dense(self._cache, message.backbone_key, message.backbone_spec, self.compute)
        project = Projection(message.projection_mean, message.projection_components)
        train, test = self._images.part("train"), self._images.part("test")
        with self.compute.forward():
            features = image_features(model, train.split(256))
        points = project(features)
        summary = device_mixture(points, self.config.summary, self.config.seed, self.partition_id, self.secret)
        labels, test_labels = (home(part.labels) for part in (train, test))
        trained, tested = (known[known >= 0].bincount(minlength=len(classes)) for known in (labels, test_labels))
        own = self._images.names if self._images.keeps_names else classes
        self._images.note(own, trained[: len(own)].tolist(), tested[: len(own)].tolist())
        if self.config.model.head == "prototypes":
            model = fill_with_prototypes(model, features, labels.numpy())
        reports_classes = self.config.adapters.head == "class-rows"
        return SummaryReply(
            **vars(summary),
            dense_accuracy=self._accuracy(model),
            test_samples=len(test),
            classes=int((trained > 0).sum()),
            held_classes=trained.clamp(max=1).float().numpy() if reports_classes else np.zeros(0, np.float32),
        )

    def prune(self, message: Prune) -> PruneReply:
        """Stores the pruned model: the one that was sent, or the backbone cut by the plan.

        Its weights are frozen except for the head, which is sent with the adapters in each round.

        Raises:
            PlanError: if the plan does not fit the backbone, or the weights do not fit the plan.
        """
        plan = PruningPlan.from_json(message.plan)
        spec = plan.backbone.model_dump_json()
        dense = partial(caches.dense, self._cache, message.backbone_key, spec, self.compute)
        small = self.compute.put(smaller_model(plan, message.weights, dense))
        if self.config.model.head == "prototypes":
            train = self._images.part("train")
            small = fill_with_prototypes(small, image_features(small, train.split(256)), home(train.labels).numpy())
        self._references.begin(message.backbone_key, plan, simulated=not self.source)
        save_pruned(small, plan, self.storage.pruned, replace=True)
        if message.adapters.size:
            references = self._references.warm(self._start(message.adapters))
            self.storage.save_state(self.partition_id, 0, DeviceState(None, {}, references).moved(home), before=0)
        cost = measure_cost(small)
        return PruneReply(params=cost.params, macs=cost.macs, pruned_accuracy=self._accuracy(small))

    def train(self, message: Train) -> TrainReply:
        """Returns the reply of `training`, computed without other devices."""
        (reply,) = carried_out([self.training(message)])
        if isinstance(reply, Exception):
            raise reply
        return reply

    def training(self, message: Train) -> Training[TrainReply]:
        """Evaluates the received adapters, trains, stores the private model and returns the shared adapters.

        A device with too few images does nothing, and keeps its state.
        """
        if self._images.too_few:
            return TrainReply.absent(message.round, self._references.rates, adapters=np.zeros(0, np.float32), loss=0.0)
        state, method = self._state(message.state_round), self._method(message.round)
        received = self._whole(method, state, message.adapters)
        personal = self._weighted(method, received, state.personal, message.round)
        result = yield self._local_task(method, received, personal, message.round)
        used = result.personal if method.evaluates_after_training else personal
        due = is_evaluated(self.config.train, message.round - 1)
        accuracies = self._evaluate(received, method.inference(received, used)) if due else (0.0, 0.0)
        trained = home(result.upload or {})
        private = {name: trained[name] for name in self._pruned.private if name in trained}

        def train_reference(method: Method[Any], start: Params, model: caches.AdaptedDevice) -> Params:
            personal = self._local_task(method, start, None, message.round, model).alone().personal
            return personal.params if personal else start

        references = self._references.trained(state.references, self._pruned, message.round, train_reference)
        if method.has_local_state or private or references:
            kept = DeviceState(result.personal if method.has_local_state else None, private, references).moved(home)
            self.storage.save_state(self.partition_id, message.round, kept, before=message.state_round)
        return TrainReply(
            round=message.round,
            adapters=self._upload(home(received), trained, message.round),
            loss=result.loss,
            alpha=_alpha(used),
            global_accuracy=accuracies[0],
            personal_accuracy=accuracies[1],
            reference_accuracies=self._references.accuracies(state.references, self._pruned, self._score)
            if due
            else np.zeros(len(self._references.rates)),
            images=self._images.present,
        )

    def evaluate(self, message: Evaluate) -> EvaluateReply:
        """Evaluates the final adapters, and saves the personal model as an adapter that stock peft can load.

        A device with too few images does nothing.
        """
        if self._images.too_few:
            return EvaluateReply.absent(message.round, self._references.rates)
        state, method = self._state(message.state_round), self._method(message.round)
        received = self._whole(method, state, message.adapters)
        personal = self._weighted(method, received, state.personal, message.round)
        if method.evaluates_after_training:
            personal = self._local_task(method, received, personal, message.round).alone().personal
        final = method.inference(received, personal)
        accuracies = self._evaluate(received, final)
        if personal and self.config.personalize.method == "apfl":
            accuracies_at = [self._score(interpolate(personal.params, received, a)) for a in SHOWN_ALPHAS]
            self.storage.note(ALPHAS_FILE, {"alpha": SHOWN_ALPHAS, "accuracy": accuracies_at})
        final = with_prior(final, self._prior())
        save_peft(home(final), self.config.adapters.scale, self.storage.personal, base=str(self.storage.pruned))
        references = self._references.accuracies(state.references, self._pruned, self._score)
        return EvaluateReply(message.round, _alpha(personal), *accuracies, references, self._images.present)

    def _method(self, round: int) -> Method[Any]:
        """Returns the method of a round, with the round's learning rate."""
        options = self.config.personalize
        rate = rate_factor(self.config.train, round) * options.learning_rate
        return method_of(options.model_copy(update={"learning_rate": rate}), self.config.adapters, round)

    @cached_property
    def _images(self) -> OwnImages:
        return OwnImages(self.config, self.devices, self.partition_id, self.source, self.storage, self.compute)

    @cached_property
    def _pruned(self) -> caches.AdaptedDevice:
        return caches.pruned(self.storage.pruned, self.partition_id, self.profile.rank, self.config, self.compute)

    def _state(self, round: int) -> DeviceState:
        kept = self._method(round).has_local_state or self._pruned.private or self.config.personalize.references
        state = self.storage.load_state(self.partition_id, round) if kept else DeviceState(None, {})
        return state.moved(self.compute.put)

    def _whole(self, method: Method[Any], state: DeviceState, adapters: np.ndarray) -> Params:
        """Returns all of w: the received tensors, and those that are never sent (frozen and private ones).

        With a method that shares nothing, w is received once; later the device's private model takes its place.
        """
        if not adapters.size and not method.shares_adapters and state.personal is not None:
            return state.personal.params
        return self._start(adapters, state.private)

    def _start(self, adapters: np.ndarray, private: Params | None = None) -> Params:
        """Returns all of w: the received tensors, the private ones, and initial values of the others."""
        layout = self._pruned.layout
        whole = self._pruned.start | (private or {}) | unpack(adapters, rules.down(self.config.adapters, layout))
        return self.compute.put({name: whole[name] for name in layout})

    def _weighted(
        self, method: Method[Any], received: Params, personal: Personal | None, round: int
    ) -> Personal | None:
        """Returns the private model with α chosen for the w just received (`Method.weigh`)."""
        chosen = self._images.weighing(round)
        if personal is None or not (chosen or self.config.personalize.holds_out):
            return personal
        (adapted, train), prior = self._images.inputs("train", self._pruned), self._prior()

        def losses(index: np.ndarray, params: Params) -> Tensor:
            labels = train.labels[torch.from_numpy(index)]
            logits = informed(adapted(params, train.batch(index)), prior)
            return F.cross_entropy(logits, labels, reduction="none")

        return method.weigh(received, personal, [partial(losses, index) for index in chosen])

    @property
    def _references(self) -> References:
        return References(self.config, self.storage, self.profile.rank, self.compute)

    def _local_task(
        self,
        method: Method[Any],
        received: Params,
        personal: Personal | None,
        round: int,
        reference: caches.AdaptedDevice | None = None,
    ) -> LocalTask:
        """Returns the local training of a round, not computed yet.

        Args:
            reference: a model to train for comparison, on all training images. By default, the device's own model is
                trained.
        """
        own, options, seed = reference or self._pruned, self.config.train, self.config.seed
        adapted, part = self._images.inputs(method.trains_on, own)
        positions = self._images.trained_and_held_out[0]
        if reference or method.trains_on != "train":  # in as many steps as a device's own model on its own images
            options = options.model_copy(update={"steps": local_steps(len(positions), options)})
            positions = np.arange(len(part))

        def drawn() -> Iterator[tuple[Tensor, Tensor]]:
            order = numpy_generator(seed, "train", round, self.partition_id)
            changes = numpy_generator(seed, "augment", round, self.partition_id)
            chosen = (positions[batch] for batch in local_batches(len(positions), options, order))
            for index, inputs in ahead(lambda index: (index, part.batch(index)), chosen):
                there = self.compute.put(torch.from_numpy(index))
                yield augmented(inputs, options.augment, changes), part.labels[there]

        trained = rules.trained(self.config.adapters, own.layout, round)
        rate = rate_factor(options, round) * options.learning_rate
        update = {"learning_rate": rate, "steps": local_steps(len(positions), options)}
        train = options.model_copy(update=update)
        device = self.partition_id, self._prior(method.trains_on), self.compute.recorder
        return LocalTask(method, adapted, received, personal, drawn(), train, trained, *device)

    def _upload(self, received: Params, trained: Params, round: int) -> np.ndarray:
        """Returns the upload as one flat vector; with differential privacy, the update is clipped to `dp-clip`."""
        layout = rules.up(self.config.adapters, self._pruned.layout, round) if trained else {}
        shared = {name: trained[name] for name in layout}
        if shared and self.config.privacy.dp_clip:
            shared = clip_update(shared, received, layout, self.config.privacy.dp_clip)
        return pack(shared, layout) if layout else np.zeros(0, np.float32)

    def _evaluate(self, received: Params, used: Params) -> tuple[float, float]:
        """Returns the test accuracies of the received adapters and of the model that the device uses."""
        shared = self._score(received)
        return shared, shared if used is received else self._score(used)

    def _score(self, params: Params, own: caches.AdaptedDevice | None = None) -> float:
        """Returns the test accuracy of a model, by default the device's own, with these adapters."""
        (adapted, test), prior = self._images.inputs("test", own or self._pruned), self._prior()
        return self._accuracy(lambda x: informed(adapted(params, x), prior), test)

    def _prior(self, part: str = "train") -> Tensor | None:
        """Returns the label prior log p(y) of a part of the images, or None without `train.label-prior`."""
        model: Any = self._pruned.adapted.model
        labels = self._images.part(part).labels
        return self.compute.put(log_prior(self.config.train.label_prior, labels, model.num_classes))

    def _accuracy(self, model: Callable[[Any], Tensor], inputs: caches.Inputs | None = None) -> float:
        """Returns the test accuracy of a model that takes these inputs, by default images."""
        test = inputs or self._images.part("test")
        with self.compute.forward():
            return accuracy(predict(model, test), test.labels)

    def _receive_backbone(self, message: Summarize) -> None:
        cache = DenseCache(self._cache)
        if message.backbone_weights:
            cache.receive(message.backbone_key, message.backbone_weights)
        elif not cache.holds(message.backbone_key):
            raise RunError(f"device {self.partition_id}: backbone {message.backbone_key} is neither cached nor sent")

    @property
    def _cache(self) -> Path:
        return cache_folder(self.config.cache)


def _alpha(personal: Personal | None) -> float:
    return personal.mean_alpha if personal else 0.0
