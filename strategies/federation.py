"""One federation, from the server's side: round zero, then rounds of adapters, then the last evaluation.

Nothing here depends on the order in which replies arrive, on the number of workers or on the engine: devices are known
by partition id, sums run in that order, and each draws from its own generator.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import nn

from strategies.fleet import Fleet
from strategies.progress import stage
from strategies.results import Clock, summarise
from strategies.round_zero import PublicPool, Shared, describe_pool, device_model
from tapfl.adapters import rules
from tapfl.adapters.layout import (
    Layout,
    Params,
    Update,
    device_layout,
    gather_all,
    global_shapes,
    pack,
    packed_size,
    unpack,
)
from tapfl.config import RunConfig
from tapfl.data.sources import ImageSet
from tapfl.models.backbone import BackboneSpec
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.models.prunable import prunable_layers
from tapfl.pruning.plan import PruningPlan
from tapfl.seeds import torch_generator
from tapfl.store import RunFolder, cache_folder, write_bytes, write_json, write_tensors
from tapfl.summary.mixture import GaussianSummary
from tapfl.wire import Evaluate, EvaluateReply, Prune, PruneReply, Summarize, SummaryReply, Train, TrainReply


@dataclass(frozen=True)
class Backbone:
    """The dense backbone: its key in the caches, how to build it, and itself."""

    key: str
    spec: BackboneSpec
    model: nn.Module


class Federation:
    """The server of one run. `run` is the whole of it, phase by phase."""

    def __init__(self, grid: Grid, config: RunConfig, images: ImageSet, folder: RunFolder) -> None:
        self.config, self.images, self.folder = config, images, folder
        self.fleet = Fleet(grid, config, folder)
        self.cache = DenseCache(cache_folder(config.cache))
        self.layouts: dict[int, Layout] = {}

    def run(self) -> None:
        """Carries the federation out and leaves the whole of it in the run's folder.

        Raises:
            RunError: if a phase has no device left that answers.
        """
        write_json(self.folder.path / "config.json", self.config.flat())
        self.folder.write_versions()
        clock = Clock()
        with clock.phase("backbone"):
            backbone = self._backbone()
        with clock.phase("round zero"):
            self.fleet.meet(backbone.key)
            pool = describe_pool(self.config, self.images, backbone.model)
            summaries = self._summaries(backbone, pool)
            plans, smaller = self._smaller_models(backbone, pool, summaries)
            initial = self._prune(backbone, plans, smaller)
        with clock.phase("rounds"):
            final = self._rounds(initial)
        with clock.phase("evaluation"):
            self._evaluate(final)
        dense_params = next(iter(plans.values())).dense.params
        summary = summarise(self.fleet.records, clock.seconds, dense_params, self.config.train.rounds)
        write_json(self.folder.path / "summary.json", summary)
        log(logging.INFO, "mean personal accuracy %.4f", summary["personal_accuracy"])
        log(logging.INFO, "the run's folder: %s", self.folder.path)

    # -- round zero -------------------------------------------------------------------------------------------------

    def _backbone(self) -> Backbone:
        with stage("dense backbone", self.config.model.epochs) as advance:
            made = dense_backbone(
                self.config.model, self.images, self.config.seed, self.cache, lambda done, _: advance(done, "epochs")
            )
            advance(self.config.model.epochs, f"ready: {made[0]}")
        return Backbone(*made)

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
            )
            for i in records
        }
        dim, min_support = pool.points.shape[1], self.config.summary.min_support
        summaries: dict[int, GaussianSummary] = {}

        def check(i: int, reply: SummaryReply) -> None:
            summaries[i] = reply.mixture(dim, min_support, records[i].train_samples)

        replies = self.fleet.ask("summaries", outgoing, SummaryReply, check)
        for i, reply in replies.items():
            # a device that found the weights in a cache on this machine would have had to download them elsewhere
            records[i].bytes_down[Summarize.kind] += len(weights) if held[i] else 0
            records[i].dense_accuracy = reply.dense_accuracy
            records[i].test_samples, records[i].classes = reply.test_samples, reply.classes
            arrays = {name: torch.from_numpy(getattr(reply, name)) for name in ("weights", "means", "covariances")}
            write_tensors(self.folder.path / "summaries" / f"{i:02d}.safetensors", arrays, {"n": str(reply.n)})
        return {i: summaries[i] for i in replies}

    def _smaller_models(
        self, backbone: Backbone, pool: PublicPool, summaries: Mapping[int, GaussianSummary]
    ) -> tuple[dict[int, PruningPlan], dict[int, Prune]]:
        """Returns the plans and the messages that bring the devices their models, with weights only where they must."""
        plans: dict[int, PruningPlan] = {}
        shared = Shared(self.config, pool, backbone.model)
        smaller: dict[int, Prune] = {}
        with stage("smaller models", len(summaries)) as advance:
            for done, (i, summary) in enumerate(summaries.items(), start=1):
                budget = self.fleet.records[i].budget
                pruned = device_model(shared, backbone.spec, summary, i, budget)
                plans[i] = pruned.plan
                smaller[i] = Prune(backbone.key, pruned.plan.model_dump_json(), pruned.weights())
                write_bytes(self.folder.path / "plans" / f"{i:02d}.json", plans[i].model_dump_json(indent=1).encode())
                advance(done, f"device {i}")
        return plans, smaller

    def _prune(self, backbone: Backbone, plans: Mapping[int, PruningPlan], smaller: Mapping[int, Prune]) -> Params:
        """Sends the smaller models; returns the global adapters before the first round.

        Their head is the dense model's. Where recovery or a criterion trained, the devices' models have heads of their
        own, which give way to the shared one from the first round on: it is trained as a whole anyway, and what they
        learnt in the rest of the model stays. On digits no device's accuracy changed by it.
        """

        def check(i: int, reply: PruneReply) -> None:
            reply.check(plans[i].cost.params, plans[i].cost.macs)

        layers = prunable_layers(backbone.model)
        shapes = global_shapes(backbone.model, layers, max(self.config.devices.ranks))
        for i, reply in self.fleet.ask("surgery", smaller, PruneReply, check).items():
            record, dense = self.fleet.records[i], plans[i].dense
            record.params, record.params_share = reply.params, reply.params / dense.params
            record.macs, record.macs_share = reply.macs, reply.macs / dense.macs
            record.pruned_accuracy = reply.pruned_accuracy
            self.layouts[i] = device_layout(shapes, layers, plans[i], record.rank)
        generator = torch_generator(self.config.seed, "adapters")
        return rules.initial(self.config.adapters, shapes, layers, backbone.model, generator)

    # -- rounds -----------------------------------------------------------------------------------------------------

    def _rounds(self, initial: Params) -> Params:
        """Returns the global adapters after the last round."""
        state, rounds = rules.ServerState(initial), self.config.train.rounds
        with stage("rounds", rounds) as advance:
            for t in range(1, rounds + 1):
                replies = self._train(t, state.params)
                state = self._aggregate(t, state, replies, initial)
                self.folder.write_adapters(t, state.params)
                accuracy = self._record(t - 1, replies)
                advance(t, f"personal accuracy {accuracy:.3f} after round {t - 1}")
        return state.params

    def _train(self, t: int, current: Params) -> dict[int, TrainReply]:
        uploads = self.config.personalize.method != "local"

        def check(i: int, reply: TrainReply) -> None:
            reply.check(t, packed_size(self.layouts[i]), uploads)

        outgoing = {i: Train(t, pack(gather_all(current, layout), layout)) for i, layout in self.layouts.items()}
        return self.fleet.ask(f"round {t}", outgoing, TrainReply, check, quiet=True)

    def _aggregate(
        self, t: int, state: rules.ServerState, replies: Mapping[int, TrainReply], initial: Params
    ) -> rules.ServerState:
        updates = [
            Update(unpack(reply.adapters, self.layouts[i]), self.layouts[i], self.fleet.records[i].train_samples)
            for i, reply in replies.items()
            if len(reply.adapters)
        ]
        generator = torch_generator(self.config.seed, "aggregation", t)
        return rules.aggregate(self.config.adapters, self.config.privacy, state, updates, initial, t, generator)

    def _evaluate(self, final: Params) -> None:
        last = self.config.train.rounds + 1

        def check(i: int, reply: EvaluateReply) -> None:
            reply.check(last)

        outgoing = {i: Evaluate(last, pack(gather_all(final, layout), layout)) for i, layout in self.layouts.items()}
        self._record(last - 1, self.fleet.ask("evaluation", outgoing, EvaluateReply, check))

    def _record(self, round: int, replies: Mapping[int, TrainReply] | Mapping[int, EvaluateReply]) -> float:
        """Notes how every device did after `round`, which it says before it trains again; returns their mean."""
        measures = ("global_accuracy", "personal_accuracy", "alpha")
        for i, reply in replies.items():
            values = {name: getattr(reply, name) for name in measures}
            vars(self.fleet.records[i]).update(values)
            loss = {"next_loss": reply.loss} if isinstance(reply, TrainReply) else {}
            self.folder.append_metrics(kind="device", round=round, device=i, **values, **loss)
        means = {name: float(np.mean([getattr(reply, name) for reply in replies.values()])) for name in measures}
        totals = {
            side: sum(sum(getattr(record, side).values()) for record in self.fleet.records.values())
            for side in ("bytes_up", "bytes_down")
        }
        self.folder.append_metrics(kind="round", round=round, devices=len(replies), **means, **totals)
        return means["personal_accuracy"]
