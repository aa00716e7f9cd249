"""The Ray engine: the same bits as in one process, on warm actors, whoever dies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_inprocess_run import SMALL, content, tapfl

from experiments.engines.ray import Workers
from experiments.preflight import absolute_paths
from strategies.server_app import app as server_app
from tapfl.config import RunConfig


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(count=2) as warm:
        yield warm


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_process(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("runs") / "inprocess"
    assert tapfl("--out", str(folder), cache=cache).exit_code == 0
    return content(folder)


def on_ray(workers: Workers, folder: Path, cache: Path, client_app: str = "", **changes: object) -> dict[str, bytes]:
    options: dict[str, object] = dict(option.split("=", 1) for option in SMALL)
    config = RunConfig.from_flat(options | changes | {"out": str(folder), "cache": str(cache)})
    apps = {"client_app": client_app} if client_app else {}
    workers.run(server_app, absolute_paths(config).flat(), config.devices.count, **apps)
    assert json.loads((folder / "summary.json").read_text())["devices"]
    return content(folder)


def test_warm_actors_and_one_process_give_the_same_bits(
    workers: Workers, cache: Path, tmp_path: Path, one_process: dict[str, bytes]
) -> None:
    assert on_ray(workers, tmp_path / "run", cache) == one_process


def test_an_actor_that_is_killed_comes_back_and_what_it_lost_is_sent_again(
    workers: Workers, cache: Path, tmp_path: Path, one_process: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    assert on_ray(workers, tmp_path / "run", cache, "faulty_apps:mortal") == one_process
    assert (cache / "died").exists() and "sent again" in caplog.text


def test_runs_at_the_same_time_do_not_touch_each_other(
    workers: Workers, cache: Path, tmp_path: Path, one_process: dict[str, bytes]
) -> None:
    """Each trains a backbone of its own at first, whose weights are drawn from torch's global generator."""
    with ThreadPoolExecutor(3) as pool:
        first, second, third = pool.map(
            lambda seed: on_ray(workers, tmp_path / f"run-{seed}", tmp_path / "cache", seed=seed), (0, 1, 2)
        )
    assert first == one_process
    assert second != first != third
