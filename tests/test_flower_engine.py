"""Flower's own simulation on Ray: the same bits as in one process, its true exit status, and no process left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_inprocess_run import SMALL, content, tapfl

DRIVER = """
import sys, json
from experiments.engines.flower import run_flower
from experiments.preflight import absolute_paths
from tapfl.config import RunConfig
options, workers, apps = json.loads(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
run_flower(absolute_paths(RunConfig.from_flat(options)).flat(), options["devices.count"], workers, **apps)
"""


def simulate(
    folder: Path, cache: Path, workers: int, options: dict[str, object] | None = None, **apps: str
) -> subprocess.CompletedProcess[str]:
    given: dict[str, object] = dict(option.split("=", 1) for option in SMALL)
    options = given | {"devices.count": 4} | (options or {}) | {"out": str(folder), "cache": str(cache)}
    environment = os.environ | {"RAY_TMPDIR": "", "PYTHONPATH": str(Path(__file__).parent)}
    environment.pop("RAY_TMPDIR")
    return subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(options), str(workers), json.dumps(apps)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=environment,
    )


def left_running(needle: str) -> list[str]:
    """Returns the command lines of processes with `needle` in their arguments or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if needle.encode() in text and process.name != str(os.getpid()):
            found.append((process / "cmdline").read_bytes().decode(errors="replace"))
    return found


@pytest.fixture(scope="module")
def one_process(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("runs") / "inprocess"
    assert tapfl("--out", str(folder), cache=cache).exit_code == 0
    return content(folder)


@pytest.mark.slow  # in the default suite tests/test_flwr_run.py compares the bits
def test_one_worker_and_one_process_give_the_same_bits(
    cache: Path, tmp_path: Path, one_process: dict[str, bytes]
) -> None:
    done = simulate(tmp_path / "run", cache, workers=1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(tmp_path / "run") == one_process


@pytest.mark.slow
def test_two_workers_give_the_same_bits_even_if_one_is_killed(
    cache: Path, tmp_path: Path, one_process: dict[str, bytes]
) -> None:
    """A message is lost with the worker; the worker is restarted, and the message is sent again."""
    done = simulate(tmp_path / "run", cache, workers=2, client_app="faulty_apps:mortal")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "died").exists()
    assert "sent again" in done.stdout + done.stderr
    assert content(tmp_path / "run") == one_process


@pytest.mark.slow
def test_an_exception_of_the_server_app_ends_the_run_and_all_processes(cache: Path, tmp_path: Path) -> None:
    done = simulate(tmp_path / "run", cache, workers=1, server_app="faulty_apps:broken_server")
    assert done.returncode == 1
    assert "ArithmeticError: the server app raised" in done.stderr
    assert not left_running(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["flower", "ray"])
def test_ctrl_c_ends_the_run_and_all_processes(engine: str, cache: Path, tmp_path: Path) -> None:
    sets = [part for option in [*SMALL, f"cache={cache}", "train.rounds=10000"] for part in ("--set", option)]
    command = [sys.executable, "-m", "experiments.cli", "run", "--engine", engine, "--workers", "1"]
    command += ["--out", str(tmp_path / "run"), *sets]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "run" / "server").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"interrupted; continue with: tapfl run --resume {tmp_path / 'run'}" in said
    assert not left_running(str(tmp_path))


@pytest.mark.slow
def test_a_killed_simulation_resumes_to_the_same_bits(cache: Path, tmp_path: Path) -> None:
    """SIGKILL of the process with server and driver, in the second round; Ray notices it."""
    options = ["train.rounds=3", "devices.participation=0.75"]
    assert tapfl("--out", str(tmp_path / "whole"), cache=cache, options=options).exit_code == 0
    sets = [part for option in [*SMALL, f"cache={cache}", *options] for part in ("--set", option)]
    command = [sys.executable, "-m", "experiments.cli", "run", "--no-report", "--workers", "2"]
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [*command, "--out", str(folder), *sets], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 200
        while not (folder / "server" / "round-0001.safetensors").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not (folder / "summary.json").exists()
    done = subprocess.run([*command, "--resume", str(folder)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the run continues after round" in done.stdout + done.stderr
    assert content(folder) == content(tmp_path / "whole")
    deadline = time.monotonic() + 120
    while left_running(str(folder)) and time.monotonic() < deadline:
        time.sleep(1)
    assert not left_running(str(folder))
