"""Numbers as people read them: counts, bytes, seconds."""

from __future__ import annotations


def count(number: float) -> str:
    """Returns ``980k``, ``1.63M``, ``4.6G``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def size(number_of_bytes: float) -> str:
    """Returns ``339.2 kB``, ``1.20 MB``, ``8.08 GB``."""
    for unit, letter in ((1e9, "G"), (1e6, "M")):
        if number_of_bytes >= unit:
            return f"{number_of_bytes / unit:.2f} {letter}B"
    return f"{number_of_bytes / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """Returns ``6.91 s``, ``12.5 min``, ``3.2 h``."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
