"""The closing table of a run: one line a device, and the means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = tuple("device samples classes budget MACs params dense pruned global personal α up down".split())  # noqa: SIM905


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Prints the table of a run's `summary.json`."""
    table = Table(title="accuracy on each device's own test part", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for record in summary["devices"]:
        table.add_row(
            str(record["device"]),
            f"{record['train_samples']}+{record['test_samples']}",
            str(record["classes"]),
            record["profile"]["budget"],
            f"{_count(record['macs'])} {record['macs_share']:.2%}",
            f"{_count(record['params'])} {record['params_share']:.0%}",
            *(f"{record[f'{name}_accuracy']:.3f}" for name in ("dense", "pruned", "global", "personal")),
            f"{record['alpha']:.3f}",
            _size(sum(record["bytes_up"].values())),
            _size(sum(record["bytes_down"].values())),
        )
    table.add_section()
    means = (f"{summary[f'{name}_accuracy']:.3f}" for name in ("dense", "pruned", "global", "personal"))
    table.add_row("mean", "", "", "", "", "", *means, "", _size(summary["bytes_up"]), _size(summary["bytes_down"]))
    console.print(table)
    for line in remarks(summary):
        console.print(line, highlight=False)


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Returns what there is to say beside the table: simulated time, losses, privacy."""
    lines = []
    if reached := list(summary["time_to_accuracy"].items())[-3:]:
        steps = ", ".join(f"{accuracy} after {_time(seconds)}" for accuracy, seconds in reached)
        lines.append(f"simulated: {_time(summary['simulated_seconds'])} in all; mean personal accuracy {steps}")
    if generic := [str(record["device"]) for record in summary["devices"] if record["generic"]]:
        lines.append(f"gave no mixture and got the generic plan of their budget: devices {', '.join(generic)}")
    if summary["failures"]:
        lines.append(f"messages that came to nothing: {summary['failures']}; metrics.jsonl says why")
    if summary["epsilon"] is not None:
        lines.append(f"differential privacy of the shared adapters: ε ≤ {summary['epsilon']:.3g}")
    return lines


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"


def _count(number: int) -> str:
    return f"{number / 1e6:.3g}M" if number >= 1e6 else f"{number / 1e3:.3g}k"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
