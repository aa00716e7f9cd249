"""Processes of a deployment: all of them are ended, and a node's Python cannot open files of the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.deploy.network import Node, guarded
from experiments.deploy.processes import Processes, processes
from tapfl.errors import RunError

# a process that obeys SIGTERM, a child in its own session, and a grandchild that ignores SIGTERM
FAMILY = "setsid sh -c 'trap \"\" TERM; echo deaf; while :; do sleep 0.1; done' & echo here; exec sleep 300"


def wait_for(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def start_family(running: Processes, folder: Path) -> subprocess.Popen[bytes]:
    process = running.start(["/bin/sh", "-c", FAMILY], {"PATH": os.defpath}, folder)
    wait_for(lambda: {"here", "deaf"} <= set(running.output(process).split()))
    return process


def test_all_end_with_the_block_even_if_it_fails_and_they_ignore_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.deploy.processes.PATIENCE", 0.5)
    running = Processes(str(tmp_path))

    def fail() -> None:
        with processes(running.mark) as block:
            start_family(block, tmp_path)
            wait_for(lambda: len(running.left()) >= 2)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert not running.left()


def test_others_are_left_alone(tmp_path: Path) -> None:
    other = Processes(f"{tmp_path}-other")
    try:
        process = other.start(["sleep", "300"], {"PATH": os.defpath}, tmp_path)
        with processes(str(tmp_path)) as running:
            running.start(["sleep", "300"], {"PATH": os.defpath}, tmp_path)
        assert process.poll() is None
        wait_for(lambda: other.left() == [process.pid])
    finally:
        other.end_all()
    assert not other.left()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_them_too(tmp_path: Path, number: int, code: int) -> None:
    program = (
        "import sys, os, time, signal; from pathlib import Path\n"
        "from experiments.deploy.processes import processes\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with processes(sys.argv[1]) as running:\n"
        "    running.start(['sleep', '300'], {'PATH': os.defpath}, Path(sys.argv[1]))\n"
        "    print('started', flush=True); time.sleep(300)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    wait_for(Processes(str(tmp_path)).left)  # visible only after the process has executed its program
    process.send_signal(number)
    assert process.wait(30) in (code, -number)
    assert not Processes(str(tmp_path)).left()


def test_a_process_that_ends_by_itself_is_reported_with_its_last_output(tmp_path: Path) -> None:
    with processes(str(tmp_path)) as running:
        short = running.start(["sh", "-c", "echo no port; exit 7"], {"PATH": os.defpath}, tmp_path)
        long = running.start(["sleep", "300"], {"PATH": os.defpath}, tmp_path)
        assert running.wait(short, 20) == 7
        with pytest.raises(RunError, match=r"(?s)sh ended with 7:.*no port"):
            running.require_alive()
        with pytest.raises(RunError, match="sh ended with 7"):
            running.wait(long, 20)
        assert "no port" in running.end(short).read_text()
        assert running.wait(long, 0.3) is None


def test_a_nodes_python_is_refused_the_servers_files_and_no_others(tmp_path: Path) -> None:
    server, node = tmp_path / "server", tmp_path / "node"
    for folder in (server, node, tmp_path / "server-like"):
        folder.mkdir()
        (folder / "file").write_text("x")
    guard = guarded(node / "guard", server)
    within = Node(node, {}, guard)
    assert within.is_refused(server / "file")
    assert within.is_refused(node / ".." / "server" / "file")
    assert not within.is_refused(node / "file")
    assert not within.is_refused(tmp_path / "server-like" / "file")
    assert not Node(node, {}, {}).is_refused(server / "file")
    for action in ("os.listdir(p)", "os.mkdir(p + '/new')", "os.rename(p + '/file', 'mine')", "os.link(p, 'mine')"):
        command = [sys.executable, "-c", f"import os, sys; p = sys.argv[1]; {action}", str(server)]
        done = subprocess.run(command, env=within.environment, cwd=node, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "is not this node's" in done.stderr, action
    assert (server / "file").read_text() == "x" and not (server / "new").exists()
