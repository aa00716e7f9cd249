"""What the commands share: options as they are given, and tables as they are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tapfl.config import parse_assignment, read_toml
from tapfl.errors import message_of


def console() -> Console:
    """Returns where results go; of a fixed width where nobody looks."""
    return Console(width=None if sys.stdout.isatty() else 140)


def options_of(config: Path | None, assignments: list[str] | None) -> dict[str, Any]:
    """Returns dotted options: those of --set after and above those of --config."""
    return (read_toml(config) if config else {}) | dict(parse_assignment(text) for text in assignments or [])


def starting(what: str) -> None:
    """Says that something starts which takes seconds, before anything else can be shown."""
    print(f"tapfl: starting {what}", file=sys.stderr, flush=True)


def load_torch() -> None:
    """Imports what most commands need, and says so first: it takes seconds on a machine that is at rest."""
    if "torch" not in sys.modules:
        starting("torch and timm")
        import timm  # noqa: F401


def of_the_system(error: OSError) -> str:
    """Returns what the system refused, such as ``/data/run/metrics.jsonl: No space left on device``, in one line."""
    what = error.strerror or message_of(error)
    if not error.filename:
        return what
    name = str(error.filename)
    return f"{name if len(name) <= 200 else f'{name[:100]} ... {name[-60:]}'}: {what}"


def show_rows(rows: Sequence[Mapping[str, str | float]], as_json: bool) -> None:
    """Prints rows as a table, or as one JSON object each."""
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    shown = console()
    upright = _table([*rows[0]], [[str(value) for value in row.values()] for row in rows])
    lines = [[name, *(str(row[name]) for row in rows)] for name in rows[0]]
    lying = _table(["", *(str(number) for number in range(1, len(rows) + 1))], lines)
    for table in (upright, lying):
        if shown.measure(table, options=shown.options.update(width=10**6)).minimum <= shown.width:
            shown.print(table)
            return
    for number, row in enumerate(rows, start=1):  # single words have no room in either: what is cut nobody can read
        shown.print(_table(["", str(number)], [[name, str(value)] for name, value in row.items()]))


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table
