"""`tapfl report`: writes a run, or a comparison of several, as `report.html`, and its figures as `figures/*.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from experiments.report.reading import Run

app = typer.Typer()
COMPARISON = Path("report")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs; several runs are compared", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="output folder; default: the run's own, or ./report for several runs")
    ] = None,
) -> None:
    """Show the result of a run, or compare several runs: one page that opens offline, and its figures as PNG."""
    from experiments.output import show_line
    from experiments.report.reading import read_run

    path = write_report([read_run(run) for run in runs], out)
    show_line(f"report: {path}")


def write_report(runs: Sequence[Run], out: Path | None = None, pictures: bool = True) -> Path:
    """Writes the report of a run, or the comparison of several, and returns the path of its page.

    Args:
        out: output folder; by default the run's own folder, or `report` in the working folder for several runs.
        pictures: write PNGs of the figures too, which takes seconds.

    Raises:
        ConfigError: if `out` cannot be written.
    """
    from experiments.figures.figure import write_figure
    from experiments.figures.page import render
    from experiments.report.comparison import page_of_all
    from experiments.report.single import page_of
    from tapfl.errors import ConfigError
    from tapfl.store import write_bytes

    folder = out or (runs[0].path if len(runs) == 1 else COMPARISON)
    place = folder / "figures"
    if place.is_symlink() and not place.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{place}: is a symbolic link to a place outside {folder}; nothing is written there")
    page = page_of(runs[0]) if len(runs) == 1 else page_of_all(runs)
    html = render(page).encode()
    try:
        for figure in page.figures if pictures else ():
            write_figure(figure, place / f"{figure.name}.png")
        write_bytes(folder / "report.html", html)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written ({error.strerror})") from None
    return folder / "report.html"
