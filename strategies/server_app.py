"""The ServerApp runs one federation: round zero, rounds of adapters, and the last evaluation.

A round is a step from one `FederationState` to the next. The state is saved after each round, so a run that was killed
continues from there and ends with the same bits. No result depends on the order in which replies arrive, the number of
workers or the engine: devices are identified by partition id, sums are computed in that order, and each device has its
own random generator.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from strategies.binding import (
    PROCESSOR,
    inputs_of,
    require_same_inputs,
    require_same_options,
    require_same_processor,
    write_begun,
)
from strategies.exchange import Request
from strategies.fleet import Fleet, groups_of, reason_for_single, sample_clients, seconds, training_macs
from strategies.global_adapters import GlobalAdapters
from strategies.loggers import loggers, require_loggers
from strategies.preparation import Preparation
from strategies.progress import shown
from strategies.records import SUMMARY, AbsenceLine, append_lines, cut_metrics, metrics_size, write_summary
from strategies.state import (
    MEASURES,
    Clock,
    FederationState,
    R,
    Replies,
    evaluated,
    load_checkpoint,
    present,
    save_checkpoint,
    summarise,
)
from tapfl.adapters import rules
from tapfl.adapters.layout import Layout, Update, gather_all, pack, packed_size, unpack
from tapfl.adapters.rules import ServerState
from tapfl.compute import HERE, Compute
from tapfl.config import RunConfig
from tapfl.data.federated import open_pool
from tapfl.data.images import ImageSet
from tapfl.errors import ConfigError
from tapfl.models.forward import input_transform
from tapfl.options import expanded
from tapfl.personalize.method import Method
from tapfl.personalize.methods import method_of, never_begins
from tapfl.progress import stage
from tapfl.run_folder import RunFolder, run_path
from tapfl.seeds import numpy_generator, of_secret
from tapfl.store import cache_folder
from tapfl.training import images_seen, is_evaluated
from tapfl.wire import ENVELOPE, Evaluate, EvaluateReply, Hello, Train, TrainReply

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = RunConfig.from_flat(context.run_config)
    compute = Compute.of(config.compute)
    compute.prepare()
    if config.resume and not config.out:
        raise ConfigError("resume = true: needs out, the folder of the run to continue")
    # Flower runs an app in the folder in which its daemon was first started, where relative paths would be wrong
    for option, value in config.paths().items():
        if not expanded(option, value).is_absolute():
            raise ConfigError(f"{option} = {value!r}: must be an absolute path, or one that `tapfl run` resolves")
    require_loggers(config.log)
    reason_for_single(config, grid)
    path = run_path(config.out, context.run_id)
    opened = RunFolder.reopen(path) if config.resume else RunFolder.create(path)
    with opened as folder, shown():
        inputs = inputs_of(config)
        if config.resume:
            require_same_options(folder, config)
            require_same_inputs(folder, inputs)
            require_same_processor(folder, compute)
        pool = open_pool(config.data, input_transform(config.model), config.seed, cache_folder(config.cache))
        run_federation(grid, config, pool, folder, inputs, compute)


def run_federation(
    grid: Grid,
    config: RunConfig,
    images: ImageSet,
    folder: RunFolder,
    inputs: Mapping[str, str],
    compute: Compute = HERE,
) -> None:
    """Runs a federation, or continues it, and writes the results into the run's folder.

    Args:
        images: the public pool.
        inputs: fingerprints of the images and files that the options name; they are stored for a resume.
        compute: where the server computes.

    Raises:
        RunError: if too few devices answer in a phase; the run can be continued from its last state.
        ConfigError: if the run to continue had other options or other devices.
    """
    state = load_checkpoint(folder, config) if config.resume else None
    if state and state.round == config.train.rounds and (folder.path / SUMMARY).exists():
        with loggers(config, folder):  # sends what a logger does not have yet
            log(logging.INFO, "the run is finished: %s", folder.path)
        return
    if never_begins(config):
        first = config.personalize.from_round
        log(logging.WARNING, "personalize.from-round = %d: this run ends before devices get personal models", first)
    (folder.path / SUMMARY).unlink(missing_ok=True)
    write_begun(folder, config, inputs)
    folder.write_versions({PROCESSOR: compute.kind})
    log(logging.INFO, "computing on: %s, %s", compute.kind, compute.precision)
    cut_metrics(folder.path, state.metrics_bytes if state else 0)
    clock = Clock(folder.path / "timing.json")
    with loggers(config, folder) as replay:
        with clock.phase("backbone"):
            preparation = Preparation(config, images, folder, Fleet(grid, config, folder), compute)
        federation = Federation(preparation, replay)
        with clock.phase("round zero"):
            state = federation.resume(state) if state else federation.start()
        compute.release()
        state = federation.rounds(state, clock)
        with clock.phase("evaluation"):
            state = federation.evaluate(state)
        clock.write()
        summary = summarise(state, config, clock.seconds, preparation.cost.params, preparation.mixtures(state))
        write_summary(folder.path, summary)
        log(logging.INFO, "mean personal accuracy %.4f", summary.personal_accuracy)
        log(logging.INFO, "run folder: %s", folder.path)


class Federation:
    """The steps of a run: each takes a state and returns the next one. Except for caches, nothing else changes.

    Args:
        replay: sends the loggers the lines of metrics.jsonl that a saved state has made final.
    """

    def __init__(self, preparation: Preparation, replay: Callable[[], None]) -> None:
        self.preparation, self.replay = preparation, replay
        self.config, self.folder, self.fleet = preparation.config, preparation.folder, preparation.fleet
        self.adapters = GlobalAdapters(preparation)
        self.shares_adapters = self._method(1).shares_adapters
        why = reason_for_single(self.config, self.fleet.grid, preparation.backbone)
        if why and self.config.train.together == "auto":
            log(logging.INFO, "train.together = auto: one by one, because %s", why)
        self.steps_together = not why

    @property
    def hello(self) -> Hello:
        return Hello(self.preparation.key)

    def start(self) -> FederationState:
        """Returns the state after round zero: the devices have introduced themselves and have their pruned models."""
        state = FederationState(0, ServerState({}), self.fleet.meet(self.hello), plans={})
        if self.preparation.agree():
            state = self.fleet.learn_holders(state, self.hello)
        state, planned = self.preparation.pruned_models(state)
        self.adapters.warm_up([state.devices[i] for i in planned])
        state = replace(state, server=ServerState(self.adapters.first))
        return self.save(self.preparation.surgery(state, planned, self.adapters.message))

    def resume(self, state: FederationState) -> FederationState:
        """Returns a saved state, ready for the next round.

        Raises:
            PlanError: if a device's plan is missing, or is not the plan by which its model was pruned.
        """
        self.preparation.agree()
        self.fleet.meet_again(self.hello, state.devices, resumed=True)
        for i in state.plans:
            self.layout(state, i)
        log(logging.INFO, "the run continues after round %d of %d", state.round, self.config.train.rounds)
        # in the order of the layers, in which noise is drawn and sums are computed; a file has another order
        params = {name: state.server.params[name] for name in self.adapters.shapes}
        return replace(state, server=replace(state.server, params=params))

    def save(self, state: FederationState) -> FederationState:
        """Sets the present length of metrics.jsonl in the state, saves the state and returns it."""
        state = replace(state, metrics_bytes=metrics_size(self.folder.path))
        save_checkpoint(self.folder, self.config, state)
        self.replay()
        return state

    def rounds(self, state: FederationState, clock: Clock) -> FederationState:
        """Returns the state after the last round."""
        rounds = self.config.train.rounds
        with stage("rounds") as advance:
            advance(state.round, rounds)
            while (t := state.round + 1) <= rounds:
                with clock.round(t):
                    state = self.one_round(state)
                advance(t, rounds, f"personal accuracy {state.curve[-1].accuracy:.3f} after round {t - 1}")
        return state

    def one_round(self, state: FederationState) -> FederationState:
        """Lets the sampled devices train the global adapters, and aggregates what they upload."""
        t, before = state.round + 1, self.welcome(state)
        state, replies = self.train(before, t)
        state = self.aggregate(state, t, replies)
        return self.save(replace(self.record(state, replies, before), round=t))

    def welcome(self, state: FederationState) -> FederationState:
        """Meets nodes that joined since the last round, and sends pruned models to devices that have none yet."""
        self.fleet.meet_again(self.hello, state.devices)
        waiting = [i for i in state.devices if i not in state.plans]
        state = self.preparation.surgery(state, waiting, self.adapters.message, min_success=0)
        return self.preparation.refit(state)

    def train(self, state: FederationState, t: int) -> tuple[FederationState, dict[int, TrainReply]]:
        """Sends the adapters to the devices of round `t`; returns their answers, which may be none."""
        options, devices = self.config.devices, state.devices
        sample = sample_clients({i: devices[i].profile for i in state.plans}, options, self.config.seed, t)
        requests = {i: self._train_request(state, t, i) for i in (*sample.asked, *sample.dropped)}
        late = [i for i in sample.asked if options.deadline and self._seconds(state, i, requests[i]) > options.deadline]
        reasons = {"away": sample.away, "dropped out": sample.dropped, "late": sorted(late)}
        lines = [AbsenceLine(round=t, device=i, reason=reason) for reason, absent in reasons.items() for i in absent]
        append_lines(self.folder.path, *lines)
        unanswered = {i: requests.pop(i) for i in (*sample.dropped, *late)}
        state = state.with_sent({i: self._bytes_down(state, i) for i in unanswered})
        waited = options.deadline if unanswered else 0.0
        if not requests:
            return replace(state, simulated_seconds=state.simulated_seconds + waited), {}
        groups = groups_of({i: devices[i].macs for i in requests}, self.config.train) if self.steps_together else []
        state, replies = self.fleet.ask(state, f"round {t}", requests, waited=waited, groups=groups)
        return self._present(state, replies, t)

    def _present(
        self, state: FederationState, replies: Mapping[int, R], t: int
    ) -> tuple[FederationState, dict[int, R]]:
        state, active, lines = present(state, replies, t)
        append_lines(self.folder.path, *lines)
        return state, active

    def aggregate(self, state: FederationState, t: int, replies: Mapping[int, TrainReply]) -> FederationState:
        """Returns the state with the global adapters after round `t`; without answers they do not change."""
        updates = []
        for i, reply in replies.items():
            record, layout = state.devices[i], self._upload_layout(state, i, t)
            if layout:
                classes = None if record.held_classes is None else torch.tensor(record.held_classes)
                updates.append(Update(unpack(reply.adapters, layout), layout, record.train_samples, classes))
        state = state.with_devices({i: {"rounds": state.devices[i].rounds + 1, "last_round": t} for i in replies})
        if not updates:
            return state
        # whoever knows the seed can reproduce the noise, so a server that needs it secret sets TAPFL_SECRET
        generator = numpy_generator(self.config.seed, "aggregate", t, *of_secret(os.environ.get("TAPFL_SECRET", "")))
        options, privacy = self.config.adapters, self.config.privacy
        server = rules.aggregate(options, privacy, state.server, updates, self.adapters.initial, t, generator)
        return replace(state, server=server)

    def evaluate(self, state: FederationState) -> FederationState:
        """Lets all devices evaluate the final global adapters and store their personal model."""
        last, before = self.config.train.rounds + 1, state
        requests = {i: self._evaluate_request(state, last, i) for i in state.plans}
        state, replies = self._present(*self.fleet.ask(state, "evaluation", requests), last)
        return self.record(state, replies, before)

    def record(self, state: FederationState, replies: Replies, before: FederationState) -> FederationState:
        """Returns the state with the accuracies after the round of `before`, and writes them to metrics.jsonl."""
        ended = before.round == self.config.train.rounds
        measured = MEASURES if ended or is_evaluated(self.config.train, before.round) else ["alpha"]
        state, lines = evaluated(state, replies, before, measured, [*self.config.personalize.reference_rates])
        append_lines(self.folder.path, *lines)
        return state

    def layout(self, state: FederationState, i: int) -> Layout:
        """Returns which entries of the global adapters device `i` has. Raises PlanError as `resume`."""
        return self.adapters.layout(state.devices[i], state.plans[i])

    def _method(self, t: int) -> Method[Any]:
        return method_of(self.config.personalize, self.config.adapters, t)

    @property
    def _asked(self) -> tuple[int, bool]:
        """The number of references and whether images change, which the check of an answer needs."""
        return len(self.config.personalize.references), self.config.data.changing

    def _train_request(self, state: FederationState, t: int, i: int) -> Request[TrainReply]:
        record, length = state.devices[i], packed_size(self._upload_layout(state, i, t))
        trained = images_seen(record.train_samples, self.config.train)
        evaluated = record.test_samples if is_evaluated(self.config.train, t - 1) else 0
        return Request(
            lambda: Train(t, record.last_round, self._download(state, i)),  # made when it is sent, to save memory
            TrainReply,
            lambda reply: reply.check(t, *self._asked, length),
            max_bytes=4 * length + ENVELOPE,
            macs=training_macs(record.macs, trained, evaluated, self._method(t).models_per_step, record.adapted_share),
        )

    def _evaluate_request(self, state: FederationState, last: int, i: int) -> Request[EvaluateReply]:
        record = state.devices[i]
        return Request(
            lambda: Evaluate(last, record.last_round, self._download(state, i)),
            EvaluateReply,
            lambda reply: reply.check(last, *self._asked),
            max_bytes=ENVELOPE,
            macs=2 * record.macs * record.test_samples,
        )

    def _seconds(self, state: FederationState, i: int, request: Request[TrainReply]) -> float:
        up = 4 * packed_size(self._upload_layout(state, i, state.round + 1))
        return seconds(state.devices[i].profile, self._bytes_down(state, i).total(), request.macs, up)

    def _bytes_down(self, state: FederationState, i: int) -> Counter[str]:
        """Returns the bytes by kind of a training message; they follow from the layout, without the adapters."""
        return Train(0, 0, np.zeros(packed_size(self._download_layout(state, i)), np.float32)).bytes_by_kind

    def _download(self, state: FederationState, i: int) -> np.ndarray:
        """Returns the global adapters for a device, packed."""
        layout = self._download_layout(state, i)
        return pack(gather_all(state.server.params, layout), layout) if layout else np.zeros(0, np.float32)

    def _download_layout(self, state: FederationState, i: int) -> Layout:
        if not self.shares_adapters and state.devices[i].last_round:
            return {}  # devices that share nothing get the global adapters only once, to start
        return rules.down(self.config.adapters, self.layout(state, i))

    def _upload_layout(self, state: FederationState, i: int, t: int) -> Layout:
        return rules.up(self.config.adapters, self.layout(state, i), t) if self.shares_adapters else {}
