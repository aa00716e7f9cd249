"""The figures as PNG files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vl_convert

from experiments.report.figure import Figure
from experiments.report.theme import picture_config
from tapfl.store import write_bytes

WIDTH = 720  # pixels of the drawing itself, of which a picture has twice as many
NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # in a run that someone else made


def write_pictures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Writes each figure as ``NAME.png``, on white and twice as fine as on a screen; returns the paths."""
    config = picture_config()
    paths = []
    for figure in figures:
        image = vl_convert.vegalite_to_png(_drawable(figure.spec) | {"width": WIDTH}, config=config, scale=2)
        paths.append(folder / f"{figure.name}.png")
        write_bytes(paths[-1], image)
    return paths


def _drawable(value: Any) -> Any:
    """Returns a specification with U+FFFD for what no SVG can hold: there the library would abort the process."""
    if isinstance(value, str):
        return NO_XML.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_drawable(key): _drawable(each) for key, each in value.items()}
    return [_drawable(each) for each in value] if isinstance(value, list | tuple) else value
