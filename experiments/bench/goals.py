"""`tapfl bench all`: all measurements of a file, and every goal beside what was measured.

A file lists commands and the goals of their rows. Each command is a process of its own, so that none starts with the
memory or the caches of another. Its rows are kept in a file, and a command that has its file is not run again.
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

from experiments.output import as_markdown, command, installed, named
from tapfl.errors import RunError
from tapfl.options import Section, read_toml_tables, validated
from tapfl.progress import stage
from tapfl.store import write_bytes

Rows = Sequence[Mapping[str, Any]]
# columns of a last row of each command: seconds of the whole command, and the versions with which it was measured
TOOK, VERSIONS = "took s", "versions"


class Goal(Section):
    """A bound on a number of one row."""

    what: str = Field(min_length=1, description="in words")
    where: dict[str, str] = Field({}, description="column → value of the row; empty: the first row that has the column")
    column: str = Field(description="column of the number; `took s`: the seconds of the whole command")
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bounded_once(self) -> Goal:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("needs at-least or at-most, one of the two")
        return self

    def judged(self, rows: Rows) -> dict[str, str]:
        """Returns the goal as a row: in words, the bound, what was measured, and the verdict."""
        bound = f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"
        value = self.measured(rows)
        if value is None:
            return {"what": self.what, "goal": bound, "measured": "", "": "not measured"}
        missed = value < self.at_least if self.at_least is not None else value > (self.at_most or 0.0)
        return {"what": self.what, "goal": bound, "measured": f"{value:g}", "": "**missed**" if missed else "met"}

    def measured(self, rows: Rows) -> float | None:
        """Returns the first number in the cell; None if there is none, or no such row."""
        found = (row for row in rows if self.column in row and self.where.items() <= row.items())
        number = re.match(r"-?\d+(\.\d+)?(e-?\d+)?", str(next(found, {self.column: ""})[self.column]))
        return float(number[0]) if number else None


class Measurement(Section):
    """A command, and the goals of its rows."""

    command: str = Field(pattern=r"^tapfl \w", description="as it is typed, without --json")
    about: str = Field("", description="what a reader has to know")
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
    out: Annotated[Path, typer.Option(help="folder of the rows and of bench.md; what is there is not measured again")],
) -> list[dict[str, str]]:
    """Run all measurements of a file, and show every goal beside what was measured.

    All tables are in bench.md, which is written anew after each command. If commands fail, or it is interrupted, the
    rows of the others are kept, and the same command goes on.
    """
    measurements = read_measurements(config)
    made_by = command("bench", "all", "--config", str(config), "--out", "DIR")
    rows: dict[str, Rows] = {}
    failed = []
    with stage("measurements") as advance:
        for number, each in enumerate(measurements):
            advance(number, len(measurements), each.command)
            try:
                rows[each.command] = _rows(each.command, out)
            except RunError as error:
                failed.append(str(error))
            goals = [goal.judged(rows.get(each.command, ())) for each in measurements for goal in each.goal]
            page = [f"Made by `{made_by}`; {_versions(rows.values())}.\n", as_markdown(goals) if goals else ""]
            page += [_table(each, rows[each.command]) for each in measurements if each.table and each.command in rows]
            write_bytes(out / "bench.md", "\n".join(filter(None, page)).encode())
    if failed:
        raise RunError("\n".join([*failed, f"{out}: has the other rows; run the same command again to continue"]))
    print(f"in {out}: bench.md", file=sys.stderr)
    return goals


def _table(measurement: Measurement, rows: Rows) -> str:
    cells = [{name: str(value) for name, value in row.items()} for row in rows if TOOK not in row]
    parts = [f"`{measurement.command}`\n", f"{measurement.about}\n" if measurement.about else "", as_markdown(cells)]
    return "\n".join(filter(None, parts))


def _rows(command: str, out: Path) -> Rows:
    """Returns the rows that a command printed, from its file or by running it now."""
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
    """Returns the versions with which the rows were measured, which need not be those that are installed now."""
    known = [
        row.get(VERSIONS, "versions that were not written down") for rows in measured for row in rows if TOOK in row
    ]
    return "; or ".join(dict.fromkeys(known))
