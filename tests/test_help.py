"""The output of `--help`."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from experiments import cli


def help_texts(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    """Yields every help text below a command, with its place."""
    yield name, command.help or ""
    for parameter in command.params:
        yield f"{name} {parameter.name}", getattr(parameter, "help", "") or ""
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from help_texts(child, f"{name} {child.name}")


TEXTS = dict(help_texts(typer.main.get_command(cli.app), "tapfl"))


def test_no_help_text_is_parsed_as_markup() -> None:
    """Rich reads [grid] as a style and drops it, so a literal bracket is written \\[."""
    assert len(TEXTS) > 100
    for where, text in TEXTS.items():
        assert Text.from_markup(text).plain == text.replace("\\[", "["), where


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["sweep"], ["[grid]", "[[run]]"]),
        (["search"], ["[search]", "[space]"]),
        (["compare"], ["[compare]"]),
        (["bench", "search"], ["[search]"]),
    ],
)
def test_tables_of_toml_are_shown_in_their_brackets(command: list[str], shown: list[str]) -> None:
    said = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "200"})
    assert said.exit_code == 0
    for table in shown:
        assert table in said.output


def test_every_parameter_has_a_help_text() -> None:
    """click 8.5 drops the texts of arguments that typer 0.20 passes."""
    without = {where for where, text in TEXTS.items() if not text}
    assert without == set()
