"""The closing table of a run: one line a device, and the means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.output import count, duration, size

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
            f"{count(record['macs'])} {record['macs_share']:.2%}",
            f"{count(record['params'])} {record['params_share']:.0%}",
            *(f"{record[f'{name}_accuracy']:.3f}" for name in ("dense", "pruned", "global", "personal")),
            f"{record['alpha']:.3f}",
            size(sum(record["bytes_up"].values())),
            size(sum(record["bytes_down"].values())),
        )
    table.add_section()
    means = (f"{summary[f'{name}_accuracy']:.3f}" for name in ("dense", "pruned", "global", "personal"))
    table.add_row("mean", "", "", "", "", "", *means, "", size(summary["bytes_up"]), size(summary["bytes_down"]))
    console.print(table)
    for line in remarks(summary):
        console.print(line, highlight=False)


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Returns what there is to say beside the table: simulated time, losses, privacy."""
    lines = []
    if reached := list(summary["time_to_accuracy"].items())[-3:]:
        steps = ", ".join(f"{accuracy} after {duration(seconds)}" for accuracy, seconds in reached)
        lines.append(f"simulated: {duration(summary['simulated_seconds'])} in all; mean personal accuracy {steps}")
    if generic := [str(record["device"]) for record in summary["devices"] if record["generic"]]:
        lines.append(f"gave no mixture and got the generic plan of their budget: devices {', '.join(generic)}")
    if summary["failures"]:
        lines.append(f"messages that came to nothing: {summary['failures']}; metrics.jsonl says why")
    if summary["epsilon"] is not None:
        lines.append(f"differential privacy of the shared adapters: ε ≤ {summary['epsilon']:.3g}")
    return lines
