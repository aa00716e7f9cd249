"""Round zero as it is spoken with the devices: mixtures, plans, smaller models.

Whatever a step gives is kept in the run's folder as it comes, so that a run that was killed asks and computes only what
is missing. A device that gives no mixture gets the generic plan of its budget, that of the whole pool.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.common.logger import log
from torch import nn

from strategies.fleet import Fleet
from strategies.round_zero import PublicPool, Shared, describe_pool, device_model
from tapfl.config import RunConfig
from tapfl.data.sources import ImageSet
from tapfl.errors import BudgetError, PlanError, RunError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.cost import Cost, measure_cost
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer
from tapfl.progress import stage
from tapfl.pruning.plan import PruningPlan, kept_plan, require_device, signed
from tapfl.store import (
    RunFolder,
    cache_folder,
    read_about,
    read_tensors,
    seal,
    unseal,
    write_bytes,
    write_json,
    write_tensors,
)
from tapfl.summary.mixture import GaussianSummary
from tapfl.wire import ENVELOPE, Prune, PruneReply, Summarize, SummaryReply


@dataclass(frozen=True)
class Backbone:
    """The dense backbone: its key in the caches, how to build it, and itself."""

    key: str
    spec: BackboneSpec
    model: nn.Module

    @cached_property
    def layers(self) -> list[PrunableLayer]:
        """What can be pruned of it."""
        return prunable_layers(self.model)

    @cached_property
    def cost(self) -> Cost:
        """What it costs, measured."""
        return measure_cost(self.model)


class Preparation:
    """The server's side of round zero."""

    def __init__(self, config: RunConfig, images: ImageSet, folder: RunFolder, fleet: Fleet) -> None:
        self.config, self.images, self.folder, self.fleet = config, images, folder, fleet
        self.cache = DenseCache(cache_folder(config.cache))

    def backbone(self) -> Backbone:
        """Returns the dense backbone: trained, loaded, or from the cache."""
        made = Backbone(*dense_backbone(self.config.model, self.images, self.config.seed, self.cache))
        log(logging.INFO, "dense backbone: ready: %s", made.key)
        return made

    def smaller_models(self, backbone: Backbone) -> dict[int, Prune]:
        """Returns for every device of the fleet the message that brings it its model.

        Raises:
            RunError: if too few devices give a mixture.
        """
        with stage("public pool"):
            pool = describe_pool(self.config, self.images, backbone.model)
        summaries = self._summaries(backbone, pool)
        messages: dict[int, Prune] = {}
        with stage("smaller models") as advance:
            advance(0, len(self.fleet.records))
            shared = Shared(self.config, pool, backbone.model)
            for done, (i, record) in enumerate(self.fleet.records.items(), start=1):
                record.generic = i not in summaries
                try:
                    messages[i] = self.planned(backbone, i) or self._plan(backbone, shared, summaries.get(i), i)
                except BudgetError as error:  # a device's own budget: its loss, and no one else's
                    self.fleet.lost(i, "smaller models", str(error))
                advance(done, len(self.fleet.records), f"device {i}")
        if not messages:
            raise RunError("smaller models: no device has a budget that this backbone can meet")
        return messages

    def _plan(self, backbone: Backbone, shared: Shared, summary: GaussianSummary | None, i: int) -> Prune:
        budget = self.fleet.records[i].profile.budget
        pruned = device_model(shared, backbone.spec, summary, i, budget)
        # a device that gave no mixture may not have got the backbone either
        sent = self.config.pruning.send == "weights" or self.fleet.records[i].generic
        weights = pruned.weights(always=sent)
        if pruned.metric_set is not None:
            self._keep_metric_set(i, pruned.metric_set)
        self._keep(i, pruned.plan, weights)
        return Prune(backbone.key, pruned.plan.model_dump_json(), weights)

    def planned(self, backbone: Backbone, i: int) -> Prune | None:
        """Returns the message of a device whose model was made before, from the run's folder."""
        plan, weights = (self.folder.path / "plans" / f"{i:02d}.{kind}" for kind in ("json", "safetensors"))
        if not plan.exists():
            return None
        found, checksum = kept_plan(plan)
        require_device(found, i, f"{plan}: is the plan")
        sent = weights.read_bytes() if weights.exists() else b""
        if checksum and checksum != hashlib.sha256(sent).hexdigest():
            raise PlanError(f"{weights}: is not the file that {plan.name} was written with (checksum differs)")
        return Prune(backbone.key, found.model_dump_json(), sent)

    def _keep(self, i: int, plan: PruningPlan, weights: bytes) -> None:
        folder = self.folder.path / "plans"
        if weights:
            write_bytes(folder / f"{i:02d}.safetensors", weights)
        # last: with it the device's model is complete
        write_json(folder / f"{i:02d}.json", signed(plan, hashlib.sha256(weights).hexdigest()))

    def _keep_metric_set(self, i: int, chosen: np.ndarray) -> None:
        """Notes for the report which classes the images are of; no plan depends on that, unless `labels` says so."""
        labels, classes = self.images.labels, self.images.classes
        counts = (np.bincount(each, minlength=len(classes)).tolist() for each in (labels[chosen], labels))
        write_json(self.folder.metric_set(i), dict(zip(("classes", "metric", "pool"), (classes, *counts), strict=True)))

    def surgery(self, messages: Mapping[int, Prune], min_success: float | None = None) -> dict[int, PruneReply]:
        """Sends the smaller models; returns the answers of the devices that have theirs."""
        plans = {i: PruningPlan.from_json(message.plan) for i, message in messages.items()}

        def check(i: int, reply: PruneReply) -> None:
            reply.check(plans[i].cost.params, plans[i].cost.macs)

        replies = self.fleet.ask(
            "surgery",
            messages,
            PruneReply,
            check,
            work=lambda i: plans[i].cost.macs * self.fleet.records[i].test_samples,
            limit=lambda i: ENVELOPE,
            min_success=min_success,
        )
        for i, reply in replies.items():
            record, dense = self.fleet.records[i], plans[i].dense
            record.params, record.params_share = reply.params, reply.params / dense.params
            record.macs, record.macs_share = reply.macs, reply.macs / dense.macs
            # adapters start without effect: so it does until it is first asked in a round
            record.pruned_accuracy = record.global_accuracy = record.personal_accuracy = reply.pruned_accuracy
        return replies

    def _summaries(self, backbone: Backbone, pool: PublicPool) -> dict[int, GaussianSummary]:
        """Asks every device for its mixture; a device that has not got the backbone is sent it."""
        weights = self.cache.path(backbone.key).read_bytes()
        held, records = self.fleet.holds_backbone, self.fleet.records
        outgoing = {
            i: Summarize(
                backbone_key=backbone.key,
                backbone_spec=backbone.spec.model_dump_json(),
                backbone_weights=b"" if held[i] else weights,
                projection_mean=pool.projection.mean,
                projection_components=pool.projection.components,
                classes=json.dumps(self.images.classes),
            )
            for i in records
        }
        dim, min_support = pool.points.shape[1], self.config.summary.min_support
        classes, asked = len(self.images.classes), self.config.adapters.head == "class-rows"
        summaries: dict[int, GaussianSummary] = {}

        def check(i: int, reply: SummaryReply) -> None:
            summaries[i] = reply.mixture(dim, min_support, records[i].train_samples)
            reply.held(classes, asked)

        replies = self.fleet.ask(
            "summaries",
            outgoing,
            SummaryReply,
            check,
            known={i: reply for i in outgoing if (reply := self._stored_summary(i)) is not None},
            work=lambda i: backbone.cost.macs * (records[i].train_samples + records[i].test_samples),
            unsent=lambda i: len(weights) if held[i] else 0,
            limit=lambda i: 8 * self.config.summary.max_components * (1 + dim + dim * dim) + 4 * classes + ENVELOPE,
        )
        for i, reply in replies.items():
            records[i].dense_accuracy = reply.dense_accuracy
            records[i].test_samples, records[i].classes = reply.test_samples, reply.classes
            held_classes = reply.held(classes, asked)
            records[i].held_classes = None if held_classes is None else held_classes.tolist()
            self._store_summary(i, reply)
        for i in sorted(records.keys() - replies.keys()):
            log(logging.WARNING, "device %d gave no mixture: it gets the generic plan of its budget", i)
        return {i: summaries[i] for i in replies}

    def _store_summary(self, i: int, reply: SummaryReply) -> None:
        values = {each.name: getattr(reply, each.name) for each in fields(reply)}
        arrays = {name: torch.from_numpy(value) for name, value in values.items() if hasattr(value, "dtype")}
        rest = {name: value for name, value in values.items() if name not in arrays}
        write_tensors(self._summary_file(i), arrays, {"reply": seal({**rest, "device": i}, arrays)})

    def _stored_summary(self, i: int) -> SummaryReply | None:
        """Returns what a device said before; None, and it is asked again, if that is damaged or another device's."""
        file = self._summary_file(i)
        try:
            tensors = read_tensors(file)
            rest = unseal(read_about(file).get("reply", ""), tensors, str(file), device=i)
            rest.pop("device", None)
            values: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            return SummaryReply(**values, **rest)
        except (PlanError, TypeError):
            return None

    def _summary_file(self, i: int) -> Path:
        return self.folder.path / "summaries" / f"{i:02d}.safetensors"
