"""Devices that lie: their messages are refused and reported, and the federation continues with the others."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from representatives import some_slow
from test_inprocess_run import SMALL, THREE

from clients import client_app as real
from experiments.engines.local import run_inprocess
from strategies.server_app import app as server_app
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, RunError
from tapfl.options import parse_assignment
from tapfl.wire import HelloReply, PruneReply, SummaryReply, TrainReply
from tapfl.wire_format import WireMessage

Lie = Callable[[WireMessage], WireMessage]


def lying(device: int, kind: type[WireMessage], lie: Lie) -> ClientApp:
    """A ClientApp that is honest except for one kind of answer of one device."""
    app = ClientApp()

    def tampered(answer: Callable[[Message, Context], Message], type: type[WireMessage]) -> Callable[..., Message]:
        def handler(message: Message, context: Context) -> Message:
            reply = answer(message, context)
            if context.node_config["partition-id"] != device or type is not kind:
                return reply
            return Message(lie(type.from_records(reply.content)).to_records(), reply_to=message)

        return handler

    app.query("hello")(tampered(real.hello, HelloReply))
    app.query("summarize")(tampered(real.summarize, SummaryReply))
    app.query("prune")(tampered(real.prune, PruneReply))
    app.train()(tampered(real.train, TrainReply))
    app.evaluate()(real.evaluate)
    return app


def nan_adapters(reply: TrainReply) -> TrainReply:
    return replace(reply, adapters=np.full_like(reply.adapters, np.nan))


LIES = {  # what else may be wrong with a mixture: tests/test_mixture.py
    "unknown device": (HelloReply, lambda r: replace(r, partition_id=77), "unknown device"),
    "means of NaN": (SummaryReply, lambda r: replace(r, means=r.means * np.nan), "finite"),
    "means of another dimension": (SummaryReply, lambda r: replace(r, means=r.means[:, :3]), "do not match"),
    "another model": (PruneReply, lambda r: replace(r, macs=r.macs + 1), "the plan says"),
    "adapters of NaN": (TrainReply, nan_adapters, "finite"),
    "adapters too short": (TrainReply, lambda r: replace(r, adapters=r.adapters[:-1]), "shape"),
}


def federation(
    folder: Path, cache: Path, client_app: ClientApp, **changes: object
) -> tuple[Path, list[dict[str, object]]]:
    options = dict(parse_assignment(option) for option in [*SMALL, *THREE]) | {"out": str(folder), "cache": str(cache)}
    run_inprocess(server_app, client_app, RunConfig.from_flat(options | changes).flat(), 3)
    return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


SLOW = {"means of another dimension", "adapters too short"}


@pytest.mark.parametrize("case", some_slow(LIES, SLOW))
def test_a_lie_is_refused_and_the_federation_continues(
    case: str, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, lie, reason = LIES[case]
    last = 2 if kind is TrainReply else 1
    folder, lines = federation(tmp_path / "run", cache, lying(1, kind, lie), **{"train.rounds": last})
    assert "refused" in caplog.text and reason in caplog.text
    rounds = [line for line in lines if line["kind"] == "round"]
    assert len(rounds) == 1 + last and all(line["devices"] >= 2 for line in rounds)
    assert np.isfinite(json.loads((folder / "summary.json").read_text())["personal_accuracy"])
    if kind is not HelloReply:
        failures = [line for line in lines if line["kind"] == "failure"]
        assert failures and all(line["device"] == 1 and reason in str(line["reason"]) for line in failures)


@pytest.mark.parametrize(("liar", "said", "there"), [(1, 0, 2), (0, 1, 1)], ids=["liar second", "liar first"])
def test_a_second_device_with_the_same_number_is_ignored(
    liar: int,
    said: int,
    there: int,
    cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A liar that is met first takes the other device's place and gets its model; it gains nothing by this."""
    node_ids = itertools.count(1)
    monkeypatch.setattr("secrets.randbits", lambda bits: next(node_ids))  # nodes are met in the order of their ids
    liars = lying(liar, HelloReply, lambda r: replace(r, partition_id=said))
    _, lines = federation(tmp_path / "run", cache, liars, **{"train.rounds": 1})
    assert "because another node is device" in caplog.text
    assert {line["devices"] for line in lines if line["kind"] == "round"} == {there}


def test_when_all_lie_the_run_ends_with_the_reason(cache: Path, tmp_path: Path) -> None:
    everyone = ClientApp()
    everyone.query("hello")(real.hello)
    with pytest.raises(RunError, match="summaries: no device answered"):
        federation(tmp_path / "run", cache, everyone)


@pytest.mark.parametrize("method", ["apfl", "local"])
def test_when_training_diverges_on_all_devices_the_run_ends_with_what_to_lower(
    method: str, cache: Path, tmp_path: Path
) -> None:
    said = r"round 1: no device answered; .*train\.learning-rate = 1e\+20: local training diverged at step \d+ of"
    with pytest.raises(RunError, match=said):
        federation(tmp_path / "run", cache, real.app, **{"train.learning-rate": 1e20, "personalize.method": method})
    assert not list((tmp_path / "run" / "devices").rglob("round-*"))


def test_a_relative_path_is_refused_where_flower_chooses_the_folder(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out = 'somewhere': must be an absolute path"):
        federation(tmp_path / "run", cache, real.app, out="somewhere")


def test_a_number_of_devices_that_the_nodes_do_not_match_ends_the_run(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"devices.count = 5, but 3 nodes are connected after 0.2 s"):
        federation(tmp_path / "run", cache, real.app, **{"devices.count": 5, "node-timeout": 0.2})
