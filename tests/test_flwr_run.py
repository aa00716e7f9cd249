"""A plain `flwr run .` in the project's folder: it works, and it installs nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import ignore_patterns

import pytest
from flwr.common.config import get_fused_config_from_dir
from flwr.supercore.superexec.dependency_installer import RuntimeDependencyInstallationError, install_app_dependencies
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_inprocess_run import TINY, content
from typer.testing import CliRunner

from experiments import cli

ROOT = Path(__file__).parent.parent
# `flwr` gives its SuperLink 15 s to start, which is not enough on a busy machine
FLWR = """
from flwr.cli import constant
constant.LOCAL_SUPERLINK_STARTUP_TIMEOUT = 300.0
from flwr.cli.app import app
app()
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def flower_at_home(folder: Path) -> Iterator[dict[str, str]]:
    """Flower with its own home and port; the SuperLink that `flwr run` leaves running is ended by its id."""
    home = folder / "home"
    ray = tempfile.mkdtemp(prefix="tapfl-test-")  # short, because the path of a socket is limited
    yield os.environ | {
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": ray,  # Ray would join the cluster named in its folder, even if that was killed
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "TAPFL_CACHE": str(folder / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for _ in range(50):
        left = [pid for pid in processes_of(home) if pid != os.getpid()]
        if not left:
            break
        for pid in left:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    shutil.rmtree(ray, ignore_errors=True)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of docs/tutorial.md, with which Flower creates no runtime environment."""
    with flower_at_home(tmp_path_factory.mktemp("flower")) as environment:
        yield environment | {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}


def processes_of(home: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"FLWR_HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project without its environment: Flower compares each file there with its patterns, which takes 15 s."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("project") / "tapfl", ignore=ignore_patterns(".git", *ignored))


def flwr(project: Path, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", FLWR, *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return done.stdout + done.stderr


def small(**options: object) -> dict[str, object]:
    """Returns the options of a small run, and these."""
    return {
        "model.args": TINY,
        "model.epochs": 1,
        "data.public-share": 0.8,
        "metric.size": 64,
        "pruning.criterion": "tap",
        "pruning.align": 1,
        "train.rounds": 1,
        "train.epochs": 1,
        "personalize.method": "fedavg",
        **options,
    }


def run_config(**options: object) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in small(**options).items())


def test_flwr_run_uses_all_nodes_installs_nothing_and_gives_the_bits_of_one_process(
    project: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    said = flwr(project, environment, "run", ".", "--stream", "--run-config", run_config(out=str(tmp_path / "run")))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["devices"]) == 2 and "num-supernodes=10" in said
    assert str(tmp_path / "run") in said
    assert json.loads((tmp_path / "run" / "config.json").read_text())["personalize.method"] == "fedavg"
    runtime = Path(environment["FLWR_HOME"]) / "runtime-envs"
    assert not runtime.exists() or not list(runtime.iterdir())
    options = small(**{"devices.count": 2, "cache": environment["TAPFL_CACHE"], "out": str(tmp_path / "one-process")})
    sets = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(cli.app, ["run", "--engine", "inprocess", "--no-report", *sets], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert computed(tmp_path / "run") == computed(tmp_path / "one-process")


def computed(run: Path) -> dict[str, object]:
    """Returns all results of a run, without the options in the checkpoint, one of which is the number of devices."""
    adapters = load_file(run / "server" / "round-0001.safetensors")
    rest = {name: data for name, data in content(run).items() if not name.startswith("server/")}
    return rest | {name: tensor.tolist() for name, tensor in adapters.items()}


@pytest.mark.slow
def test_flwr_run_resumes_a_run(project: Path, environment: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, object] = {"out": str(tmp_path / "run"), "log.tensorboard": True}
    flwr(project, environment, "run", ".", "--stream", "--run-config", run_config(**options))
    more = run_config(**options | {"train.rounds": 2, "resume": True})
    assert "continues after round 1 of 2" in flwr(project, environment, "run", ".", "--stream", "--run-config", more)
    assert (tmp_path / "run" / "server" / "round-0002.safetensors").exists()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("round/personal_accuracy")] == [0, 1, 2]


def test_what_flower_does_without_the_export_fails_at_once_instead_of_downloading(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(RuntimeDependencyInstallationError, match="The project is marked as unmanaged"):
        install_app_dependencies(project)


@pytest.mark.slow
def test_without_the_export_it_fails_at_once_instead_of_downloading(project: Path, tmp_path: Path) -> None:
    with flower_at_home(tmp_path) as environment:
        assert "The project is marked as unmanaged" in flwr(project, environment, "run", ".", "--stream")


def test_flower_knows_the_options_and_no_others() -> None:
    """As the SuperLink checks a run before it starts it."""
    known = get_fused_config_from_dir(ROOT, {"train.rounds": 3})
    assert known["train.rounds"] == 3
    with pytest.raises(ValueError, match=r"'train\.roundz' is not present"):
        get_fused_config_from_dir(ROOT, {"train.roundz": 3})


@pytest.mark.slow
def test_an_unknown_option_is_refused(project: Path, environment: dict[str, str]) -> None:
    assert "Invalid run configuration" in flwr(project, environment, "run", ".", "--run-config", "train.roundz=3")
