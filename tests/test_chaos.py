"""Chaos: each round one device in five crashes, hangs or lies; the run finishes, reports it all and loses little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from faulty_apps import FAULTS, REASONS, chaos, fault_of
from test_flower_engine import left_running, simulate
from test_hostile_devices import federation


def failures_of(lines: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
    """Returns the reasons by (round, device)."""
    lost = [line for line in lines if line["kind"] == "failure"]
    return {(int(line["phase"].split()[-1]), line["device"]): line["reason"] for line in lost}


def expected(rounds: int, devices: int) -> dict[tuple[int, int], str]:
    found = {(t, i): fault_of(t, i, devices) for t in range(1, rounds + 1) for i in range(devices)}
    return {where: fault for where, fault in found.items() if fault is not None and fault in REASONS}


def check_accounts(lines: list[dict[str, Any]], summary: dict[str, Any], rounds: int, devices: int) -> None:
    """Every failure is in the metrics with its reason, and nothing else."""
    lost, wanted = failures_of(lines), expected(rounds, devices)
    assert lost.keys() == wanted.keys()
    assert {where: said for where, said in lost.items() if REASONS[wanted[where]] not in said} == {}
    assert summary["failures"] == len(wanted)
    answered = [line["devices"] for line in lines if line["kind"] == "round"]
    assert answered == [devices - sum(t == r for t, _ in wanted) for r in range(1, rounds + 1)] + [devices]
    for record in summary["devices"]:
        assert record["rounds"] == rounds - sum(i == record["device"] for _, i in wanted)


def test_chaos_in_one_process(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faulty_apps.os.kill", lambda *_: None)  # it is our own process
    options = {"train.rounds": 7, "faults.device-timeout": 2.0, "personalize.method": "fedavg"}
    folder, lines = federation(tmp_path / "run", cache, chaos, **options)
    assert {fault_of(t, i, 3) for t in range(1, 8) for i in range(3)} > set(FAULTS)
    check_accounts(lines, json.loads((folder / "summary.json").read_text()), 7, 3)


@pytest.mark.slow
def test_twenty_devices_ten_rounds_on_flower(tmp_path: Path) -> None:
    """The run finishes, every failure is recorded, and accuracy on 620 test images falls by at most two points."""
    options = {
        "devices.count": 20,
        "data.public-share": 0.5,
        "data.test-share": 0.7,
        "train.rounds": 10,
        "model.epochs": 20,
        "train.epochs": 2,
        "data.partition": "iid",
        "faults.device-timeout": 30,
    }
    results = {}
    for name, apps in (("calm", {}), ("chaos", {"client_app": "faulty_apps:chaos"})):
        done = simulate(tmp_path / name, tmp_path / "cache", workers=2, options=options, **apps)
        assert done.returncode == 0, done.stderr[-3000:]
        results[name] = json.loads((tmp_path / name / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "chaos" / "metrics.jsonl").read_text().splitlines()]
    check_accounts(lines, results["chaos"], 10, 20)
    assert results["calm"]["failures"] == 0
    for measure in ("personal_accuracy", "global_accuracy"):
        assert results["chaos"][measure] >= results["calm"][measure] - 0.02
    assert not left_running(str(tmp_path))
