"""Pruning one backbone from the command line, and a look at the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_inprocess_run import TINY
from typer.testing import CliRunner

from experiments import cli
from tapfl import load_pruned
from tapfl.errors import BudgetError, ConfigError, PlanError, TapflError


def tapfl(*arguments: str) -> str:
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False).stdout


def prune(tmp_path: Path, *arguments: str, budget: str = "0.5") -> str:
    options = [
        f"model.args={TINY}",
        "model.epochs=2",
        "metric.size=64",
        "pruning.align=1",
        f"cache={tmp_path / 'cache'}",
    ]
    sets = [part for option in options for part in ("--set", option)]
    return tapfl("prune", "--budget", budget, "--out", str(tmp_path / "small"), *sets, *arguments)


@pytest.mark.parametrize("how", [("tap", "none"), ("lowrank-heads", "sequential"), ("upop-oneshot", "one-pass")])
def test_a_backbone_is_pruned_saved_and_shown(tmp_path: Path, how: tuple[str, str]) -> None:
    criterion, compensation = how
    said = json.loads(prune(tmp_path, "--criterion", criterion, "--compensation", compensation, "--json"))
    assert 0.4975 <= said["macs"] / said["macs_dense"] <= 0.5
    assert said["provenance"]["criterion"] == criterion and said["provenance"]["compensation"] == compensation
    assert sum(parameter.numel() for parameter in load_pruned(tmp_path / "small").parameters()) == said["params"]
    shown = tapfl("inspect", str(tmp_path / "small"), "--picture", str(tmp_path / "widths.png"))
    assert "blocks.1.mlp" in shown and "ms an image" in shown
    assert (tmp_path / "widths.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_may_have_several_limits_and_is_told(tmp_path: Path) -> None:
    said = json.loads(prune(tmp_path, "--set", "pruning.unit-shape=both", "--json", budget="macs<=60%, params<=0.5"))
    assert said["provenance"]["budget"] == "macs<=0.6,params<=0.5"
    assert said["macs"] <= 0.6 * said["macs_dense"]
    assert 0.4975 * said["params_dense"] <= said["params"] <= 0.5 * said["params_dense"]


def test_a_budget_in_milliseconds_is_measured_here(tmp_path: Path) -> None:
    said = json.loads(prune(tmp_path, "--criterion", "magnitude", "--json", budget="latency<=1000ms"))
    assert said["macs"] == said["macs_dense"]


@pytest.mark.parametrize(
    ("arguments", "budget", "error"),
    [
        (("--criterion", "best"), "0.5", ConfigError),
        (("--compensation", "full"), "0.5", ConfigError),
        ((), "1.5", ConfigError),
        ((), "params<=0.5,flops<=0.5", ConfigError),
        ((), "macs<=0.5,params<=100", BudgetError),
        ((), "0.01", BudgetError),
        (("--set", "metric.size=6400"), "0.5", TapflError),
    ],
)
def test_what_is_refused_leaves_no_folder(
    tmp_path: Path, arguments: tuple[str, ...], budget: str, error: type[TapflError]
) -> None:
    with pytest.raises(error):
        prune(tmp_path, *arguments, budget=budget)
    assert not (tmp_path / "small").exists()


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan.json: cannot be read"):
        tapfl("inspect", str(tmp_path))
