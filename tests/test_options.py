"""The options as Flower reads them and as the command line lists them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import cli
from experiments.preflight import absolute_paths, place_of_run
from tapfl.config import PATH_OPTIONS, RunConfig
from tapfl.errors import ConfigError
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


def test_text_that_no_file_can_contain_is_refused() -> None:
    """Python reads bytes that are invalid in the locale's encoding as lone surrogates."""
    with pytest.raises(ConfigError, match=r"out = 'd\\udcc3\\udca9': is not UTF-8; accepted: another name"):
        RunConfig.from_flat({"out": "d\udcc3\udca9"})
    assert RunConfig.from_flat({"out": "dé α 😀"}).out == "dé α 😀"


def test_results_are_shown_in_any_locale() -> None:
    """In the C locale a terminal has no α; it is escaped, and the command continues."""
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    program = "import sys; from experiments import cli; sys.argv = ['tapfl', 'options']; cli.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=ascii_only, check=True)
    assert b"\\u03b1" in done.stdout and done.stdout.isascii()


def test_a_name_of_digits_stays_text() -> None:
    assert RunConfig.from_flat({"data.source": 2024, "out": 7}).data.source == "2024"
    for value in (True, 2024.0):
        with pytest.raises(ConfigError, match=r"data\.source = "):
            RunConfig.from_flat({"data.source": value})


@pytest.mark.parametrize("off", ["False", "no", False])
def test_a_run_is_resumed_only_if_the_option_says_so(off: object) -> None:
    assert place_of_run({"resume": off, "out": "/runs/a"}, None, None) == (Path("/runs/a"), False)
    assert place_of_run({"resume": "yes", "out": "~/a"}, None, None) == (Path.home() / "a", True)
    assert place_of_run({"resume": off}, None, Path("a")) == (Path("a"), True)
    assert place_of_run({"out": "/runs/a"}, Path("b"), None) == (Path("b"), False)
    place, resumed = place_of_run({"train.rounds": 3}, None, None)
    assert place.parent == Path("runs") and not resumed


@pytest.mark.parametrize(
    ("options", "out", "resume", "said"),
    [
        ({"resume": True}, None, None, "resume = true: needs out"),
        ({"resume": "perhaps"}, None, None, "resume = 'perhaps': input should be a valid boolean"),
        ({"out": "/runs/b"}, None, Path("/runs/a"), "out = '/runs/b': a resumed run stays in .*/a; omit out"),
        ({}, Path("/runs/b"), Path("/runs/a"), "--out /runs/b: a resumed run stays in .*/a; omit --out"),
        ({"out": "~nobody-of-this-name/a"}, None, None, "out = '~nobody-of-this-name/a': there is no such home folder"),
    ],
)
def test_a_run_has_one_folder(options: dict[str, object], out: Path | None, resume: Path | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        place_of_run(options, out, resume)


@pytest.mark.parametrize("option", PATH_OPTIONS)
def test_a_path_in_the_home_of_an_unknown_user_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} = '~nobody-of-this-name/a': there is no such home folder"):
        absolute_paths(RunConfig.from_flat({"model.head": "rows", option: "~nobody-of-this-name/a"}))
