"""One federation, from the server's side: round zero, then rounds of adapters, then the last evaluation.

Nothing here depends on the order in which replies arrive, on the number of workers or on the engine: devices are known
by partition id, sums run in that order, and each draws from its own generator. After each round all that the server
knows is on disk, and a run that was killed goes on from there to the same bits.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from flwr.common.logger import log
from flwr.serverapp import Grid

from strategies.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from strategies.fleet import Fleet
from strategies.loggers.feed import loggers
from strategies.preparation import Backbone, Preparation
from strategies.records import (
    AbsenceLine,
    CurvePoint,
    DeviceLine,
    RoundLine,
    Summary,
    added,
    append_line,
    cut_metrics,
    metrics_size,
    write_summary,
)
from strategies.results import Clock, summarise
from strategies.sampling import turnout
from strategies.simulated import Spent, seconds, training_macs
from tapfl.adapters import rules
from tapfl.adapters.layout import Layout, Update, device_layout, gather_all, global_shapes, pack, packed_size, unpack
from tapfl.adapters.rules import ServerState
from tapfl.config import RunConfig
from tapfl.data.sources import ImageSet
from tapfl.errors import PlanError
from tapfl.personalize.methods import method_of
from tapfl.privacy import epsilon
from tapfl.profiles import max_rank
from tapfl.progress import stage
from tapfl.pruning.plan import PruningPlan
from tapfl.seeds import of_secret, torch_generator
from tapfl.store import RunFolder, write_json
from tapfl.training import Params
from tapfl.wire import ENVELOPE, Evaluate, EvaluateReply, Prune, Train, TrainReply

MEASURES = ("global_accuracy", "personal_accuracy", "alpha")


class Federation:
    """The server of one run. `run` is the whole of it, phase by phase."""

    def __init__(self, grid: Grid, config: RunConfig, images: ImageSet, folder: RunFolder) -> None:
        self.config, self.images, self.folder = config, images, folder
        self.fleet = Fleet(grid, config, folder)
        self.preparation = Preparation(config, images, folder, self.fleet)
        self.waiting: dict[int, Prune] = {}  # what brings those devices their model that have none yet
        self.layouts: dict[int, Layout] = {}  # of the devices that have theirs
        self.plans: dict[int, str] = {}  # checksums of their plans
        self.method = method_of(config.personalize, config.adapters.scale)
        self.fresh: Params = {}
        self.curve: list[CurvePoint] = []
        self.clock = Clock(folder.path / "timing.json")
        self.tell: Callable[[], None] = lambda: None  # the loggers that lines of metrics.jsonl have become final

    def run(self) -> None:
        """Carries the federation out, or goes on with it, and leaves the whole of it in the run's folder.

        Raises:
            RunError: if too few devices come through in a phase; what was reached until then can be gone on with.
            ConfigError: if the run that goes on had other options or other devices.
        """
        checkpoint = load_checkpoint(self.folder, self.config) if self.config.resume else None
        if checkpoint and checkpoint.round == self.config.train.rounds and self.folder.summary.exists():
            with loggers(self.config, self.folder):  # they may lack some of it, or all
                log(logging.INFO, "the run is finished: %s", self.folder.path)
            return
        self.folder.summary.unlink(missing_ok=True)
        write_json(self.folder.path / "config.json", self.config.flat() | {"resume": False})
        self.folder.write_versions()
        cut_metrics(self.folder.path, checkpoint.metrics_bytes if checkpoint else 0)
        with loggers(self.config, self.folder) as self.tell:
            self._carry_out(checkpoint)

    def _carry_out(self, checkpoint: Checkpoint | None) -> None:
        """Does what is left to do after the checkpoint."""
        with self.clock.phase("backbone"):
            backbone = self.preparation.backbone()
        with self.clock.phase("round zero"):
            self.fleet.meet(backbone.key, checkpoint.records if checkpoint else None)
            if checkpoint:
                self._restore(backbone, checkpoint)
            else:
                self.waiting = self.preparation.smaller_models(backbone)
                self._equip(backbone)
            self.fresh = self._initial(backbone)
        if checkpoint is None:
            checkpoint = self._checkpoint(0, ServerState(self.fresh, {}))
        final = self._rounds(backbone, checkpoint)
        with self.clock.phase("evaluation"):
            self._evaluate(final)
        summary = self._summary(backbone.cost.params)
        write_summary(self.folder.path, summary)
        log(logging.INFO, "mean personal accuracy %.4f", summary.personal_accuracy)
        log(logging.INFO, "the run's folder: %s", self.folder.path)

    # -- who has a model, and which -----------------------------------------------------------------------------------

    def _restore(self, backbone: Backbone, checkpoint: Checkpoint) -> None:
        self.curve, self.fleet.simulated = list(checkpoint.curve), checkpoint.simulated
        for i, record in checkpoint.records.items():
            if (message := self.preparation.planned(backbone, i)) is not None:
                self.waiting[i] = message
            if record.params:
                plan = self.folder.path / "plans" / f"{i:02d}.json"
                if message is None:
                    raise PlanError(f"{plan}: is gone, by which the model of device {i} was cut")
                self._lay_out(backbone, i)
                if self.plans[i] != checkpoint.plans.get(i, self.plans[i]):
                    raise PlanError(f"{plan}: is not the plan by which the model of device {i} was cut")
        log(logging.INFO, "the run goes on after round %d of %d", checkpoint.round, self.config.train.rounds)

    def _equip(self, backbone: Backbone, min_success: float | None = None) -> None:
        for i in self.preparation.surgery(self.waiting, min_success):
            self._lay_out(backbone, i)

    def _lay_out(self, backbone: Backbone, i: int) -> None:
        """Notes where the adapters of a device lie that has its model; the message, weights and all, is let go."""
        plan, rank = PruningPlan.from_json(self.waiting.pop(i).plan), self.fleet.records[i].profile.rank
        self.plans[i] = plan.checksum
        self.layouts[i] = device_layout(self._shapes(backbone), backbone.layers, plan, rank)
        self.layouts = dict(sorted(self.layouts.items()))

    def _shapes(self, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        return global_shapes(backbone.model, backbone.layers, max_rank(self.config.devices))

    def _initial(self, backbone: Backbone) -> Params:
        """Returns the global adapters before the first round.

        Their head is the dense model's. Where recovery or a criterion trained, the devices' models have heads of their
        own, which give way to a shared one from the first round on: it is trained as a whole anyway, and what they
        learnt in the rest of the model stays. On digits no device's accuracy changed by it.
        """
        generator = torch_generator(self.config.seed, "adapters")
        return rules.initial(self.config.adapters, self._shapes(backbone), backbone.layers, backbone.model, generator)

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _rounds(self, backbone: Backbone, checkpoint: Checkpoint) -> ServerState:
        """Returns the server's state after the last round."""
        # in the order of the layers, which is that of the noise and of every sum; a file has an order of its own
        state = replace(checkpoint.state, params={name: checkpoint.state.params[name] for name in self.fresh})
        rounds = self.config.train.rounds
        with stage("rounds") as advance:
            advance(checkpoint.round, rounds)
            for t in range(checkpoint.round + 1, rounds + 1):
                with self.clock.round(t):
                    self._welcome(backbone)
                    spent = self.fleet.spent
                    replies = self._train(t, state.params)
                    state = self._aggregate(t, state, replies)
                    accuracy = self._record(t - 1, replies, spent)
                    self._checkpoint(t, state)
                advance(t, rounds, f"personal accuracy {accuracy:.3f} after round {t - 1}")
        return state

    def _welcome(self, backbone: Backbone) -> None:
        """Learns nodes that came since the last round, and brings devices their model that have none yet."""
        self.fleet.meet_again(backbone.key)
        if self.waiting:
            self._equip(backbone, min_success=0)

    def _train(self, t: int, current: Params) -> dict[int, TrainReply]:
        """Asks the devices of this round; returns the answers, which may be none if nobody is there."""
        options, records, layouts = self.config.devices, self.fleet.records, self.layouts
        drawn = turnout({i: records[i].profile for i in layouts}, options, self.config.seed, t)
        outgoing = {i: self._train_message(t, i, current) for i in (*drawn.asked, *drawn.dropped)}
        late = {
            i for i in drawn.asked if options.deadline and self._predicted_seconds(i, outgoing[i]) > options.deadline
        }
        for reason, absent in (("away", drawn.away), ("dropped out", drawn.dropped), ("late", sorted(late))):
            for i in absent:
                append_line(self.folder.path, AbsenceLine(round=t, device=i, reason=reason))
                if i in outgoing:
                    records[i].bytes_down = added(records[i].bytes_down, outgoing.pop(i).bytes_by_kind)
        waited = options.deadline if late or drawn.dropped else 0.0
        if not outgoing:
            self.fleet.simulated += waited
            return {}

        def check(i: int, reply: TrainReply) -> None:
            reply.check(t, self._upload_length(i, t))

        return self.fleet.ask(
            f"round {t}",
            outgoing,
            TrainReply,
            check,
            work=self._training_work,
            limit=lambda i: 4 * self._upload_length(i, t) + ENVELOPE,
            at_least=waited,
            round=t,
        )

    def _train_message(self, t: int, i: int, current: Params) -> Train:
        return Train(t, self.fleet.records[i].last_round, self._down(i, current))

    def _down(self, i: int, current: Params) -> np.ndarray:
        """Returns what a device gets of w; where nothing is shared, the start of its first round and then nothing."""
        if not self.method.shares_adapters and self.fleet.records[i].last_round:
            return np.zeros(0, np.float32)
        layout = rules.down(self.config.adapters, self.layouts[i])
        return pack(gather_all(current, layout), layout)

    def _up(self, i: int, t: int) -> Layout:
        """Where that lies which a device uploads in round `t`."""
        return rules.up(self.config.adapters, self.layouts[i], t) if self.method.shares_adapters else {}

    def _upload_length(self, i: int, t: int) -> int:
        return packed_size(self._up(i, t))

    def _training_work(self, i: int) -> float:
        record, epochs = self.fleet.records[i], self.config.train.epochs
        return training_macs(
            record.macs, record.train_samples, record.test_samples, epochs, self.method.models_per_step
        )

    def _predicted_seconds(self, i: int, message: Train) -> float:
        up = 4 * self._upload_length(i, message.round)
        return seconds(self.fleet.records[i].profile, message.bytes_by_kind.total(), self._training_work(i), up)

    def _aggregate(self, t: int, state: ServerState, replies: Mapping[int, TrainReply]) -> ServerState:
        updates = []
        for i, reply in replies.items():
            record, layout = self.fleet.records[i], self._up(i, t)
            record.rounds, record.last_round = record.rounds + 1, t
            if layout:
                classes = None if record.held_classes is None else torch.tensor(record.held_classes)
                updates.append(Update(unpack(reply.adapters, layout), layout, record.train_samples, classes))
        if not updates:
            return state
        # who knows the seed can draw the noise again: a server that means it has a secret of its own
        generator = torch_generator(self.config.seed, "aggregate", t, *of_secret(os.environ.get("TAPFL_SECRET", "")))
        return rules.aggregate(self.config.adapters, self.config.privacy, state, updates, self.fresh, t, generator)

    def _checkpoint(self, t: int, state: ServerState) -> Checkpoint:
        """Writes all that the server knows after round `t`, and returns it."""
        size = metrics_size(self.folder.path)
        made = Checkpoint(t, state, self.fleet.records, self.plans, size, self.curve, self.fleet.simulated)
        save_checkpoint(self.folder, self.config, made)
        self.tell()
        return made

    # -- what came of it ----------------------------------------------------------------------------------------------

    def _evaluate(self, final: ServerState) -> None:
        last, records = self.config.train.rounds + 1, self.fleet.records
        spent = self.fleet.spent

        def check(i: int, reply: EvaluateReply) -> None:
            reply.check(last)

        outgoing = {i: Evaluate(last, records[i].last_round, self._down(i, final.params)) for i in self.layouts}
        replies = self.fleet.ask(
            "evaluation",
            outgoing,
            EvaluateReply,
            check,
            work=lambda i: 2 * records[i].macs * records[i].test_samples,
            limit=lambda i: ENVELOPE,
            round=last,
        )
        self._record(last - 1, replies, spent)

    def _record(
        self, round: int, replies: Mapping[int, TrainReply] | Mapping[int, EvaluateReply], spent: Spent
    ) -> float:
        """Notes how devices did after `round`, which they say before they train again; returns the mean over all.

        Args:
            spent: what the run had cost when that round had ended.
        """
        for i, reply in replies.items():
            values = {name: getattr(reply, name) for name in MEASURES}
            self.fleet.records[i] = self.fleet.records[i].model_copy(update=values)
            loss = reply.loss if isinstance(reply, TrainReply) else None
            append_line(self.folder.path, DeviceLine(round=round, device=i, **values, next_loss=loss))
        means = {name: float(np.mean([getattr(r, name) for r in replies.values()])) for name in MEASURES if replies}
        line = RoundLine(
            round=round,
            devices=len(replies),
            simulated_seconds=spent.seconds,
            bytes_up=spent.bytes_up,
            bytes_down=spent.bytes_down,
        )
        append_line(self.folder.path, line.model_copy(update=means))
        # of those that were not asked what was last known: or a curve would follow who happens to be there
        accuracy = float(np.mean([self.fleet.records[i].personal_accuracy for i in self.layouts]))
        self.curve.append(CurvePoint(seconds=spent.seconds, bytes=spent.bytes_up + spent.bytes_down, accuracy=accuracy))
        return accuracy

    def _summary(self, dense_params: int) -> Summary:
        privacy = self.config.privacy

        def spent(rounds: int) -> float | None:
            value = epsilon(privacy.dp_noise, rounds, privacy.dp_delta) if privacy.dp_noise else math.inf
            return value if math.isfinite(value) else None

        return summarise(
            self.fleet.records, self.clock.seconds, dense_params, self.config.train.rounds, self.curve, spent
        )
