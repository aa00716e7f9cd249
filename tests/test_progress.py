"""Progress of long work: which stages are reported, and how they look on a terminal and in a log."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import Tiny
from test_inprocess_run import tapfl

from experiments.jobs.pool import own_log
from strategies import progress as module
from strategies.progress import Lines, Pace, clock_time, shown
from tapfl.config import PruningOptions, SummaryOptions
from tapfl.progress import Advance, is_shown, shown_on, stage, track
from tapfl.pruning.criteria.registry import BUILT_IN, criterion_of
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.summary.mixture import fit_mixture

Told = list[tuple[str, int, int, str]]


@contextmanager
def listening() -> Iterator[Told]:
    """Collects (names of the open stages, done, total, note)."""
    told: Told = []
    opened: list[str] = []

    @contextmanager
    def screen(name: str) -> Iterator[Advance]:
        opened.append(name)
        path = " > ".join(opened)
        try:
            yield lambda done, total, note="": told.append((path, done, total, note))
        finally:
            opened.remove(name)

    with shown_on(screen):
        yield told


# -- what is told ---------------------------------------------------------------------------------------------------


def test_a_loop_reports_each_step_and_yields_the_items() -> None:
    with listening() as told, stage("outer") as advance:
        advance(0, 2)
        assert list(track("ab", "inner")) == ["a", "b"]
        assert list(track(iter("c"), "unsized", 1)) == ["c"]
        advance(1, 2, "so far")
    assert told == [
        ("outer", 0, 2, ""),
        ("outer > inner", 0, 2, ""),
        ("outer > inner", 1, 2, ""),
        ("outer > inner", 2, 2, ""),
        ("outer > unsized", 0, 1, ""),
        ("outer > unsized", 1, 1, ""),
        ("outer", 1, 2, "so far"),
    ]


def test_a_loop_needs_no_screen_and_closes_its_stage_when_left() -> None:
    assert list(track([1, 2], "alone")) == [1, 2] and not is_shown()
    with listening() as told:
        for _ in track([1, 2], "left"):
            break
        list(track([1], "next"))
    assert told[-1][:1] == ("next",)


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"magnitude", "random"}))
def test_every_criterion_that_uses_images_reports_progress(name: str, vit: Tiny) -> None:
    task = pruning_task(vit.model, vit.inputs, 0.6, PruningOptions(criterion=name, align=1), 2)
    with listening() as told:
        criterion_of(name)(task)
    finished = {path for path, done, total, _ in told if done == total > 0}
    if name == "tap":
        assert "layer importance" in finished
    own = {
        "tap": "scores",
        "wanda": "scores",
        "lowrank-heads": "scores",
        "tap+": "elimination",
        "upop": "search",
        "savit": "interactions",
        "updp": "search",
    }
    assert any(own.get(name, "") in path for path in finished), told


def test_the_steps_after_the_criterion_are_reported_as_well(vit: Tiny) -> None:
    options = PruningOptions(
        criterion="tap+", align=1, recovery="distill", recovery_steps=3, recovery_batch=2, labels="pseudo"
    )
    with listening() as told:
        task = pruning_task(vit.model, vit.inputs, "latency<=100ms", options, 2)
        prune_model(task, vit.spec)
    stages = [path for path, done, total, _ in told if done == total]
    for name in ("canonical basis", "latency", "sensitivity", "compensation", "teacher", "recovery"):
        assert name in stages, name
    with listening() as told:
        fit_mixture(np.random.default_rng(0).normal(size=(60, 3)), SummaryOptions(max_components=3))
    assert told[-1] == ("mixture", 3, 3, "")


# -- how long it will take ------------------------------------------------------------------------------------------


def test_the_time_left_is_estimated_from_steps_of_this_process() -> None:
    now = 100.0
    pace = Pace("rounds", clock=lambda: now)
    assert pace.left is None and pace.words() == "rounds (0:00:00 so far)"
    pace.advance(5, 10)  # a resumed run
    assert pace.left is None
    now = 120.0
    pace.advance(6, 10)
    now = 140.0
    pace.advance(7, 10, "personal accuracy 0.9")
    assert pace.left == 60.0
    now = 150.0
    assert pace.left == 50.0
    assert pace.words() == "rounds: 7/10 personal accuracy 0.9 (0:00:50 left)"
    now = 1000.0
    assert pace.left == 0.0
    pace.advance(10, 10)
    assert pace.left is None and pace.words() == "rounds: 10/10"
    assert clock_time(3723.4) == "1:02:03"


def test_time_left_holds_for_steps_of_minutes() -> None:
    now = 0.0
    pace = Pace("cells", clock=lambda: now)
    for done in range(5):
        now = 300.0 * done
        pace.advance(done, 10)
    assert pace.left == 6 * 300


# -- in a log -------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "flwr")
    return lambda: [re.sub(r" \([\d:]+ (left|so far)\)", r" (\1)", record.getMessage()) for record in caplog.records]


def test_a_log_has_a_line_for_every_fifth_of_a_stage_and_none_for_nested_ones(
    logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with shown():
        list(track(range(10), "done at once"))
        monkeypatch.setattr(module, "GAP", 0.0)
        for i in track(range(10), "devices"):
            for _ in track(range(10), "inner"):
                pass
            assert i < 10
    assert logged() == [
        "done at once: 10/10",
        "devices: 2/10 (left)",
        "devices: 4/10 (left)",
        "devices: 6/10 (left)",
        "devices: 8/10 (left)",
        "devices: 10/10",
    ]


def wait_until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_log_is_not_silent_during_a_long_step(
    logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE", (0.5, 0.5))
    with shown(), stage("smaller models") as advance:
        advance(3, 10, "device 2")
        with stage("export"):
            wait_until(logged)
    assert set(logged()) == {"smaller models: 3/10 device 2; export (so far)"}
    assert not [thread for thread in threading.enumerate() if "_break_silence" in thread.name]


def test_lines_of_runs_that_share_a_process_go_to_their_own_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE", (0.5, 0.5))

    def run(name: str) -> None:
        with own_log(tmp_path / name), shown(), stage(f"rounds of {name}"):
            wait_until((tmp_path / name).read_text)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, other in (("a", "b"), ("b", "a")):
        said = (tmp_path / name).read_text()
        assert f"rounds of {name}" in said and f"rounds of {other}" not in said


def test_silence_grows_with_the_work() -> None:
    least, most = module.SILENCE
    assert least == 10 and most == 60 and module.PATIENCE * 600 < most < module.PATIENCE * 3600


def test_a_run_has_lines_for_each_of_its_stages(logged: Callable[[], list[str]], tmp_path: Path) -> None:
    done = tapfl("--out", str(tmp_path / "run"), cache=tmp_path / "cache")
    assert done.exit_code == 0, done.output
    said = "\n".join(logged())
    for name in ("nodes", "hello", "summaries", "smaller models", "surgery", "rounds", "evaluation"):
        steps = {"rounds": "2/2"}.get(name, "4/4")
        assert f"{name}: {steps}" in said, name
    assert re.search(r"dense backbone: \d+/\d+ epoch 2 of 2, loss \d\.\d+", said)
    assert re.search(r"rounds: 2/2 personal accuracy 0\.\d+ after round 1", said)


# -- on a terminal --------------------------------------------------------------------------------------------------

WORK = """
import logging, time
from flwr.common.logger import log
from strategies import progress
from tapfl.progress import stage, track
progress.BRIEF = 0.1
with progress.shown(), stage("rounds") as advance:
    advance(0, 4)
    for t in range(4):
        for _ in track(range(4), "devices"):
            time.sleep(0.1)
        log(logging.INFO, "a line of the log %d", t)
        print("a line on stdout", t)
        advance(t + 1, 4, f"accuracy 0.{t}")
with progress.shown():
    for _ in track(range(2), "evaluation"):
        pass
print("done")
"""


def on_a_terminal(*command: str, columns: int = 110) -> str:
    """Runs a command on a pseudo terminal and returns all its output, including escape sequences."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "PYTHONPATH": str(Path.cwd()), "COLUMNS": str(columns)}
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    came = b""
    try:
        while part := os.read(terminal, 65536):
            came += part
    except OSError:  # Linux reports a closed other end like this
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, came.decode()
    return came.decode()


def as_seen(came: str) -> list[str]:
    """Returns the lines on an unlimited terminal after this output."""
    rows, row, column = [""], 0, 0
    for token in re.finditer(r"\x1b\[([?\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+", came):
        text, count, code = token[0], token[1], token[2]
        if code == "A":
            row -= int(count or 1)
        elif code == "K":
            rows[row] = "" if count == "2" else rows[row][:column]
        elif text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif not code:
            rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
            column += len(text)
    return [text.rstrip() for text in rows]


def test_a_terminal_shows_bars_with_the_time_left_below_the_lines_of_the_log() -> None:
    came = on_a_terminal(sys.executable, "-c", WORK)
    frames = [as_seen(came[: end.start()]) for end in re.finditer("\r", came)]
    two = [frame for frame in frames if any("rounds" in row and "2/4" in row and "left" in row for row in frame)]
    assert two, "no time left after two of four rounds"
    assert re.search(r"rounds +[━╺╸]+ +2/4 0:00:0\d 0:00:0\d left accuracy 0\.1", "\n".join(two[0]))
    assert any(re.match(r"devices +[━╺╸]+ +\d/4 ", row) for frame in frames for row in frame)
    last = as_seen(came)
    assert [row for row in last if "line" in row] == [
        text for t in range(4) for text in (f"INFO :      a line of the log {t}", f"a line on stdout {t}")
    ]
    bars = [row.split("━")[0].strip() for row in last if "━" in row]
    assert bars == ["rounds", "evaluation"]  # nested bars are gone, and finished ones were not drawn twice
    assert last[-2:] == ["done", ""] and came.count("\x1b[?25l") == came.count("\x1b[?25h") == 2


def test_a_narrow_terminal_cuts_words_and_not_the_bars() -> None:
    rows = as_seen(on_a_terminal(sys.executable, "-c", WORK.replace("accuracy 0.", "a long story " * 9), columns=80))
    assert all(len(row) <= 80 for row in rows)
    assert [row.split("━")[0].strip() for row in rows if "━" in row] == ["rounds", "evaluation"]


def test_results_do_not_depend_on_the_screen(vit: Tiny) -> None:
    task = pruning_task(vit.model, vit.inputs, 0.6, PruningOptions(criterion="tap", align=1), 2)
    alone = criterion_of("tap")(task)
    with listening():
        watched = criterion_of("tap")(task)
    with Lines() as screen, shown_on(screen):
        in_a_log = criterion_of("tap")(task)
    for name, kept in alone.kept.items():
        assert torch.equal(kept, watched.kept[name]) and torch.equal(kept, in_a_log.kept[name])
