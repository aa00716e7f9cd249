"""Tables and error lines on a terminal, and groups of options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from experiments import cli
from experiments.command_line import of_the_system, option_groups
from experiments.output import count, show_line, show_rows, size


@pytest.mark.parametrize(("columns", "lines"), [(3, 3), (30, 3), (3, 30), (30, 30)])
def test_tables_are_never_truncated(columns: int, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{f"measure {i}": f"{row}.{i:03d} ± 0.01" for i in range(columns)} for row in range(lines)]
    show_rows(rows, as_json=False)
    shown = capsys.readouterr().out
    for row in rows:
        assert all(name in shown and value in shown for name, value in row.items())


def test_without_rows_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show_rows([], as_json=False)
    assert capsys.readouterr().out == ""


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are no markup, and names between colons are no emoji."""
    text = "/data/[/old]/[bold]:dog:/tapfl[tensorboard]"
    show_line(text)
    show_rows([{text: text}], as_json=False)
    assert capsys.readouterr().out.count(text) == 3


def test_the_list_of_options_is_complete() -> None:
    listed = CliRunner().invoke(cli.app, ["options"]).stdout
    assert "tapfl[tensorboard]" in listed and "…" not in listed


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.5, "0.5"), (999, "999"), (1000, "1k"), (999_499, "999k"), (999_600, "1M"), (999.7e9, "1T"), (2.5e12, "2.5T")],
)
def test_the_unit_of_a_count_fits_the_rounded_number(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(10, "0.0 kB"), (999_940, "999.9 kB"), (999_960, "1.00 MB"), (999_996_000, "1.00 GB")]
)
def test_the_unit_of_a_size_fits_the_rounded_number(number: float, text: str) -> None:
    assert size(number) == text


def test_a_system_error_is_one_readable_line() -> None:
    assert of_the_system(OSError(28, "No space left on device", "/data/x")) == "/data/x: No space left on device"
    assert of_the_system(OSError(28, "No space left on device")) == "No space left on device"
    long = of_the_system(OSError(36, "File name too long", "/data/" + "x" * 5000))
    assert len(long) < 200 and long.startswith("/data/xxx") and long.endswith("xxx: File name too long")


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(min=1, help="metres")]
    deep_end: Annotated[float, typer.Option()] = 1.5


def test_a_group_of_options_is_a_dataclass_parameter() -> None:
    app, seen = typer.Typer(), []

    @app.command()
    @option_groups
    def fill(*, name: Annotated[str, typer.Argument()], size: Size, slow: bool = False) -> None:
        seen.append((name, size, slow))

    assert CliRunner().invoke(app, ["pool", "--width", "3", "--deep-end", "2", "--slow"]).exit_code == 0
    assert CliRunner().invoke(app, ["pool", "--width", "4"]).exit_code == 0
    assert seen == [("pool", Size(3, 2.0), True), ("pool", Size(4), False)]
    for wrong in (["pool"], ["pool", "--width", "0"], ["pool", "--width", "wide"]):
        assert CliRunner().invoke(app, wrong).exit_code == 2
    assert [each.name for each in typer.main.get_command(app).params[:4]] == ["name", "width", "deep_end", "slow"]


def test_two_options_with_the_same_name_are_refused() -> None:
    with pytest.raises(ValueError, match="duplicate parameter name: 'width'"):

        @option_groups
        def fill(*, width: int = 1, size: Size) -> None: ...
