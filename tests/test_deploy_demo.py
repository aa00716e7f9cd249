"""`tapfl deploy-demo` from end to end, with real processes, TLS and keys; and each of its checks can fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.deploy.demo import OWN_IMAGES, PROFILES, ROUNDS, outcome
from experiments.deploy.network import REFUSED, Node
from experiments.deploy.processes import Processes
from tapfl import load_pruned
from tapfl.store import read_tensors

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "experiments.cli", "deploy-demo", "--out"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("deploy") / "demo"
    return folder, subprocess.run([*COMMAND, str(folder)], capture_output=True, text=True, timeout=1700, check=False)


def nodes_of(folder: Path) -> list[Node]:
    """Returns the nodes of a finished demonstration; the server's folder may be a copy."""
    guards = [{"PYTHONPATH": str(folder / f"node-{i}" / "guard"), REFUSED: str(folder / "server")} for i in range(2)]
    return [Node(folder / f"node-{i}", PROFILES[i], guard) for i, guard in enumerate(guards)]


def test_all_checks_pass(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, run = done
    assert run.returncode == 0, run.stdout + run.stderr
    said = run.stdout.splitlines()
    assert not [line for line in said if line.startswith("FAIL")]
    assert len([line for line in said if line.startswith("ok  ")]) == 17
    for promise in ("a node with an unregistered key is refused", "a node with another authority is refused"):
        assert any(promise in line for line in said)
    assert not Processes(str(folder)).left()


def test_the_folders_confirm_the_checks(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = done
    run = folder / "server" / "run"
    records = json.loads((run / "summary.json").read_text())["devices"]
    assert [record["profile"]["rank"] for record in records] == [profile["rank"] for profile in PROFILES]
    assert records[1]["train_samples"] + records[1]["test_samples"] == OWN_IMAGES and records[1]["classes"] == 3
    assert not (run / "devices").exists()
    for i, record in enumerate(records):
        pruned = folder / f"node-{i}" / "storage" / "pruned"
        sent = sum(tensor.nbytes for tensor in read_tensors(pruned / "model.safetensors").values())
        assert sent < record["bytes_down"]["weights"] < sent + 20_000  # tensors, and their names
        assert sum(p.numel() for p in load_pruned(pruned).parameters()) == record["params"]
    private = [path for path in folder.rglob("*") if path.name.endswith((".key", ".crt", ".pub"))]
    assert len(private) >= 9 and all(path.stat().st_mode & 0o077 == 0 for path in private)


def no_weights(folder: Path) -> None:
    file = folder / "server" / "run" / "summary.json"
    summary = json.loads(file.read_text())
    del summary["devices"][1]["bytes_down"]["weights"]
    file.write_text(json.dumps(summary))


def a_failure(folder: Path) -> None:
    file = folder / "server" / "run" / "summary.json"
    summary = json.loads(file.read_text())
    summary["devices"][0]["failures"] = 1
    file.write_text(json.dumps(summary))


def a_device_on_the_server(folder: Path) -> None:
    (folder / "server" / "run" / "devices" / "00").mkdir(parents=True)


def another_backbone(folder: Path) -> None:
    (file,) = (folder / "node-0" / "cache" / "backbones").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")


def no_personal_adapter(folder: Path) -> None:
    shutil.rmtree(folder / "node-1" / "storage" / "personal")


def no_guard(folder: Path) -> None:
    (folder / "node-1" / "guard" / "sitecustomize.py").unlink()


BROKEN: dict[Callable[[Path], None], str] = {
    no_weights: "node-1: received its pruned weights",
    a_failure: "all devices took part, and nothing failed",
    a_device_on_the_server: "the server has no device's folder",
    another_backbone: "node-0: received the backbone over the network",
    no_personal_adapter: "node-1: stores model, state and personal adapter",
    no_guard: "node-1: cannot open the server's files",
}


@pytest.mark.parametrize("damage", BROKEN)
def test_each_check_can_fail(
    damage: Callable[[Path], None], done: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(done[0], folder)
    assert all(check.kept for check in outcome(folder / "server", nodes_of(folder), ROUNDS))
    damage(folder)
    assert [c.promise for c in outcome(folder / "server", nodes_of(folder), ROUNDS) if not c.kept] == [BROKEN[damage]]


def test_an_exceeded_budget_is_detected(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    first, second = nodes_of(done[0])
    nodes = [first, replace(second, config={"budget": 0.3})]
    (broken,) = [check for check in outcome(done[0] / "server", nodes, ROUNDS) if not check.kept]
    assert broken.promise == "node-1: is within its budget"


def interrupt(process: subprocess.Popen[str], folder: Path) -> None:
    process.send_signal(signal.SIGINT)


def kill_a_node(process: subprocess.Popen[str], folder: Path) -> None:
    for pid in Processes(str(folder)).left():
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"flower-supernode" in command and b"node-1" in command:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("trouble", "code", "words"), [(interrupt, 130, ""), (kill_a_node, 1, "flower-supernode ended with -9")]
)
def test_after_a_failure_all_processes_end_and_it_is_reported(
    trouble: Callable[[subprocess.Popen[str], Path], None], code: int, words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    process = subprocess.Popen(
        [*COMMAND, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        end = time.monotonic() + 240
        for line in process.stdout:
            assert time.monotonic() < end
            if "submitted" in line:
                break
        time.sleep(5)
        trouble(process, folder)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert words in said and f"logs are in {folder}" in said
    assert not Processes(str(folder)).left()
