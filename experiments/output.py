"""Results as text: numbers with units, tables on the screen, CSV and Markdown, and captions.

A caption names the command, the seeds and the versions, but no date, so that a table that is made again is identical.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from strategies.records import DeviceRecord, Summary

PACKAGES = ("tapfl", "torch", "timm", "numpy", "scikit-learn")
PIPE = re.compile(r"\|(?=[^`]*(?:`[^`]*`[^`]*)*$)")  # outside of code


def count(number: float) -> str:
    """Returns ``980``, ``980k``, ``1.63M``, ``4.6G``, ``1.2T``."""
    for size, letter in ((1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G")):
        if float(text := f"{number / size:.3g}") < 1e3:  # rounded, because 999,600 is 1M
            return f"{text}{letter}"
    return f"{number / 1e12:.3g}T"


def size(number_of_bytes: float) -> str:
    """Returns ``339.2 kB``, ``1.20 MB``, ``8.08 GB``."""
    for unit, digits, letter in ((1e3, 1, "k"), (1e6, 2, "M")):
        if float(text := f"{number_of_bytes / unit:.{digits}f}") < 1e3:
            return f"{text} {letter}B"
    return f"{number_of_bytes / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Returns ``6.91 s``, ``12.5 min``, ``3.2 h``."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


# -- tables ------------------------------------------------------------------------------------------------------------


def as_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """Returns a header and one line per row; values that a row does not have are left empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns rows with the same columns as a Markdown table; a ``|`` outside of code is escaped."""
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join("| " + " | ".join(PIPE.sub(r"\|", cell) for cell in line) + " |\n" for line in lines)


def console() -> Console:
    """Returns a console on standard output, 140 columns wide if that is not a terminal; it prints text as it is."""
    return Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)


def show_rows(rows: Sequence[Mapping[str, str | float]], as_json: bool) -> None:
    """Prints rows as a table, or as one JSON object each.

    A table that is too wide is transposed. If it is still too wide, each row is printed as a separate table. Without
    rows nothing is printed.
    """
    if not rows:
        return
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    screen = console()
    columns = [[name, *(row[name] for row in rows)] for name in rows[0]]
    as_rows = _table(rows[0], [row.values() for row in rows])
    transposed = _table(["", *range(1, len(rows) + 1)], columns)
    for table in (as_rows, transposed):
        if screen.measure(table, options=screen.options.update(width=10**6)).minimum <= screen.width:
            screen.print(table)
            return
    for number, row in enumerate(rows, start=1):
        screen.print(_table(["", number], row.items()))


def _table(head: Iterable[object], lines: Iterable[Iterable[object]]) -> Table:
    table = Table(*(Column(str(name), overflow="fold") for name in head))
    for line in lines:
        table.add_row(*map(str, line))
    return table


def show_line(text: str) -> None:
    """Prints a line without colours; it is not wrapped, so that a path in it can be copied."""
    console().print(text, highlight=False, soft_wrap=True)


def show_written(folder: Path, *names: str) -> None:
    """Reports the files that a command has written to a folder, on standard error."""
    print(f"written to {folder}: {', '.join(names)}", file=sys.stderr)


def show_summary(summary: Summary, against: Mapping[str, object], private: bool = False) -> None:
    """Prints the final table of a run: one line per device, the means, and remarks.

    Args:
        against: the difference of the personal accuracies to those of each reference model, by its name.
        private: whether the run added the noise of differential privacy.
    """
    stages = ["dense", "pruned", *(summary.reference_accuracies or {}), "global", "personal"]
    names = ("device", "samples", "classes", "budget", "MACs", "params", *stages, "α", "up", "down")
    columns = [Column(name.replace("+", " + "), justify="right") for name in names]  # wraps at the spaces
    table = Table(*columns, title="accuracy on each device's own test images", title_justify="left")
    for device in summary.devices:
        table.add_row(
            str(device.device),
            f"{device.train_samples}+{device.test_samples}",
            str(device.classes),
            device.profile.budget,
            f"{count(device.macs)} {device.macs_share:.1%}",
            f"{count(device.params)} {device.params_share:.0%}",
            *_accuracies(device, stages),
            f"{device.alpha:.3f}",
            *(size(sum(sent.values())) for sent in (device.bytes_up, device.bytes_down)),
        )
    table.add_section()
    sent = (size(summary.bytes_up), size(summary.bytes_down))
    table.add_row("mean", "", "", "", "", "", *_accuracies(summary, stages), "", *sent)
    console().print(table)
    gains = [f"personal - {name}: {difference}" for name, difference in against.items()]
    privacy = [f"differential privacy of the shared adapters: {guarantee(summary)}"] if private else []
    for line in (*gains, *_remarks(summary), *privacy):
        console().print(line, highlight=False)


def _accuracies(record: DeviceRecord | Summary, stages: Sequence[str]) -> list[str]:
    values = (record.accuracy_of(stage) for stage in stages)
    return ["–" if value is None else f"{value:.3f}" for value in values]


def _remarks(summary: Summary) -> list[str]:
    """Returns remarks on what the table lacks: simulated time, missing or coarse mixtures, failures."""
    lines = []
    if reached := list(summary.time_to_accuracy.items())[-3:]:
        steps = ", ".join(f"{accuracy} after {duration(seconds)}" for accuracy, seconds in reached)
        lines.append(f"simulated time: {duration(summary.simulated_seconds)}; mean personal accuracy {steps}")
    if generic := [str(device.device) for device in summary.devices if device.generic]:
        lines.append(f"devices that sent no mixture and got the generic plan for their budget: {', '.join(generic)}")
    if alike := [str(device.device) for device in summary.devices if device.one_component]:
        lines.append(f"devices whose mixture has one component, so that classes are not separated: {', '.join(alike)}")
    if summary.failures:
        lines.append(f"failed messages: {summary.failures}; the reasons are in metrics.jsonl")
    return lines


def guarantee(summary: Summary) -> str:
    """Returns the guarantee of differential privacy that holds for every device."""
    if summary.epsilon is None:
        return "no guarantee, because the noise is too small for the number of rounds"
    return f"ε ≤ {summary.epsilon:.3g}"


# -- captions ----------------------------------------------------------------------------------------------------------


def command(*parts: str) -> str:
    """Returns a `tapfl` command as it is typed; absolute paths are shortened to their last part.

    >>> command("sweep", "--config", "rules.toml", "--set", "data.source=/home/me/val")
    'tapfl sweep --config rules.toml --set data.source=…/val'
    """
    short = [re.sub(r"(^|=)/(?:[^/]*/)*(?=[^/])", r"\1…/", part) for part in parts]
    plain = re.compile(r"[\w@%+=:,./…-]+")
    return " ".join(["tapfl", *(part if plain.fullmatch(part) else shlex.quote(part) for part in short)])


def flags(**repeated: Sequence[str] | None) -> list[str]:
    """Returns repeatable options as they are typed.

    >>> flags(set=["seed=1"], reference=None)
    ['--set', 'seed=1']
    """
    return [part for name, values in repeated.items() for value in values or () for part in (f"--{name}", value)]


def installed(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Returns the installed version of each package."""
    from importlib import metadata  # imports all of email, which only captions need

    return {name: metadata.version(name) for name in packages}


def versions_of(run: Path) -> dict[str, str]:
    """Returns the versions of the packages that a run used; empty if `versions.json` is missing or damaged."""
    try:
        found = json.loads((run / "versions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()) else {}


def named(versions: Mapping[str, str]) -> str:
    """Returns versions as text: ``torch 2.8.0, timm 1.0.31``."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def caption(made_by: str, seeds: Iterable[int], versions: Mapping[str, str], about: Iterable[str] = ()) -> str:
    """Returns one line of Markdown.

    Args:
        made_by: the command, from `command`.
        versions: package -> version.
        about: further parts, such as the backbone and the meaning of ±.
    """
    numbers = sorted(set(seeds))
    drawn = f"{'seed' if len(numbers) == 1 else 'seeds'} {', '.join(map(str, numbers))}"
    return "; ".join(filter(None, [f"made by `{made_by}`", drawn, *about, named(versions)])) + "."
