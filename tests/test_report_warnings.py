"""Warnings of the report: each appears when it should, and only then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_inprocess_run import tapfl

from experiments.report.reading import Run, read_run
from experiments.report.single import page_of
from experiments.report.warnings import warnings_of
from strategies.records import DeviceLine, Line, RoundLine


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "one"
    options = ["devices.count=2", "data.public-share=0.9", "train.rounds=1"]
    done = tapfl("--out", str(folder), cache=cache, options=options)
    assert done.exit_code == 0, done.output
    return read_run(folder)


def made(
    run: Run,
    *,
    held: tuple[tuple[bool, ...], ...] = ((True, True, False), (False, True, True)),
    accuracies: tuple[float, ...] = (0.5, 0.6, 0.7, 0.7),
    losses: tuple[float, ...] = (1.0, 0.5, 0.2),
    pruned: float = 0.4,
    shared: float = 0.6,
    alphas: tuple[float, float] = (0.5, 0.5),
    **options: Any,
) -> Run:
    """Returns a run of two devices and three rounds that causes no warning unless the arguments do."""
    devices = [
        device.model_copy(
            update={
                "held_classes": list(held[i]),
                "pruned_accuracy": pruned,
                "global_accuracy": shared,
                "personal_accuracy": accuracies[-1],
                "alpha": alphas[i],
                "rounds": 3,
            }
        )
        for i, device in enumerate(run.devices[:2])
    ]
    lines: list[Line] = []
    for t, accuracy in enumerate(accuracies):
        loss = losses[t] if t < len(losses) else None
        both = {"global_accuracy": shared, "personal_accuracy": accuracy}
        lines += [DeviceLine(round=t, device=d.device, alpha=0.5, next_loss=loss, **both) for d in devices]
        lines.append(RoundLine(round=t, devices=2, simulated_seconds=0.0, bytes_up=0, bytes_down=0))
    config = run.config | {"train.rounds": 3} | {key.replace("__", "."): value for key, value in options.items()}
    return replace(run, devices=devices, lines=lines, config=config, rounds=3)


def test_a_normal_run_has_no_warning(run: Run) -> None:
    assert warnings_of(made(run)) == []
    assert "Warnings" not in [section.title for section in page_of(made(run)).sections]


APART = ((True, False, False), (False, True, True))


@pytest.mark.parametrize(
    ("change", "found", "advice"),
    [
        ({"held": APART}, "teaches the shared model that there are no classes but its own", "or train.label-prior"),
        ({"shared": 0.3}, "at an accuracy of 0.300, below the pruned models before training (0.400)", "learning-"),
        (
            {"accuracies": (0.5, 0.72, 0.7, 0.65)},
            "fallen from 0.720 after round 1 to 0.650 while the training loss went on falling",
            "fewer train.rounds",
        ),
        ({"losses": (1.0, 0.5, 1e-4)}, "The training loss of devices 0, 1 is below 0.001", "fewer train.epochs"),
        ({"alphas": (0.0, 0.004)}, "α is 0 on devices 0, 1: only the shared model is used there", "method=fedavg"),
        (
            {"alphas": (0.0, 0.0), "personalize__from-round": 4},
            "personalize.from-round is 4, and the run has 3 rounds",
            "a smaller personalize.from-round",
        ),
        ({"alphas": (0.5, 1.0)}, "α is 1 on device 1: only the personal model is used there", "method=local"),
    ],
    ids=["disjoint", "worse", "overfit", "by heart", "no own part", "never begins", "no shared part"],
)
def test_each_warning_says_what_was_found_and_what_can_be_tried(
    run: Run, change: dict[str, Any], found: str, advice: str
) -> None:
    (finding,) = warnings_of(made(run, **change))
    assert found in finding.found and advice in finding.advice


def test_the_page_begins_with_the_warnings(run: Run) -> None:
    warned = made(run, held=APART, alphas=(0.5, 1.0))
    first = page_of(warned).sections[0]
    assert first.title == "Warnings" and first.table is not None
    assert first.table.rows == [list(finding) for finding in warnings_of(warned)] and len(first.table.rows) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"held": APART, "adapters__head": "personal"},
        {"held": APART, "train__label-prior": "counts"},
        {"held": APART, "personalize__method": "local"},
        {"shared": 0.3, "personalize__method": "local"},
        {"shared": 0.395},
        {"accuracies": (0.5, 0.72, 0.7, 0.65), "losses": (0.5, 0.6, 0.7)},
        {"accuracies": (0.5, 0.72, 0.7, 0.715)},
        {"alphas": (0.0, 1.0), "personalize__method": "ditto"},
        {"alphas": (0.5, 0.5), "personalize__from-round": 3},
        {"personalize__from-round": 4, "personalize__method": "fedavg"},
    ],
    ids=[
        "own heads",
        "known classes",
        "nothing shared",
        "no shared model",
        "within noise",
        "loss rises",
        "hardly falls",
        "no α",
        "begins",
        "no v",
    ],
)
def test_no_warning_if_a_condition_does_not_hold(run: Run, change: dict[str, Any]) -> None:
    assert warnings_of(made(run, **change)) == []


def test_a_run_without_a_device_or_a_round_has_no_warning(run: Run) -> None:
    assert warnings_of(replace(run, devices=[], lines=[])) == []
    fresh = made(run, shared=0.4)
    assert warnings_of(replace(fresh, lines=[], rounds=0)) == []
