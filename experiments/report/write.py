"""A report on disk: `report.html`, and `figures/*.png` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.figures.figure import write_figure
from experiments.figures.page import render
from experiments.report.reading import read_run
from tapfl.errors import ConfigError
from tapfl.store import write_bytes

COMPARISON = Path("report")


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of a run, or of several beside each other, and returns the path of its page.

    Args:
        paths: the runs' folders.
        out: where to; by default the run's own folder, or `report` here for several runs.

    Raises:
        ConfigError: if one of them is no run's folder, or `out` cannot be written.
    """
    runs = [read_run(path) for path in paths]
    if len(runs) == 1:
        from experiments.report.single import page_of

        folder, page = out or runs[0].path, page_of(runs[0])
    else:
        from experiments.report.comparison import page_of_all

        folder, page = out or COMPARISON, page_of_all(runs)
    html, pictures = render(page).encode(), folder / "figures"
    if pictures.is_symlink() and not pictures.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{pictures}: is a link that leads out of {folder}, where nothing is written")
    try:
        for figure in page.figures:
            write_figure(figure, pictures / f"{figure.name}.png")
        write_bytes(folder / "report.html", html)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written ({error.strerror})") from None
    return folder / "report.html"
