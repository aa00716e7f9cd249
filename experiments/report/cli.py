"""`tapfl report`: what runs came to, on a page and in pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs; several are compared", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="where to; default: the run's folder, or ./report for several")
    ] = None,
) -> None:
    """Show what a run came to, or several beside each other: one page that opens offline, and its figures as PNG."""
    from experiments.output import console
    from experiments.report.write import write_report

    path = write_report(runs, out)
    console().print(f"the report: {path}", highlight=False, soft_wrap=True)
