"""The figures as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import vl_convert

from experiments.report.figure import Figure
from experiments.report.theme import picture_config
from tapfl.store import write_bytes

WIDTH = 720  # pixels of the drawing itself, of which a picture has twice as many


def write_pictures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Writes each figure as ``NAME.png``, on white and twice as fine as on a screen; returns the paths."""
    config = picture_config()
    paths = []
    for figure in figures:
        image = vl_convert.vegalite_to_png(figure.spec | {"width": WIDTH}, config=config, scale=2)
        paths.append(folder / f"{figure.name}.png")
        write_bytes(paths[-1], image)
    return paths
