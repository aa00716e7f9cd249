"""TensorBoard and MLflow: they get each number of metrics.jsonl once, and can neither change nor stop a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from killing import copied_after
from mlflow import MlflowClient
from representatives import some_slow
from sqlalchemy import event
from sqlalchemy.engine import Engine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_inprocess_run import content, tapfl
from test_refused_input import refused

from experiments.jobs.federation import AFTER, AFTER_SUMMARIES, _hash
from strategies import loggers
from strategies.loggers import EventFiles, Feed, Point, hyperparameters, points_of
from strategies.records import AbsenceLine, DeviceLine, FailureLine, RoundLine, TrafficLine
from strategies.state import config_hash
from tapfl.config import RunConfig
from tapfl.errors import ConfigError
from tapfl.run_folder import RunFolder

Curves = dict[str, list[tuple[int, float]]]
TWO = ["devices.count=2", "data.public-share=0.9"]
MEASURES = ("global_accuracy", "personal_accuracy", "alpha")


MOMENTS = {
    "between a checkpoint and the loggers": ("strategies.server_app", "save_checkpoint", 2),
    "when one logger has been told, the other not": ("strategies.loggers", "EventFiles.add", 1),
    "between telling and the next checkpoint": ("strategies.server_app", "Federation.record", 2),
    "when the server has been told": ("strategies.loggers", "Tracking.add", 2),
}


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """SQLite does not use Python's `fsync`."""

    def connected(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", connected)
    yield
    event.remove(Engine, "connect", connected)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of MLflow's database, and of the run `finished`."""
    return tmp_path_factory.mktemp("store") / "whole"


@pytest.fixture(scope="module")
def uri(store: Path) -> str:
    store.mkdir()
    return f"sqlite:///{store}/mlflow.db"


@pytest.fixture(scope="module")
def finished(cache: Path, store: Path, uri: str) -> Path:
    """A finished run; `killed` has the run and the database as a kill at each of the moments would have left them."""
    folder = store / "told"
    with copied_after(MOMENTS, store, store.parent / "killed"):
        done = tapfl("--out", str(folder), cache=cache, options=[*TWO, "log.tensorboard=true", f"log.mlflow={uri}"])
    assert done.exit_code == 0, done.output
    return folder


def metrics(folder: Path) -> Curves:
    """Returns the content of metrics.jsonl as curves by tag."""
    curves: Curves = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "round":
            told = {f"round/{name}": line[name] for name in line if name not in ("kind", "round")}
        elif line["kind"] == "device":
            told = {f"{name}/device-{line['device']:02d}": line[name] for name in MEASURES}
            if "next_loss" in line:
                told[f"next_loss/device-{line['device']:02d}"] = line["next_loss"]
        elif line["kind"] == "traffic" and line["round"]:
            sums = {f"bytes_{side}": sum(line[side].values()) for side in ("up", "down")}
            sums["simulated_seconds"] = line["simulated_seconds"]
            told = {f"{name}/device-{line['device']:02d}": value for name, value in sums.items()}
        else:
            continue
        for tag, value in told.items():
            curves.setdefault(tag, []).append((line["round"], value))
    return curves


def in_event_files(folder: Path) -> Curves:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def in_mlflow(folder: Path, uri: str) -> Curves:
    client, run = MlflowClient(tracking_uri=uri), json.loads((folder / "mlflow.json").read_text())["run"]
    return {
        tag: [(metric.step, metric.value) for metric in client.get_metric_history(run, tag)]
        for tag in client.get_run(run).data.metrics
    }


def float32(curves: Curves) -> Curves:
    """Event files store float32."""
    return {tag: [(step, pytest.approx(value, rel=1e-6)) for step, value in curve] for tag, curve in curves.items()}


def test_event_files_hold_the_numbers_of_metrics(finished: Path) -> None:
    expected = metrics(finished)
    assert len(expected) == 7 + 2 * 7 and len(expected["personal_accuracy/device-01"]) == 3
    assert in_event_files(finished) == float32(expected)


def test_mlflow_holds_the_numbers_of_metrics(finished: Path, uri: str) -> None:
    assert in_mlflow(finished, uri) == metrics(finished)
    client, kept = MlflowClient(tracking_uri=uri), json.loads((finished / "mlflow.json").read_text())
    run = client.get_run(kept["run"])
    assert (run.info.run_name, run.info.status) == ("told", "FINISHED")
    assert client.get_experiment_by_name("tapfl").experiment_id == run.info.experiment_id
    assert run.data.params["train.rounds"] == "2" and run.data.params["pruning.criterion"] == "tap"


def test_hyperparameters_are_in_the_event_files_once(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert {"_hparams_/session_start_info", "custom_scalars__config__"} <= events.summary_metadata.keys()
    assert [path.name for path in (finished / "tensorboard").iterdir() if path.is_dir()] == []


def test_loggers_do_not_change_a_bit(finished: Path, cache: Path, tmp_path: Path) -> None:
    assert tapfl("--out", str(tmp_path / "untold"), cache=cache, options=TWO).exit_code == 0
    assert content(finished) == content(tmp_path / "untold")
    assert not (tmp_path / "untold" / "tensorboard").exists() and not (tmp_path / "untold" / "mlflow.json").exists()


def test_options_that_name_a_place_are_not_logged(finished: Path, uri: str) -> None:
    run = MlflowClient(tracking_uri=uri).get_run(json.loads((finished / "mlflow.json").read_text())["run"])
    assert str(finished.parent) not in str(run.data)
    config = RunConfig.from_flat({"data.source": "/home/me/patients", "model.weights": "hub", "cache": "/home/me"})
    told = hyperparameters(config)
    assert not {"out", "cache", "data.source", "log.mlflow", "resume"} & told.keys()
    assert told["model.weights"] == "hub" and told["seed"] == 0


def test_event_files_opened_in_the_same_second_are_read_in_the_order_of_writing(tmp_path: Path) -> None:
    files = partial(EventFiles, RunFolder(tmp_path), RunConfig())
    files().add([Point("alpha", 0, 0.5)])
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name(re.sub(r"\.\d+\.\d+$", ".99999.0", first.name)))  # a process with a larger id
    files().add([Point("alpha", 1, 0.5)])
    assert in_event_files(tmp_path) == {"alpha": [(0, 0.5), (1, 0.5)]}


@pytest.mark.parametrize("moment", some_slow(MOMENTS, list(MOMENTS)[2:]))
def test_killed_and_resumed_has_every_point_once(
    moment: str, finished: Path, store: Path, cache: Path, uri: str, tmp_path: Path
) -> None:
    copy = (store.parent / "killed" / moment).rename(tmp_path / "copy")
    folder, own = copy / "told", uri.replace(str(store), str(copy))
    for file in (folder / "config.json", folder / "mlflow.json"):
        file.write_text(file.read_text().replace(uri, own))
    before = (folder / "mlflow.json").read_text()
    done = tapfl("--resume", str(folder), cache=cache, options=TWO)
    assert done.exit_code == 0, done.output
    assert (folder / "mlflow.json").read_text() == before and own in before
    assert in_event_files(folder) == float32(metrics(finished)) and in_mlflow(folder, own) == metrics(finished)
    assert content(folder) == content(finished)


def test_loggers_can_be_added_when_a_run_is_resumed_or_finished(cache: Path, uri: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    assert tapfl("--out", folder, cache=cache, options=[*TWO, "train.rounds=1"]).exit_code == 0
    done = tapfl("--resume", folder, cache=cache, options=[*TWO, "log.tensorboard=true"])
    assert done.exit_code == 0, done.output
    assert in_event_files(tmp_path / "run") == float32(metrics(tmp_path / "run"))
    files = content(tmp_path / "run")
    for _ in range(2):
        done = tapfl(
            "--resume", folder, cache=cache, options=[*TWO, f"log.mlflow={uri}", "log.mlflow-experiment=other"]
        )
        assert done.exit_code == 0, done.output
        assert in_mlflow(tmp_path / "run", uri) == metrics(tmp_path / "run")
    assert content(tmp_path / "run") == files


def test_an_unavailable_server_is_warned_of_once_and_gets_missed_points_later(
    cache: Path, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = loggers.Tracking.add, []

    def add(self: loggers.Tracking, points: list[Point]) -> None:
        calls.append(len(points))
        if len(calls) < 3:
            raise ConnectionError("no route to host")
        real(self, points)

    monkeypatch.setattr(loggers.Tracking, "add", add)
    options = [*TWO, f"log.mlflow={uri}", "train.rounds=4"]
    done = tapfl("--out", str(tmp_path / "run"), cache=cache, options=options)
    assert done.exit_code == 0, done.output
    warnings = [record.getMessage() for record in caplog.records if "log.mlflow" in record.getMessage()]
    assert len(warnings) == 1 and "no route to host" in warnings[0] and "the run continues" in warnings[0]
    assert len(calls) == 3  # after the first and the third checkpoint with lines, and at the end
    assert in_mlflow(tmp_path / "run", uri) == metrics(tmp_path / "run")


def test_points_of_a_partly_sent_batch_are_not_duplicated(
    finished: Path, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "METRICS_AT_ONCE", 40)
    logger = loggers.Tracking(_Folder(tmp_path), RunConfig.from_flat({"log.mlflow": uri}))
    real, sent = logger._client.log_batch, []

    def once(*arguments: Any, **named: Any) -> None:
        sent.append(1)
        if len(sent) == 2:
            raise TimeoutError
        real(*arguments, **named)

    monkeypatch.setattr(logger._client, "log_batch", once)
    feed = Feed("log.mlflow", lambda: logger, _Folder(finished))
    feed.bring()
    feed.close(finished=True)
    assert in_mlflow(tmp_path, uri) == metrics(finished)


def test_a_run_deleted_on_the_server_is_created_again(finished: Path, uri: str, tmp_path: Path) -> None:
    config = RunConfig.from_flat({"log.mlflow": uri})
    for _ in range(2):
        feed = Feed("log.mlflow", lambda: loggers.Tracking(_Folder(tmp_path), config), _Folder(finished))
        feed.bring()
        feed.close(finished=True)
        assert in_mlflow(tmp_path, uri) == metrics(finished)
        MlflowClient(tracking_uri=uri).delete_run(json.loads((tmp_path / "mlflow.json").read_text())["run"])


class _Folder:
    """The part of a run's folder that a logger reads."""

    def __init__(self, path: Path) -> None:
        self.path = path


def test_lines_as_points() -> None:
    line = RoundLine(round=3, devices=2, simulated_seconds=1.5, alpha=0.5, bytes_up=7, bytes_down=8)
    assert points_of(line) == [
        Point("round/devices", 3, 2),
        Point("round/simulated_seconds", 3, 1.5),
        Point("round/alpha", 3, 0.5),
        Point("round/bytes_up", 3, 7),
        Point("round/bytes_down", 3, 8),
    ]
    device = DeviceLine(round=1, device=7, global_accuracy=0.25, personal_accuracy=0.75, alpha=0.5, next_loss=2.0)
    assert points_of(device) == [
        Point("global_accuracy/device-07", 1, 0.25),
        Point("personal_accuracy/device-07", 1, 0.75),
        Point("alpha/device-07", 1, 0.5),
        Point("next_loss/device-07", 1, 2.0),
    ]
    assert len(points_of(device.model_copy(update={"next_loss": None}))) == 3
    traffic = TrafficLine(
        phase="round 2", round=2, device=12, down={"a": 1, "b": 2}, up={"a": 4}, simulated_seconds=0.5
    )
    for phase, round in (("surgery", 0), ("surgery", 2), ("mixtures after round 2", 2)):
        assert points_of(traffic.model_copy(update={"phase": phase, "round": round})) == []
    assert len(points_of(traffic.model_copy(update={"phase": "evaluation"}))) == 3
    assert points_of(traffic) == [
        Point("simulated_seconds/device-12", 2, 0.5),
        Point("bytes_up/device-12", 2, 4),
        Point("bytes_down/device-12", 2, 3),
    ]
    assert points_of(FailureLine(phase="round 2", device=1, reason="lost")) == []
    assert points_of(AbsenceLine(round=2, device=1, reason="late")) == []


def test_loggers_are_not_part_of_a_run_s_identity() -> None:
    plain = RunConfig().flat()
    told = RunConfig.from_flat(
        {"log.tensorboard": True, "log.mlflow": "http://h:1", "log.mlflow-experiment": "x"}
    ).flat()
    assert config_hash(plain) == config_hash(told)
    for after in (AFTER, AFTER_SUMMARIES):
        assert _hash(plain, after) == _hash(told, after)


REFUSED = {
    "nobody there": ("log.mlflow=http://127.0.0.1:9", "log.mlflow = 'http://127.0.0.1:9'", "leave it empty"),
    "no such scheme": ("log.mlflow=nonsense://x", "log.mlflow = 'nonsense://x'", "http"),
    "plain folder": ("log.mlflow=file:///tmp/no-mlruns", "log.mlflow = 'file:///tmp/no-mlruns'", "sqlite"),
    "relative database": ("log.mlflow=sqlite:///mlflow.db", "mlflow=sqlite:///mlflow.db", "sqlite:////"),
    "no experiment": ("log.mlflow-experiment=", "log.mlflow-experiment = ''", "at least 1 character"),
    "no switch": ("log.tensorboard=events", "log.tensorboard = 'events'", "boolean"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_loggers_are_refused(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    option, named, accepted = REFUSED[case]
    error = refused(capsys, monkeypatch, "--set", option, "--set", f"cache={cache}")
    assert named in error and accepted in error
    assert not list(tmp_path.iterdir()) and not Path("/tmp/no-mlruns").exists()


@pytest.mark.parametrize("uri", ["http://me:hush@host:5000", "postgresql://host/db?user=me&password=hush"])
def test_a_password_is_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        RunConfig.from_flat({"log.mlflow": uri})
    assert "hush" not in str(refusal.value)


def test_a_deleted_experiment_is_refused(finished: Path, uri: str) -> None:
    client = MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.create_experiment("gone"))
    options = RunConfig.from_flat({"log.mlflow": uri, "log.mlflow-experiment": "gone"}).log
    with pytest.raises(ConfigError, match=r"log\.mlflow-experiment = 'gone': exists, but is deleted"):
        loggers.require_loggers(options)


@pytest.mark.parametrize(
    ("module", "option", "extra"),
    [("tensorboard", "log.tensorboard=true", "tensorboard"), ("mlflow", "log.mlflow=http://h:1", "mlflow")],
)
def test_without_its_extra_a_logger_is_refused_with_what_installs_it(
    module: str,
    option: str,
    extra: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cache: Path,
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == module else find_spec(name))
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, monkeypatch, "--set", option, "--set", f"cache={cache}")
    assert f"of the extra tapfl[{extra}]" in error and option.split("=")[0] in error
    assert not list(tmp_path.iterdir())


def test_mlflow_can_use_a_plain_folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/mlruns"
    config = RunConfig.from_flat({"log.mlflow": uri})
    loggers.require_loggers(config.log)
    feed = Feed("log.mlflow", lambda: loggers.Tracking(_Folder(tmp_path), config), _Folder(finished))
    feed.bring()
    feed.close(finished=True)
    assert in_mlflow(tmp_path, uri) == metrics(finished)
