"""Round zero: the server asks the devices for their mixtures, makes a plan for each, and sends the pruned models.

Each result is stored in the run's folder at once, so that a resumed run only asks for and computes what is missing. A
device that sends no mixture gets the generic plan for its budget, made from the whole public pool.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.common.logger import log

from strategies import round_zero
from strategies.exchange import Request
from strategies.fleet import Fleet, sample_clients
from strategies.records import CLASSES, DeviceRecord, DriftLine, FailureLine, append_lines, read_classes
from strategies.round_zero import PublicPool, Shared
from strategies.state import FederationState
from tapfl.adapters.layout import adapted_share
from tapfl.compute import HERE, Compute
from tapfl.config import NEW_HEADS, RunConfig
from tapfl.data.decoded import cores
from tapfl.data.images import ImageSet
from tapfl.errors import BudgetError, PlanError, RunError
from tapfl.models.cost import Cost, measure_cost
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.models.new_head import agreed_classes, with_new_head
from tapfl.models.prunable import prunable_layers
from tapfl.progress import stage
from tapfl.pruning.budget import Budget
from tapfl.pruning.plan import PruningPlan, load_plan, require_device, signed
from tapfl.run_folder import RunFolder
from tapfl.store import cache_folder, read_sealed, write_bytes, write_json, write_sealed
from tapfl.summary.heterogeneity import feature_shift
from tapfl.summary.mixture import GaussianSummary
from tapfl.wire import ENVELOPE, MAX_SAMPLES, Prune, PruneReply, Summarize, SummaryReply

AT_ONCE = 4  # most pruned models made at a time; for each, a batch of 64 has 1.2 GB of activations (DeiT-S, 224 px)


class Preparation:
    """The server's side of round zero, and the dense backbone.

    Attributes:
        key: name of the backbone in the caches.
        backbone: the dense backbone as devices have it, with a head of `classes`.
        judge: the same backbone with the head whose predictions are used in round zero. It differs from `backbone`
            only if `agree` has given `backbone` a new head (`tapfl.models.new_head`).
    """

    def __init__(
        self, config: RunConfig, images: ImageSet, folder: RunFolder, fleet: Fleet, compute: Compute = HERE
    ) -> None:
        self.config, self.images, self.folder, self.fleet, self.compute = config, images, folder, fleet, compute
        self.cache = DenseCache(cache_folder(config.cache))
        self.key, self.spec, self.backbone = dense_backbone(config.model, images, config.seed, self.cache, compute)
        self.judge, self.classes = self.backbone, images.classes
        log(logging.INFO, "dense backbone ready: %s", self.key)

    def agree(self) -> bool:
        """Gives the backbone a new head of the devices' classes, if `model.head` asks for it; returns whether it does.

        The classes are stored in the run's folder. A resumed run keeps them, whichever devices are connected then.

        Raises:
            PlanError: if the stored classes are damaged.
            ModelError: as `with_new_head`.
        """
        if self.config.model.head not in NEW_HEADS:
            return False
        if not (file := self.folder.path / CLASSES).exists():
            write_json(file, agreed_classes(self.fleet.classes.values()))
        old, self.classes = (self.key, self.spec, self.judge), tuple(read_classes(file))
        self.key, self.spec, self.backbone = with_new_head(self.config.model, old, self.classes, self.cache)
        log(logging.INFO, "new head: %d classes", len(self.classes))
        return True

    @cached_property
    def cost(self) -> Cost:
        return measure_cost(self.backbone)

    @cached_property
    def pool(self) -> PublicPool:
        with stage("public pool"):
            return round_zero.describe_pool(self.config, self.images, self.judge, self.compute)

    def metric_set(self, record: DeviceRecord) -> np.ndarray:
        """Returns the positions in the pool of the images with which a device's model is pruned."""
        reply, options = self._stored_summary(record.device), self.config.summary
        dim = self.pool.points.shape[1]
        summary = reply.mixture(dim, options.min_support, self._announced(record)) if reply else None
        return round_zero.task_images(self.pool, summary, self.config.metric, self.config.seed, record.device)

    def pruned_models(self, state: FederationState) -> tuple[FederationState, list[int]]:
        """Asks the devices for their mixtures and makes a plan for each; returns the devices that now have a plan.

        Raises:
            RunError: if too few devices send a mixture, or no device has a budget that can be met.
        """
        state, summaries = self._summaries(state)
        state = state.with_devices({i: {"generic": i not in summaries} for i in state.devices})
        planned: list[int] = []

        def make(shared: Shared, group: Sequence[DeviceRecord]) -> BudgetError | None:
            try:
                if missing := [record for record in group if not self.plan_file(record.device).exists()]:
                    self._plan(shared, summaries, missing)
            except BudgetError as error:  # only these devices get no model
                return error
            return None

        with stage("smaller models") as advance:
            new_head = self.backbone if self.backbone is not self.judge else None
            groups = round_zero.alike(self.config, state.devices.values())
            advance(0, len(groups))
            budgets = [group[0].profile.budget for group in groups]
            config = round_zero.probed(self.config, budgets, self.pool)
            shared = Shared(config, self.pool, self.judge, self.compute, new_head)
            errors = round_zero.side_by_side(shared, make, groups, self._at_once(budgets))
            for done, (group, error) in enumerate(zip(groups, errors, strict=True), start=1):
                for record in group:
                    i = record.device
                    if isinstance(error, BudgetError):
                        append_lines(self.folder.path, FailureLine(phase="smaller models", device=i, reason=str(error)))
                        state = state.with_devices({i: {"failures": record.failures + 1}})
                    else:
                        planned.append(i)
                advance(done, len(groups), f"device {group[-1].device}")
        if not planned:
            raise RunError("smaller models: no device has a budget that this backbone can meet")
        return state, sorted(planned)

    def _at_once(self, budgets: Sequence[float | str]) -> int:
        """Returns how many pruned models are made at once; one on a GPU, and if a latency is measured."""
        measured = any(Budget.parse(budget).measured for budget in budgets)
        return 1 if measured or self.compute.device.type != "cpu" else min(cores(), AT_ONCE, len(budgets))

    def surgery(
        self,
        state: FederationState,
        devices: Iterable[int],
        message: Callable[[DeviceRecord], Prune],
        min_success: float | None = None,
    ) -> FederationState:
        """Sends their models to those of the devices that have a plan; returns the state afterwards.

        Args:
            message: makes the message to a device, when it is sent: the weights of a thousand devices are gigabytes.
        """
        plans = {i: self.plan(i)[0] for i in devices if self.plan_file(i).exists()}
        if not plans:
            return state
        layers, blocks = prunable_layers(self.backbone), self.config.adapters.blocks
        shares = {i: adapted_share(layers, plan, blocks) for i, plan in plans.items()}
        requests = {}
        for i, plan in plans.items():
            params, macs = plan.cost.params, plan.cost.macs
            check = partial(PruneReply.check, params=params, macs=macs)
            work = macs * state.devices[i].test_samples
            requests[i] = Request(partial(message, state.devices[i]), PruneReply, check, max_bytes=ENVELOPE, macs=work)
        state, replies = self.fleet.ask(state, "surgery", requests, min_success=min_success)
        changes, names = {}, [*self.config.personalize.reference_rates]
        for i, reply in replies.items():
            dense, before = plans[i].dense, {"dense+alone": state.devices[i].dense_accuracy}
            changes[i] = {
                "params": reply.params,
                "params_share": reply.params / dense.params,
                "macs": reply.macs,
                "macs_share": reply.macs / dense.macs,
                "adapted_share": shares[i],
                # true until its first round, because adapters start without effect; after a warm start a placeholder
                **dict.fromkeys(("pruned_accuracy", "global_accuracy", "personal_accuracy"), reply.pruned_accuracy),
                "reference_accuracies": {name: before.get(name, reply.pruned_accuracy) for name in names} or None,
            }
        have = {**state.plans, **{i: plans[i].checksum for i in replies}}
        return replace(state.with_devices(changes), plans=dict(sorted(have.items())))

    def plan_file(self, i: int) -> Path:
        return self.folder.path / "plans" / f"{i:02d}.json"

    def _weights_file(self, i: int) -> Path:
        return self.plan_file(i).with_suffix(".safetensors")

    def plan(self, i: int) -> tuple[PruningPlan, str]:
        """Returns the plan of device `i`, and the SHA-256 of the weights stored with it.

        Raises:
            PlanError: if the plan is missing, damaged, or another device's.
        """
        if not (file := self.plan_file(i)).exists():
            raise PlanError(f"{file}: is missing; the model of device {i} was pruned by this plan")
        plan, checksum = load_plan(file, saved=False)
        require_device(plan, i, f"{file}: is the plan")
        return plan, checksum

    def message(self, i: int) -> Prune:
        """Returns the message with the model of a device that has a plan, from the run's folder. Raises PlanError."""
        (plan, checksum), weights = self.plan(i), self._weights_file(i)
        content = weights.read_bytes() if weights.exists() else b""
        if checksum and checksum != hashlib.sha256(content).hexdigest():
            name = self.plan_file(i).name
            raise PlanError(f"{weights}: is not the file that {name} was written with (checksum differs)")
        return Prune(self.key, plan.model_dump_json(), content)

    def _plan(self, shared: Shared, summaries: Mapping[int, GaussianSummary], records: Sequence[DeviceRecord]) -> None:
        """Makes one model, and stores it and its plan for each of the devices, which get equal ones."""
        first = records[0]
        mixture = summaries.get(first.device)
        pruned = round_zero.device_model(shared, self.spec, mixture, first.device, first.profile.budget)
        for record in records:
            i, summary = record.device, summaries.get(record.device)
            # a device that sent no mixture may not have the backbone either
            weights = pruned.weights(always=self.config.pruning.send == "weights" or record.generic)
            if pruned.metric_set is not None:
                self._keep_metric_set(i, pruned.metric_set, shared.pool.effective_size(summary, pruned.metric_set))
            if weights:
                write_bytes(self._weights_file(i), weights)
            plan = pruned.plan.model_copy(update={"provenance": pruned.plan.provenance | {"device": i}})
            # last: the plan marks the device's model as complete
            write_json(self.plan_file(i), signed(plan, hashlib.sha256(weights).hexdigest()))

    def _keep_metric_set(self, i: int, chosen: np.ndarray, effective: float | None) -> None:
        """Stores the number of images per class for the report; no plan depends on it, except by `pruning.labels`."""
        labels, classes = self.images.labels, self.images.classes
        metric, pool = (np.bincount(part[part >= 0], minlength=len(classes)) for part in (labels[chosen], labels))
        counts = {"classes": classes, "metric": metric.tolist(), "pool": pool.tolist()}
        about = {"size": len(chosen), "effective_size": effective}
        write_json(self.folder.metric_set(i), counts | about)

    def _summaries(self, state: FederationState) -> tuple[FederationState, dict[int, GaussianSummary]]:
        """Asks every device for its mixture.

        A stored plan without a stored mixture is removed, because it may be the generic plan from before the run was
        stopped, and the device may answer now.
        """
        requests = self._requests(state, state.devices)
        known = {i: reply for i in requests if (reply := self._stored_summary(i)) is not None}
        for i in requests.keys() - known.keys():
            for file in (self.plan_file(i), self._weights_file(i)):
                file.unlink(missing_ok=True)
        for i, reply in known.items():
            requests[i].check(reply)
        state, replies = self.fleet.ask(state, "summaries", requests, known=known)
        for i, reply in replies.items():
            self._store_summary(i, reply)
        for i in sorted(state.devices.keys() - replies.keys()):
            log(logging.WARNING, "device %d: sent no mixture and gets the generic plan for its budget", i)
        changes = {i: self._described(reply) for i, reply in replies.items()}
        return state.with_devices(changes), {i: reply.gaussians for i, reply in replies.items()}

    def refit(self, state: FederationState) -> FederationState:
        """Every `summary.refresh` rounds, asks the devices for mixtures of their present images and records the drift.

        The new mixtures are stored in addition to the first ones. A device keeps its plan, because the plan determines
        the shapes of its personal parameters.
        """
        if not (every := self.config.summary.refresh) or not state.round or state.round % every:
            return state
        profiles = {i: state.devices[i].profile for i in state.plans}
        away = sample_clients(profiles, self.config.devices, self.config.seed, state.round + 1).away
        requests = self._requests(state, sorted(state.plans.keys() - set(away)))
        state, replies = self.fleet.ask(state, f"mixtures after round {state.round}", requests, min_success=0)
        changes = {}
        for i, reply in replies.items():
            self._store_summary(i, reply, again=True)
            first = self._stored_summary(i)
            drift = None if first is None else feature_shift([first.gaussians, reply.gaussians])
            changes[i] = self._described(reply) | {"drift": drift}
            if drift is not None:
                append_lines(self.folder.path, DriftLine(round=state.round, device=i, drift=drift))
        return state.with_devices(changes)

    def _requests(self, state: FederationState, devices: Iterable[int]) -> dict[int, Request[SummaryReply]]:
        weights = self.cache.path(self.key).read_bytes()
        return {i: self._summary_request(state.devices[i], weights) for i in devices}

    def _summary_request(self, record: DeviceRecord, weights: bytes) -> Request[SummaryReply]:
        """Returns the request for a mixture; it includes the backbone if the device does not have it."""
        holds_backbone = record.device in self.fleet.holds_backbone
        pool = self.pool
        dim, options, classes = pool.points.shape[1], self.config.summary, len(self.classes)
        message = Summarize(
            backbone_key=self.key,
            backbone_spec=self.spec.model_dump_json(),
            backbone_weights=b"" if holds_backbone else weights,
            projection_mean=pool.projection.mean,
            projection_components=pool.projection.components,
            classes=json.dumps(self.classes),
        )

        def check(reply: SummaryReply) -> object:
            mixture = reply.mixture(dim, options.min_support, self._announced(record))
            return mixture, reply.held(classes, self._reports_classes)

        return Request(
            message,
            SummaryReply,
            check,
            max_bytes=8 * options.max_components * (1 + dim + dim * dim) + 4 * classes + ENVELOPE,
            macs=self.cost.macs * (record.train_samples + record.test_samples),
            cached_bytes=len(weights) if holds_backbone else 0,
        )

    def _described(self, reply: SummaryReply) -> dict[str, object]:
        """Returns the fields of a device's record that come from its checked answer."""
        held = reply.held(len(self.classes), self._reports_classes)
        return {
            "dense_accuracy": reply.dense_accuracy,
            "test_samples": reply.test_samples,
            "classes": reply.classes,
            "components": len(reply.weights),
            "held_classes": None if held is None else held.tolist(),
        }

    def _announced(self, record: DeviceRecord) -> int:
        """Returns the largest number of training images of a mixture; if images change, there may be more by now."""
        return MAX_SAMPLES if self.config.data.changing else record.train_samples

    @property
    def _reports_classes(self) -> bool:
        return self.config.adapters.head == "class-rows"

    def mixtures(self, state: FederationState) -> list[GaussianSummary]:
        """Returns the mixtures of the devices, in order, of those whose mixture is in the run's folder."""
        stored = [self._stored_summary(i) for i, record in sorted(state.devices.items()) if record.components]
        return [reply.gaussians for reply in stored if reply is not None]

    def _store_summary(self, i: int, reply: SummaryReply, again: bool = False) -> None:
        self.fleet.holds_backbone.add(i)  # it was in the request, if the device did not have it
        arrays = {name: torch.from_numpy(value) for name, value in vars(reply).items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in vars(reply).items() if name not in arrays}
        write_sealed(self._summary_file(i, again), arrays, "reply", rest | {"device": i})

    def _stored_summary(self, i: int) -> SummaryReply | None:
        """Returns a device's stored answer; None if it is missing, damaged, or another device's."""
        try:
            tensors, rest = read_sealed(self._summary_file(i), "reply", device=i)
            rest.pop("device", None)
            values: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            return SummaryReply(**values, **rest)
        except (PlanError, TypeError):
            return None

    def _summary_file(self, i: int, again: bool = False) -> Path:
        return self.folder.path / ("summaries-now" if again else "summaries") / f"{i:02d}.safetensors"
