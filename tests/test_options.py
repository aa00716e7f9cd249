"""The options as Flower knows them, and as the command line lists them."""

from __future__ import annotations

import tomllib
from pathlib import Path

from typer.testing import CliRunner

from experiments import cli
from tapfl.config import RunConfig
from tapfl.options import flatten

ROOT = Path(__file__).parent.parent


def test_pyproject_tells_flower_the_same_defaults() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert flatten(project["tool"]["flwr"]["app"]["config"]) == RunConfig().flat()


def test_every_option_is_listed_with_its_default() -> None:
    listed = CliRunner().invoke(cli.app, ["options"])
    assert listed.exit_code == 0
    for name in RunConfig().flat():
        assert name in listed.output
