"""One federation, from the server's side: round zero, then rounds of adapters, then the last evaluation.

Nothing here depends on the order in which replies arrive, on the number of workers or on the engine: devices are known
by partition id, sums run in that order, and each draws from its own generator.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import nn

from strategies.exchange import Answers, exchange, wait_for_nodes
from strategies.progress import stage
from strategies.results import Clock, DeviceRecord, summarise
from strategies.round_zero import PublicPool, describe_pool, device_plan
from tapfl.adapters.layout import (
    Layout,
    Params,
    Shapes,
    Update,
    device_layout,
    gather_all,
    global_shapes,
    initial_adapters,
    pack,
    packed_size,
    unpack,
)
from tapfl.adapters.rules import RULES
from tapfl.config import RunConfig
from tapfl.data.sources import ImageSet
from tapfl.models.backbone import BackboneSpec
from tapfl.models.cost import measure_cost
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.models.units import prunable_layers
from tapfl.pruning.plan import PruningPlan
from tapfl.seeds import torch_generator
from tapfl.store import RunFolder, cache_folder, write_bytes, write_json, write_tensors
from tapfl.summary.mixture import GaussianSummary
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
    WireMessage,
)

R = TypeVar("R", bound=WireMessage)


@dataclass(frozen=True)
class Backbone:
    """The dense backbone: its key in the caches, how to build it, and itself."""

    key: str
    spec: BackboneSpec
    model: nn.Module


class Federation:
    """The server of one run. `run` is the whole of it, phase by phase."""

    def __init__(self, grid: Grid, config: RunConfig, pool: ImageSet, folder: RunFolder) -> None:
        self.grid, self.config, self.images, self.folder = grid, config, pool, folder
        self.clock = Clock()
        self.nodes: dict[int, int] = {}
        self.records: dict[int, DeviceRecord] = {}
        self.layouts: dict[int, Layout] = {}
        self.held: dict[int, bool] = {}

    def run(self) -> dict[str, object]:
        """Carries the federation out and returns the content of its `summary.json`.

        Raises:
            RunError: if a phase has no device left that answers.
        """
        write_json(self.folder.path / "config.json", self.config.flat())
        self.folder.write_versions()
        with self.clock.phase("backbone"):
            backbone = self._backbone()
        with self.clock.phase("round zero"):
            self._meet(backbone.key)
            pool = describe_pool(self.config, self.images, backbone.model)
            summaries = self._summaries(backbone, pool)
            plans = self._plans(backbone, pool, summaries)
            initial = self._prune(backbone, plans)
        with self.clock.phase("rounds"):
            final = self._rounds(initial)
        with self.clock.phase("evaluation"):
            self._evaluate(final)
        summary = summarise(self.records, self.clock, measure_cost(backbone.model).params, self.config.train.rounds)
        write_json(self.folder.path / "summary.json", summary)
        return summary

    # -- round zero -------------------------------------------------------------------------------------------------

    def _backbone(self) -> Backbone:
        with stage("dense backbone", self.config.model.epochs) as advance:
            cache = DenseCache(cache_folder(self.config.cache))
            return Backbone(
                *dense_backbone(
                    self.config.model, self.images, self.config.seed, cache, lambda done, _: advance(done, "epochs")
                )
            )

    def _meet(self, key: str) -> None:
        """Learns which node is which device. Node ids are random, so nothing is ever ordered by them."""
        nodes = wait_for_nodes(self.grid, self.config.devices.count, self.config.node_timeout)
        if not self.config.devices.count and len(nodes) == 2:
            log(logging.INFO, 'two nodes, Flower\'s default; for ten: --federation-config "num-supernodes=10"')
        outgoing = dict(enumerate((node, Hello(key)) for node in nodes))
        max_rank = max(self.config.devices.ranks)
        answers = self._send("hello", outgoing, HelloReply, lambda _, reply: reply.check(len(nodes), max_rank))
        for position, reply in answers.require_any("hello").items():
            i = reply.partition_id
            if i in self.nodes:
                log(logging.WARNING, "node %d: says it is device %d, which is there already; left out", position, i)
                continue
            self.nodes[i] = nodes[position]
            self.held[i] = reply.holds_backbone
            self.records[i] = DeviceRecord(i, reply.budget, reply.rank, reply.train_samples)
            self.records[i].sent(outgoing[position][1])
            self.records[i].received(reply)
        self.records = dict(sorted(self.records.items()))

    def _summaries(self, backbone: Backbone, pool: PublicPool) -> dict[int, GaussianSummary]:
        weights = DenseCache(cache_folder(self.config.cache)).path(backbone.key).read_bytes()

        def message(i: int, sent: bytes) -> Summarize:
            projection = pool.projection
            spec = backbone.spec.model_dump_json()
            return Summarize(backbone.key, spec, sent, projection.mean, projection.components)

        min_support, dim = self.config.summary.min_support, pool.points.shape[1]
        summaries: dict[int, GaussianSummary] = {}

        def check(i: int, reply: SummaryReply) -> None:
            summaries[i] = reply.mixture(dim, min_support, self.records[i].train_samples)

        outgoing = {i: message(i, b"" if self.held[i] else weights) for i in self.nodes}
        answers = self._ask("summaries", outgoing, SummaryReply, check)
        for i, reply in answers.require_any("summaries").items():
            record = self.records[i]
            # a device that found the weights in a cache on this machine would have had to download them elsewhere
            record.bytes_down[Summarize.kind] += len(weights) if self.held[i] else 0
            record.dense_accuracy, record.classes = reply.dense_accuracy, reply.classes
            record.test_samples = reply.test_samples
            arrays = {"weights": reply.weights, "means": reply.means, "covariances": reply.covariances}
            self._write_summary(i, arrays, reply.n)
        return {i: summaries[i] for i in sorted(answers.replies)}

    def _plans(
        self, backbone: Backbone, pool: PublicPool, summaries: dict[int, GaussianSummary]
    ) -> dict[int, PruningPlan]:
        plans: dict[int, PruningPlan] = {}
        with stage("plans", len(summaries)) as advance:
            for done, (i, summary) in enumerate(summaries.items(), start=1):
                budget = self.records[i].budget
                plans[i] = device_plan(self.config, pool, backbone.spec, backbone.model, summary, i, budget)
                write_bytes(self.folder.path / "plans" / f"{i:02d}.json", plans[i].model_dump_json(indent=1).encode())
                advance(done, f"device {i}")
        return plans

    def _prune(self, backbone: Backbone, plans: dict[int, PruningPlan]) -> Params:
        """Sends the plans; returns the global adapters before the first round."""
        outgoing = {i: Prune(backbone.key, plan.model_dump_json()) for i, plan in plans.items()}
        answers = self._ask(
            "surgery", outgoing, PruneReply, lambda i, reply: reply.check(plans[i].cost.params, plans[i].cost.macs)
        )
        layers = prunable_layers(backbone.model)
        shapes: Shapes = global_shapes(backbone.model, layers, max(self.config.devices.ranks))
        for i, reply in answers.require_any("surgery").items():
            record, plan = self.records[i], plans[i]
            record.params, record.macs = reply.params, reply.macs
            record.params_share, record.macs_share = reply.params / plan.dense.params, reply.macs / plan.dense.macs
            record.pruned_accuracy = reply.pruned_accuracy
            self.layouts[i] = device_layout(shapes, layers, plan, record.rank)
        return initial_adapters(shapes, backbone.model, torch_generator(self.config.seed, "adapters"))

    # -- rounds -----------------------------------------------------------------------------------------------------

    def _rounds(self, initial: Params) -> Params:
        current, rounds = initial, self.config.train.rounds
        aggregate = RULES[self.config.adapters.rule]
        uploads = self.config.personalize.method != "local"
        with stage("rounds", rounds) as advance:
            for t in range(1, rounds + 1):
                outgoing = {
                    i: Train(t, pack(gather_all(current, layout), layout)) for i, layout in self.layouts.items()
                }

                def check(i: int, reply: TrainReply, t: int = t) -> None:
                    reply.check(t, packed_size(self.layouts[i]), uploads)

                answers = self._ask(f"round {t}", outgoing, TrainReply, check, quiet=True)
                replies = answers.require_any(f"round {t}")
                self._record(t - 1, replies)
                if uploads:
                    updates = [
                        Update(unpack(reply.adapters, self.layouts[i]), self.layouts[i], self.records[i].train_samples)
                        for i, reply in replies.items()
                    ]
                    current = aggregate(current, updates, initial)
                write_tensors(self.folder.path / "server" / f"round-{t:04d}.safetensors", current)
                (self.folder.path / "server" / f"round-{t - 2:04d}.safetensors").unlink(missing_ok=True)
                mean = float(np.mean([record.personal_accuracy for record in self._alive()]))
                advance(t, f"personal accuracy {mean:.3f} after round {t - 1}")
        return current

    def _evaluate(self, final: Params) -> None:
        rounds = self.config.train.rounds
        outgoing = {
            i: Evaluate(rounds + 1, pack(gather_all(final, layout), layout)) for i, layout in self.layouts.items()
        }
        answers = self._ask("evaluation", outgoing, EvaluateReply, lambda _, reply: reply.check(rounds + 1))
        self._record(rounds, answers.require_any("evaluation"))

    def _record(self, round: int, replies: dict[int, TrainReply] | dict[int, EvaluateReply]) -> None:
        """Notes how every device did after `round`; a training reply says that before it trains again."""
        for i, reply in replies.items():
            record = self.records[i]
            record.global_accuracy, record.personal_accuracy = reply.global_accuracy, reply.personal_accuracy
            record.alpha = reply.alpha
            line = {
                "kind": "device",
                "round": round,
                "device": i,
                "global_accuracy": reply.global_accuracy,
                "personal_accuracy": reply.personal_accuracy,
                "alpha": reply.alpha,
            }
            self.folder.append_metrics(**line, **({"next_loss": reply.loss} if isinstance(reply, TrainReply) else {}))
        self.folder.append_metrics(
            kind="round",
            round=round,
            devices=len(replies),
            global_accuracy=float(np.mean([reply.global_accuracy for reply in replies.values()])),
            personal_accuracy=float(np.mean([reply.personal_accuracy for reply in replies.values()])),
            bytes_up=sum(sum(record.bytes_up.values()) for record in self.records.values()),
            bytes_down=sum(sum(record.bytes_down.values()) for record in self.records.values()),
            failures=sum(record.failures for record in self.records.values()),
        )

    # -- messages ---------------------------------------------------------------------------------------------------

    def _alive(self) -> list[DeviceRecord]:
        return [self.records[i] for i in self.layouts]

    def _ask(
        self, what: str, outgoing: dict[int, WireMessage], reply_type: type[R], check: object, quiet: bool = False
    ) -> Answers[R]:
        """Sends to known devices; counts bytes and failures."""
        addressed = {i: (self.nodes[i], message) for i, message in outgoing.items()}
        answers = self._send(what, addressed, reply_type, check, quiet)
        for i, message in outgoing.items():
            self.records[i].sent(message)
        for i, reply in answers.replies.items():
            self.records[i].received(reply)
        for i, reason in answers.failures.items():
            self.records[i].failures += 1
            self.folder.append_metrics(kind="failure", phase=what, device=i, reason=reason)
        return answers

    def _send(
        self,
        what: str,
        addressed: dict[int, tuple[int, WireMessage]],
        reply_type: type[R],
        check: object,
        quiet: bool = False,
    ) -> Answers[R]:
        config = self.config

        def send(arrived: object) -> Answers[R]:
            return exchange(
                self.grid,
                addressed,
                reply_type,
                check,  # type: ignore[arg-type]
                timeout=config.message_timeout,
                window=config.window,
                group=what,
                arrived=arrived,  # type: ignore[arg-type]
            )

        if quiet:
            return send(lambda count: None)
        with stage(what, len(addressed)) as advance:
            return send(lambda count: advance(count, "devices"))

    def _write_summary(self, i: int, arrays: dict[str, np.ndarray], n: int) -> None:
        import torch

        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        write_tensors(self.folder.path / "summaries" / f"{i:02d}.safetensors", tensors, {"n": json.dumps(n)})
