"""The records of a run: they round-trip bit by bit; lines that cannot be read are counted or named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.output import show_summary
from strategies import state as server_state
from strategies.exchange import Answers, Request
from strategies.fleet import account
from strategies.records import (
    METRICS,
    SUMMARY,
    CurvePoint,
    DeviceLine,
    DeviceRecord,
    FailureLine,
    RoundLine,
    Summary,
    TrafficLine,
    added,
    append_lines,
    read_metrics,
    read_summary,
    write_summary,
)
from strategies.state import FederationState, summarise
from tapfl.adapters.rules import ServerState
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, PlanError
from tapfl.profiles import DeviceProfile
from tapfl.wire import Hello, PruneReply

LINES = [
    TrafficLine(phase="round 1", round=1, device=3, down={"adapters": 7}, up={"hello": 1}, simulated_seconds=0.1 + 0.2),
    DeviceLine(round=1, device=3, global_accuracy=1 / 3, personal_accuracy=2 / 3, alpha=0.5),
    RoundLine(round=1, devices=0, simulated_seconds=1e-300, bytes_up=2**60, bytes_down=0),
    FailureLine(phase="round 1", device=3, reason="ü\u2028\n"),
]


def a_summary(**values: Any) -> Summary:
    record = DeviceRecord(
        device=0,
        profile=DeviceProfile(budget="0.5", rank=4),
        train_samples=9,
        params=5,
        macs_share=0.1,
        params_share=1 / 3,
    )
    given: dict[str, Any] = {
        **dict.fromkeys(("dense_accuracy", "pruned_accuracy", "global_accuracy", "personal_accuracy"), 1 / 3),
        **dict.fromkeys(("bytes_up", "bytes_down", "full_model_bytes", "failures"), 3),
        **{"personal_accuracy_worst_decile": 0.1, "adapter_bytes_up_per_round": 2.5, "epsilon": None},
        **{"simulated_seconds": 1.1, "time_to_accuracy": {"0.05": 0.1}, "bytes_to_accuracy": {"0.05": 3}},
        **{
            "curve": [CurvePoint(seconds=0.1, bytes=3, accuracy=1 / 3)],
            "seconds": {"rounds": 1.5},
            "devices": [record],
        },
    }
    return Summary(**{**given, **values})


def changed(folder: Path, **values: Any) -> None:
    write_summary(folder, a_summary())
    content = json.loads((folder / SUMMARY).read_text()) | values
    (folder / SUMMARY).write_text(json.dumps({name: value for name, value in content.items() if value != "gone"}))


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == read_metrics(tmp_path / "nowhere")
    for line in LINES[:2]:
        append_lines(tmp_path, line)
    half = read_metrics(tmp_path)
    for line in LINES[2:]:
        append_lines(tmp_path, line)
    rest = read_metrics(tmp_path, half.end)
    assert half.lines + rest.lines == read_metrics(tmp_path).lines == LINES
    assert rest.end == (tmp_path / METRICS).stat().st_size
    first, *others = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    assert first == {"kind": "header", "version": 1} and "next_loss" not in others[1] and len(others) == 4


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_every_bit(number: float) -> None:
    summary = a_summary(simulated_seconds=number)
    assert Summary.model_validate_json(json.dumps(summary.model_dump())) == summary


ROUND = '"round": true, "devices": 1, "simulated_seconds": 1, "bytes_up": 1, "bytes_down": 1'
ENDLESS = '"round": 1, "device": 1, "global_accuracy": Infinity, "personal_accuracy": 0, "alpha": 0'
DAMAGED = {
    "half a line": '{"kind": "rou',
    "no object": "[1]",
    "nested": "[" * 100_000,
    "no number": f'{{"kind": "round", {ROUND}}}',
    "without end": f'{{"kind": "device", {ENDLESS}}}',
    "too large": '{"kind": "failure", "phase": "x", "device": 1' + "0" * 400 + ', "reason": ""}',
    "no text": '{"kind": "failure", "phase": "\\ud800", "device": 1, "reason": ""}',
    "incomplete": '{"kind": "device", "round": 1}',
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_line_is_counted_and_an_unknown_kind_left_out(case: str, tmp_path: Path) -> None:
    append_lines(tmp_path, LINES[0])
    with (tmp_path / METRICS).open("a") as file:
        file.write(DAMAGED[case] + '\n{"kind": "of tomorrow"}\n')
    append_lines(tmp_path, LINES[1])
    found = read_metrics(tmp_path)
    assert (found.lines, found.damaged) == (LINES[:2], 1)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"devices": [{"device": 0}]}, r"devices\.0\.profile: Field required"),
        ({"devices": "x"}, "devices: Input should be a valid array"),
        ({"curve": "gone"}, "curve: Field required"),
        ({"seconds": 7}, "seconds: "),
        ({"bytes_up": -1}, "bytes_up: "),
        ({"simulated_seconds": float("inf")}, "simulated_seconds: "),
    ],
)
def test_an_incomplete_summary_is_refused(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    changed(tmp_path, **values)
    with pytest.raises(PlanError, match=rf"summary\.json: is not a complete summary of version 1 \({reason}"):
        read_summary(tmp_path)


def test_devices_of_a_summary_are_checked(tmp_path: Path) -> None:
    record = a_summary().devices[0].model_dump()
    for records, reason in (([record, record], "listed twice"), ([record | {"macs_share": 0.0}], "shares above 0")):
        changed(tmp_path, devices=records)
        with pytest.raises(PlanError, match=reason):
            read_summary(tmp_path)
    with pytest.raises(PlanError, match="cannot be read"):
        read_summary(tmp_path / "nowhere")


def test_a_file_without_version_is_read_and_another_version_is_refused(tmp_path: Path) -> None:
    changed(tmp_path, version="gone")
    assert read_summary(tmp_path) == a_summary()
    changed(tmp_path, version=2, curve="gone")
    with pytest.raises(ConfigError, match=r"summary\.json: has version 2; accepted: 1, or none$"):
        read_summary(tmp_path)
    (tmp_path / METRICS).write_text('{"kind": "header", "version": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: has version 2; accepted: 1, or none$"):
        read_metrics(tmp_path)


def test_sums_by_kind() -> None:
    assert added({"a": 1, "b": 2}, {"b": 3, "c": 4, "d": 0}) == {"a": 1, "b": 5, "c": 4}


def summed_up(*devices: DeviceRecord, **options: Any) -> Summary:
    curve = [CurvePoint(seconds=1.0, bytes=1, accuracy=0.5)]
    state = FederationState(4, ServerState({}, {}), {record.device: record for record in devices}, {}, curve)
    return summarise(state, RunConfig.from_flat({"train.rounds": 4, **options}), {}, dense_params=10)


def test_adapter_bytes_per_round_count_rounds_that_used_an_answer() -> None:
    """Of four rounds device 0 took part in all, 1 in two (and failed twice), 2 in none; 3 never got a model."""
    profile = DeviceProfile(budget="0.5", rank=4)
    about = {"profile": profile, "train_samples": 9, "params": 5, "macs_share": 0.5, "params_share": 0.5}
    devices = [
        DeviceRecord(device=0, bytes_up={"adapters": 400, "other": 7}, rounds=4, **about),
        DeviceRecord(device=1, bytes_up={"adapters": 600}, rounds=2, failures=2, **about),
        DeviceRecord(device=2, bytes_up={"other": 7}, failures=4, **about),
        DeviceRecord(device=3, profile=profile, train_samples=9, bytes_up={"adapters": 1}, rounds=1),
    ]
    assert summed_up(*devices).adapter_bytes_up_per_round == (100 + 300) / 2
    assert summed_up(devices[2]).adapter_bytes_up_per_round == 0.0
    assert summed_up(*devices).bytes_up == 407 + 600 + 7 + 1  # of all devices, also those without a model


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        (1.0, "differential privacy of the shared adapters: ε ≤ 7"),
        (1e-3, "differential privacy of the shared adapters: no guarantee"),  # of device 1; device 0 has one
    ],
)
def test_a_run_has_a_guarantee_only_if_every_device_has_one(
    noise: float, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {0: 0.0, 1: 7.0 if noise == 1 else math.inf}  # by number of rounds
    monkeypatch.setattr(server_state, "epsilon", lambda z, rounds, delta: known[rounds])
    about = {"profile": DeviceProfile(budget="0.5", rank=4), "train_samples": 9}
    model = {"params": 5, "macs_share": 0.5, "params_share": 0.5}
    devices = [DeviceRecord(device=i, rounds=i, **about, **model) for i in range(2)]
    summary = summed_up(*devices, **{"adapters.rule": "fedit", "privacy.dp-clip": 1.0, "privacy.dp-noise": noise})
    assert summary.epsilon == (7 if noise == 1 else None) and summary.devices[0].epsilon == 0
    show_summary(summary, {}, private=True)
    assert said in capsys.readouterr().out
    show_summary(summary, {}, private=False)
    assert "privacy" not in capsys.readouterr().out


def test_messages_between_two_rounds_count_to_the_earlier_one() -> None:
    """They have no round of their own; the bytes of the round's line include them."""
    record = DeviceRecord(device=0, profile=DeviceProfile(budget="0.5", rank=4), train_samples=9)
    request, reply = (
        Request(Hello("key"), PruneReply, PruneReply.check),
        PruneReply(params=1, macs=1, pruned_accuracy=0.5),
    )
    for round in (0, 4):
        state = FederationState(round, ServerState({}, {}), {0: record}, {})
        _, (line,) = account(state, "surgery", {0: request}, Answers(replies={0: reply}))
        assert isinstance(line, TrafficLine) and line.round == round


def test_a_run_names_devices_whose_mixture_has_one_component(capsys: pytest.CaptureFixture[str]) -> None:
    profile = DeviceProfile(budget="0.5", rank=4)
    kinds = ((1, 3), (1, 1), (4, 3), (0, 3), (1, 2))  # components, classes
    devices = [
        DeviceRecord(device=i, profile=profile, train_samples=9, components=k, classes=classes)
        for i, (k, classes) in enumerate(kinds)
    ]
    show_summary(a_summary(devices=devices), {"alone": "+0.1"})
    said = capsys.readouterr().out
    assert "one component, so that classes are not separated: 0, 4\n" in said and "personal - alone: +0.1\n" in said
