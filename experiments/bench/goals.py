"""`tapfl bench all`: runs all measurements of a file, and compares every goal with the measured value.

A file lists commands and the goals for their rows. Each command runs in its own process, so that none starts with the
memory or the caches of another. Its rows are stored in a file, and a command whose file exists is not run again.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field, model_validator

from experiments.output import as_markdown, command, installed, named, show_written
from tapfl.errors import RunError
from tapfl.options import Section, read_toml_tables, validated
from tapfl.progress import stage
from tapfl.store import write_bytes

Rows = Sequence[Mapping[str, Any]]
# columns of the last row of each command: seconds of the whole command, and the versions with which it was measured
TOOK, VERSIONS = "took s", "versions"


class Goal(Section):
    """A bound on a number in one row."""

    what: str = Field(min_length=1, description="in words")
    where: dict[str, str] = Field({}, description="column → value of the row; empty: the first row that has the column")
    column: str = Field(description="column of the number; `took s`: the seconds of the whole command")
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bounded_once(self) -> Goal:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("needs exactly one of at-least or at-most")
        return self

    def judged(self, rows: Rows) -> dict[str, str]:
        """Returns the goal as a row: its description, the bound, the measured value, and whether it is met."""
        bound = f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"
        value = self.measured(rows)
        if value is None:
            return {"what": self.what, "goal": bound, "measured": "", "": "not measured"}
        missed = value < self.at_least if self.at_least is not None else value > (self.at_most or 0.0)
        return {"what": self.what, "goal": bound, "measured": f"{value:g}", "": "**missed**" if missed else "met"}

    def measured(self, rows: Rows) -> float | None:
        """Returns the first number in the cell; None if the cell has no number, or there is no such row."""
        found = (row for row in rows if self.column in row and self.where.items() <= row.items())
        number = re.match(r"-?\d+(\.\d+)?(e[+-]?\d+)?", str(next(found, {self.column: ""})[self.column]))
        return float(number[0]) if number else None


class Measurement(Section):
    """A command, and the goals for its rows."""

    command: str = Field(pattern=r"^tapfl \w", description="as it is typed, without --json")
    about: str = Field("", description="remark for the reader")
    table: bool = Field(True, description="whether the page shows its rows")
    goal: tuple[Goal, ...] = ()


class Measurements(Section):
    """The file."""

    measure: tuple[Measurement, ...] = Field(min_length=1)


def read_measurements(file: Path) -> Sequence[Measurement]:
    """Returns the measurements of a file. Raises ConfigError if it is not valid."""
    return validated(Measurements, read_toml_tables(file)).measure


def measure_all(
    config: Annotated[Path, typer.Option(help="TOML file with the commands and their goals")],
    out: Annotated[Path, typer.Option(help="folder of the rows and of bench.md; existing rows are not measured again")],
) -> list[dict[str, str]]:
    """Run all measurements of a file, and compare every goal with the measured value.

    All tables are in bench.md, which is written again after each command. If a command fails or the run is interrupted,
    the other rows are kept, and the same command continues.
    """
    measurements = read_measurements(config)
    made_by = command("bench", "all", "--config", str(config), "--out", "DIR")
    rows: dict[str, Rows] = {}
    failed = []
    with stage("measurements") as advance:
        for number, measurement in enumerate(measurements):
            advance(number, len(measurements), measurement.command)
            try:
                rows[measurement.command] = _rows(measurement.command, out)
            except RunError as error:
                failed.append(str(error))
            goals = [goal.judged(rows.get(m.command, ())) for m in measurements for goal in m.goal]
            page = [f"Made by `{made_by}`; {_versions(rows.values())}.\n", as_markdown(goals) if goals else ""]
            page += [_table(m, rows[m.command]) for m in measurements if m.table and m.command in rows]
            write_bytes(out / "bench.md", "\n".join(filter(None, page)).encode())
    if failed:
        raise RunError("\n".join([*failed, f"{out}: has the other rows; run the same command again to continue"]))
    show_written(out, "bench.md")
    return goals


def _table(measurement: Measurement, rows: Rows) -> str:
    cells = [{name: str(value) for name, value in row.items()} for row in rows if TOOK not in row]
    parts = [f"`{measurement.command}`\n", f"{measurement.about}\n" if measurement.about else "", as_markdown(cells)]
    return "\n".join(filter(None, parts))


def _rows(command: str, out: Path) -> Rows:
    """Returns the rows of a command, from its file if it exists, otherwise by running it."""
    name = re.sub(r"[^\w.=-]+", "-", command.removeprefix("tapfl ")).strip("-")
    file = out / f"{name}.jsonl"
    if not file.is_file():
        arguments = [*shlex.split(command)[1:], "--json"]
        began = time.monotonic()
        ended = subprocess.run([sys.executable, "-m", "experiments.cli", *arguments], stdout=subprocess.PIPE, text=True)
        lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
        if ended.returncode or not lines:
            last = (ended.stdout.strip().splitlines() or ["no output"])[-1]
            raise RunError(f"{command}: ended with {ended.returncode}: {last}")
        lines.append(json.dumps({TOOK: round(time.monotonic() - began, 1), VERSIONS: named(installed())}))
        write_bytes(file, "".join(f"{line}\n" for line in lines).encode())
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def _versions(measured: Iterable[Rows]) -> str:
    """Returns the versions with which the rows were measured; other versions may be installed now."""
    known = [row.get(VERSIONS, "unknown versions") for rows in measured for row in rows if TOOK in row]
    return "; or ".join(dict.fromkeys(known))
