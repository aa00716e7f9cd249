"""Pools of workers: results, events and errors of jobs; workers that die; and no process outlives the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import trivial_jobs
from test_search import running, until
from typer.testing import CliRunner

from experiments import cli
from experiments.engines.cluster import MachineError
from experiments.jobs import pool as pool_module
from experiments.jobs.pool import Job, ProcessPool, ThreadPool
from experiments.jobs.progress import Overview, StageProgress, reporting
from strategies.progress import Pace
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, RunError
from tapfl.progress import shown_on, stage, track


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPool]:
    with closing(ProcessPool(1)) as pool:
        yield pool


@pytest.fixture(params=["processes", "threads"])
def pool(request: pytest.FixtureRequest, processes: ProcessPool) -> Iterator[ThreadPool]:
    if request.param == "processes":
        yield processes
    else:
        with closing(ThreadPool(1)) as threads:
            yield threads


def test_a_job_s_events_come_before_its_result(pool: ThreadPool) -> None:
    heard: list[int] = []
    assert pool.submit(Job(trivial_jobs.doubled, (3,)), heard.append).result(60) == 6
    assert heard == [0, 1, 2]


def test_an_exception_of_a_job_is_one_line_and_its_log_has_the_rest(pool: ThreadPool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget = 1\.7"):
        pool.submit(Job(trivial_jobs.refused, (), tmp_path / "a" / "refused.log")).result(60)
    with pytest.raises(RunError, match="LookupError: not there"):
        pool.submit(Job(trivial_jobs.broken, (), tmp_path / "broken.log")).result(60)
    with pytest.raises(MachineError, match=r"^/data/state: No space left on device$"):
        pool.submit(Job(trivial_jobs.on_a_full_disk)).result(60)
    assert "budget = 1.7" in (tmp_path / "a" / "refused.log").read_text()
    assert "Traceback" in (tmp_path / "broken.log").read_text()


def test_a_process_executes_one_job_after_another_and_prints_to_its_log(processes: ProcessPool, tmp_path: Path) -> None:
    first, again = (processes.submit(Job(trivial_jobs.worker)).result(60) for _ in range(2))
    assert first == again != os.getpid()
    processes.submit(Job(trivial_jobs.doubled, (1,), tmp_path / "job.log")).result(60)
    assert (tmp_path / "job.log").read_text() == "doubling 1\n"


def test_a_worker_that_dies_is_replaced_a_limited_number_of_times(processes: ProcessPool, tmp_path: Path) -> None:
    before = processes.submit(Job(trivial_jobs.worker)).result(60)
    assert processes.submit(Job(trivial_jobs.dying, (tmp_path / "once", 1))).result(60) == 2
    assert processes.submit(Job(trivial_jobs.worker)).result(60) != before
    with pytest.raises(MachineError, match="3 workers died during this job"):
        processes.submit(Job(trivial_jobs.dying, (tmp_path / "always", 99))).result(60)
    assert (tmp_path / "always").read_text() == "xxx"


def test_closing_ends_running_and_waiting_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "GRACE", 60.0)  # ended, not killed
    before = threading.enumerate()
    workers = ProcessPool(1)
    at_work, waiting = (workers.submit(Job(trivial_jobs.with_a_child, (tmp_path / name,))) for name in "ab")
    until((tmp_path / "a").exists)
    workers.close()
    with pytest.raises(RunError, match="the pool was closed"):
        at_work.result(1)
    assert waiting.cancelled() and not (tmp_path / "b").exists()
    assert not {*threading.enumerate()} - {*before}


@pytest.fixture
def command(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join(part for part in sys.path if part)
    arguments = [sys.executable, trivial_jobs.__file__, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": path}
    started = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    yield started
    with suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_command(number: int, command: subprocess.Popen[str], tmp_path: Path) -> None:
    """However it ends, neither a worker nor a process that a worker started remains."""
    until(lambda: len(list(tmp_path.glob("?"))) == 2)
    assert len(running(command.pid)) >= 5  # the command, its two workers, and their children
    if number == signal.SIGINT:
        os.killpg(command.pid, number)  # as Ctrl-C does it
    else:
        command.send_signal(number)
    _, printed = command.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert command.returncode == -signal.SIGKILL
    else:
        assert command.returncode == 130 and printed == "tapfl: interrupted; continue with: the same command\n"
    until(lambda: not running(command.pid), 30)


@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupted_run_names_the_command_that_works(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my run"

    def interrupted(*_: object) -> None:
        if begun:
            folder.mkdir()
            (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.jobs.federation.engine_of", interrupted)
    monkeypatch.setattr("experiments.preflight.resolve_run", lambda *_: RunConfig(out=str(folder)))
    monkeypatch.setattr(os, "_exit", sys.exit)
    done = CliRunner().invoke(cli.app, ["run", "--engine", "inprocess"])
    go_on = f"tapfl run --resume '{folder}'" if begun else "the same command"
    assert done.exit_code == 130 and done.stderr.endswith(f"tapfl: interrupted; continue with: {go_on}\n")


# -- progress -------------------------------------------------------------------------------------------------------


def test_a_job_reports_the_share_of_its_stage_including_nested_stages() -> None:
    now = 0.0
    told: list[StageProgress] = []
    with shown_on(reporting(told.append, lambda: now)), stage("rounds") as advance:
        advance(0, 4)
        for _ in track(range(2), "devices"):
            now += 1.0
        now += 1.0
        advance(1, 4)
        now += 0.01
        advance(2, 4)  # too soon for another report
    assert [(each.share, each.text) for each in told] == [
        (0.0, "rounds"),
        (0.0, "rounds 0/4"),
        (0.125, "rounds 0/4"),
        (0.25, "rounds 0/4"),
        (0.25, "rounds 1/4"),
    ]


class Simulated:
    """A sweep with a simulated clock."""

    def __init__(self, runs: int, jobs: int) -> None:
        self.now, self.shown = 0.0, list[tuple[float, float | None, str]]()
        self.pace = Pace("runs", lambda: self.now)
        self.overview = Overview(self.pace.advance, runs, jobs=jobs, clock=lambda: self.now)
        self.jobs, self.runs = jobs, runs

    def carry_out(self, events: Callable[[int], list[tuple[float, StageProgress]]]) -> None:
        """Simulates runs; each is a list of events with the seconds before them, and the last event is its end."""
        waiting, flying = list(range(self.runs)), dict[int, list[tuple[float, StageProgress]]]()
        while waiting or flying:
            while waiting and len(flying) < self.jobs:
                number = waiting.pop(0)
                flying[number] = [(self.now + seconds, event) for seconds, event in events(number)]
            number = min(flying, key=lambda each: flying[each][0][0])
            self.now, event = flying[number].pop(0)
            if flying[number]:
                self.overview.listen(f"run {number}")(event)
            else:
                self.overview.end(f"run {number}")
                del flying[number]
            self.shown.append((self.now, self.pace.left, self.pace.words()))


def run_of(before: float, rounds: float, count: int = 10, begun: int = 0) -> list[tuple[float, StageProgress]]:
    """Returns the events of a federation: eight stages, its rounds, evaluation."""
    found = [(before * i / 8, StageProgress(f"stage {i}", 0.0, f"stage {i}")) for i in range(8)]
    for i in range(begun, count + 1):
        at = before + rounds * (i - begun) / (count - begun)
        found.append((at, StageProgress("rounds", i / count, f"rounds {i}/{count}")))
    end = before + rounds
    return [*found, (end, StageProgress("evaluation", 0.0, "evaluation")), (end * 1.02, StageProgress("end", 1, ""))]


@pytest.mark.parametrize(
    ("runs", "jobs", "events"),
    {
        "one long run": (1, 1, lambda number: run_of(100, 400)),
        "one, mostly round zero": (1, 1, lambda number: run_of(300, 200)),
        "hardly any round zero": (1, 1, lambda number: run_of(5, 400)),
        "three, one at a time": (3, 1, lambda number: run_of(100, 400)),
        "three, at once": (3, 3, lambda number: run_of(100, 400)),
        "nine, two at a time": (9, 2, lambda number: run_of(60, 100)),
        "the first makes round zero": (9, 1, lambda number: run_of(60 if number == 0 else 2, 100)),
        "methods of different speed": (12, 2, lambda number: run_of(20, 100 * (1 + number % 3))),
        "runs that go on": (2, 1, lambda number: run_of(5, 300, begun=4)),
    }.values(),
)
def test_the_time_left_is_within_a_factor_of_two_after_a_quarter_of_the_work(
    runs: int, jobs: int, events: Callable[[int], list[tuple[float, StageProgress]]]
) -> None:
    sweep = Simulated(runs, jobs)
    sweep.carry_out(events)
    end = sweep.now
    later = [(at, left) for at, left, _ in sweep.shown if 0.25 * end <= at <= 0.9 * end]
    assert later
    for at, left in later:
        assert left is not None and 0.5 <= left / (end - at) <= 2, (at, left, end - at)


def test_the_runs_in_flight_are_shown() -> None:
    sweep = Simulated(3, 2)
    sweep.carry_out(lambda number: run_of(10, 90))
    assert "runs: 1.1/3 run 0: rounds 5/10; run 1: rounds 5/10 (0:01:40 left)" in [words for _, _, words in sweep.shown]
    assert sweep.shown[-1][2] == "runs: 3/3"
