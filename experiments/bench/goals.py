"""All measurements in one go, and every goal beside what was measured.

A file lists commands and what is expected of their rows. A command is a process of its own, so that none starts in the
memory or the caches of another; its rows are kept in a file, and a command that has its file is not carried out again.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from experiments.output import as_markdown, command, installed, named
from tapfl.config import Section, read_toml_tables, validated
from tapfl.errors import RunError
from tapfl.progress import stage
from tapfl.store import write_bytes

Row = Mapping[str, Any]
TOOK = "took s"  # the column of a last row of each command, which says how long all of it took


class Goal(Section):
    """What a number of one row has to reach."""

    what: str = Field(min_length=1, description="in words")
    where: dict[str, str] = Field({}, description="column → value of the row; empty: the first row that has the column")
    column: str = Field(description="whose number counts; `took s`: the seconds of the whole command")
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bounded_once(self) -> Goal:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("needs at-least or at-most, one of the two")
        return self

    def judged(self, rows: Sequence[Row]) -> dict[str, str]:
        """Returns the goal as a row: in words, the bound, what was measured, and whether that is enough."""
        bound = f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"
        value = self.measured(rows)
        if value is None:
            return {"what": self.what, "goal": bound, "measured": "", "": "not measured"}
        missed = value < self.at_least if self.at_least is not None else value > (self.at_most or 0.0)
        return {"what": self.what, "goal": bound, "measured": f"{value:g}", "": "**missed**" if missed else "met"}

    def measured(self, rows: Sequence[Row]) -> float | None:
        """Returns the number that stands first in the cell; None if there is none, or no such row."""
        found = (row for row in rows if self.column in row and self.where.items() <= row.items())
        number = re.match(r"-?\d+(\.\d+)?(e-?\d+)?", str(next(found, {self.column: ""})[self.column]))
        return float(number[0]) if number else None


class Measurement(Section):
    """A command, and what is expected of it."""

    command: str = Field(pattern=r"^tapfl \w", description="as it is typed, without --json")
    about: str = Field("", description="what a reader has to know")
    table: bool = Field(True, description="whether its rows are shown")
    goal: tuple[Goal, ...] = ()


class Measurements(Section):
    """The file."""

    measure: tuple[Measurement, ...] = Field(min_length=1)


def read_measurements(file: Path) -> Sequence[Measurement]:
    """Returns what the file lists. Raises ConfigError if it does not say what to measure."""
    return validated(Measurements, read_toml_tables(file)).measure


def measure_all(file: Path, out: Path) -> str:
    """Carries out what is not there yet, and returns the page, which is also in ``out/bench.md``.

    Raises:
        ConfigError: if the file does not say what to measure.
        RunError: if commands failed, with the last line that each said; the rows of the others are kept.
    """
    measurements = read_measurements(file)
    rows: dict[str, list[Row]] = {}
    failed = []
    with stage("measurements") as advance:
        for number, each in enumerate(measurements):
            advance(number, len(measurements), each.command)
            try:
                rows[each.command] = _rows(each.command, out)
            except RunError as error:
                failed.append(str(error))
    text = page(measurements, rows, command("bench", "all", "--config", str(file), "--out", "DIR"))
    write_bytes(out / "bench.md", text.encode())
    if failed:
        raise RunError("\n".join([*failed, f"{out}: has what the others measured; the same command goes on"]))
    return text


def page(measurements: Sequence[Measurement], rows: Mapping[str, Sequence[Row]], made_by: str) -> str:
    """Returns Markdown: the goals beside what was measured, then each command's table."""
    goals = [goal.judged(rows.get(each.command, ())) for each in measurements for goal in each.goal]
    parts = [f"Made by `{made_by}`; {named(installed())}.\n"]
    parts += [as_markdown(goals)] if goals else []
    for each in measurements:
        if each.table and (found := rows.get(each.command)):
            parts += [f"`{each.command}`\n", f"{each.about}\n" if each.about else "", as_markdown(_cells(found))]
    return "\n".join(filter(None, parts))


def _cells(rows: Sequence[Row]) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in row.items()} for row in rows if TOOK not in row]


def _rows(command: str, out: Path) -> list[Row]:
    """Returns what a command printed, as it was kept in a file, or now."""
    name = re.sub(r"[^\w.=-]+", "-", command.removeprefix("tapfl ")).strip("-")
    file = out / f"{name}.jsonl"
    if not file.is_file():
        arguments = [*shlex.split(command)[1:], "--json"]
        began = time.monotonic()
        ended = subprocess.run([sys.executable, "-m", "experiments.cli", *arguments], stdout=subprocess.PIPE, text=True)
        lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
        if ended.returncode or not lines:
            said = (ended.stdout.strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(f"{command}: ended with {ended.returncode}: {said}")
        lines.append(json.dumps({TOOK: round(time.monotonic() - began, 1)}))
        write_bytes(file, "".join(f"{line}\n" for line in lines).encode())
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]
