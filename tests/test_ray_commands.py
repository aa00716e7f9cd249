"""Sweeps and searches on Ray from the command line: the same results as without Ray, and no Ray process left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from test_flower_engine import left_running
from test_inprocess_run import content
from test_search import command, search_file, table, until
from test_sweep import in_threads, sweep_file
from typer.testing import CliRunner

from experiments import cli
from experiments.bench.engines import ProcessTree
from experiments.sweep.grid import read_sweep


class Typed:
    """A command in its own session, and the Ray processes that it starts."""

    def __init__(self, *arguments: str, marker: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.cli", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"MARKER": marker},  # inherited by all processes that it starts
            start_new_session=True,
        )
        self.marker, self._tree = marker, ProcessTree(self.process.pid)
        self.folders: set[str] = set()
        self.ports: set[str] = set()

    def runs(self) -> bool:
        """Returns whether the command is running, and records the Ray processes below it."""
        for process in self._tree.processes():
            with suppress(OSError):
                line = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace")
                self.folders |= set(re.findall(r"/tmp/tapfl-ray-\w+", line))
                self.ports |= set(re.findall(r"gcs_server_port=(\d+)", line))
        return self.process.poll() is None

    def left(self) -> list[str]:
        """Returns the processes and folders of Ray that are left."""
        return left_running(self.marker) + [folder for folder in self.folders if Path(folder).exists()]


@pytest.fixture
def typed() -> Iterator[type[Typed]]:
    """Yields `Typed`, whose commands are ended after the test."""
    started: list[Typed] = []

    class Ending(Typed):
        def __init__(self, *arguments: str, marker: str) -> None:
            super().__init__(*arguments, marker=marker)
            started.append(self)

    yield Ending
    for each in started:
        each.process.kill()


@pytest.mark.slow
def test_a_sweep_on_ray_has_the_same_results_and_leaves_no_process(typed: type[Typed], tmp_path: Path) -> None:
    file, out = sweep_file(tmp_path, '"personalize.method" = ["fedavg", "local"]'), tmp_path / "ray"
    options = ["--engine", "ray", "--workers", "1", "--jobs", "2"]
    sweep = typed("sweep", "--config", str(file), "--out", str(out), *options, marker=str(tmp_path))
    until(lambda: not sweep.runs(), 300)
    assert sweep.process.returncode == 0, sweep.process.communicate()[1][-2000:]
    assert len(sweep.folders) == 1 and len(sweep.ports) == 1, "a Ray of its own"
    assert "6379" not in sweep.ports, "where somebody else's may listen"
    assert not sweep.left()
    cells, here = read_sweep(file)[0], tmp_path / "here"
    assert not in_threads(cells, here, 1)
    for cell in cells:
        assert content(out / cell.name) == content(here / cell.name)


@pytest.mark.slow
def test_an_interrupted_search_on_ray_leaves_no_process_and_resumes_without_ray(
    typed: type[Typed], tmp_path: Path
) -> None:
    file, out = search_file(tmp_path), tmp_path / "out"
    options = ["--engine", "ray", "--workers", "1", "--jobs", "2"]
    search = typed("search", "--config", str(file), "--out", str(out), *options, marker=str(tmp_path))
    until(lambda: not search.runs() or (out / "trials" / "0001" / "server").exists(), 300)
    os.killpg(search.process.pid, signal.SIGINT)  # as Ctrl-C does it
    _, said = search.process.communicate(timeout=60)
    assert search.process.returncode == 130 and "--resume" in said and "Traceback" not in said
    until(lambda: not search.left(), 10)
    assert search.folders and not (out / "trials.csv").exists()
    done = CliRunner().invoke(cli.app, command(file, out, "--resume"), catch_exceptions=False)
    assert done.exit_code == 0
    whole = CliRunner().invoke(cli.app, command(file, tmp_path / "whole"), catch_exceptions=False)
    assert whole.exit_code == 0 and table(out) == table(tmp_path / "whole")
