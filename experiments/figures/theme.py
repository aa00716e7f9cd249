"""Colours and fonts of pages and picture files: one palette with a light and a dark variant.

The hues are those of Okabe and Ito, which people with any kind of colour vision can distinguish; they are a little
darker on white and a little lighter on black. On a page the colours of figures are CSS variables, so that CSS alone
switches to the dark theme and to print.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLOURS = {  # on light, on dark
    "paper": ("#ffffff", "#14171b"),
    "raised": ("#f6f7f9", "#1c2026"),
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#5b636e", "#9aa3ae"),
    "line": ("#e2e5e9", "#2d333b"),
    "blue": ("#0072b2", "#55a8e2"),
    "orange": ("#d88a00", "#eba83a"),
    "green": ("#00916b", "#3dbb95"),
    "grey": ("#8b939c", "#8b939c"),
    "vermilion": ("#d0532a", "#f0835c"),
    "purple": ("#b5679a", "#d58fbd"),
    "sky": ("#4aa5d8", "#8fd0f5"),
    "yellow": ("#b7a400", "#d9cb45"),
}
LIGHT, DARK = ({name: both[k] for name, both in COLOURS.items()} for k in (0, 1))
CATEGORIES = ("blue", "orange", "green", "grey", "vermilion", "purple", "sky", "yellow")
# from nearly transparent to opaque, which is visible on white and on black; ramps cannot be CSS variables
RAMP = ["rgba(34, 118, 184, 0.07)", "rgba(34, 118, 184, 1)"]
PAGE_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
PICTURE_FONT = "Helvetica, Arial, sans-serif"  # vl-convert brings its own faces for these


def page_config() -> dict[str, Any]:
    """Returns the Vega-Lite configuration of figures on a page."""
    return _config({name: f"var(--{name})" for name in LIGHT}, PAGE_FONT, "transparent")


def picture_config() -> dict[str, Any]:
    """Returns the Vega-Lite configuration of figures in PNG and SVG files."""
    return _config(LIGHT, PICTURE_FONT, LIGHT["paper"]) | {"padding": 20}


def _config(colour: Mapping[str, str], font: str, background: str) -> dict[str, Any]:
    ink, muted, line = colour["ink"], colour["muted"], colour["line"]
    subtitle = {"subtitleColor": muted, "subtitleFontSize": 12, "subtitlePadding": 6}
    labels = {"labelColor": muted, "labelFontSize": 12}
    titles = {"titleColor": muted, "titleFontSize": 12, "titleFontWeight": "normal"}
    lines = {"domainColor": line, "tickColor": line, "gridColor": line}
    spaces = {"titlePadding": 10, "labelPadding": 6, "tickSize": 4}
    symbols = {"symbolSize": 80, "symbolStrokeWidth": 2, "columnPadding": 18}
    gradient = {"gradientLength": 140, "gradientThickness": 8}
    legend = {"orient": "top", "title": None, "padding": 0, "offset": 14}
    return {
        "background": background,
        "font": font,
        "padding": 0,
        "params": [{"name": "ink", "value": ink}, {"name": "muted", "value": muted}],
        "view": {"stroke": None},
        "title": {"anchor": "start", "color": ink, "fontSize": 16, "fontWeight": 600, "offset": 16, "frame": "group"}
        | subtitle,
        "axis": {**labels, **titles, **lines, **spaces, "labelOverlap": "greedy"},
        "axisQuantitative": {"tickCount": 6},
        "axisBand": {"ticks": False, "domain": False, "grid": False},
        "legend": {**labels, **titles, **symbols, **gradient, **legend},
        "range": {"category": [colour[name] for name in CATEGORIES], "ramp": RAMP, "heatmap": RAMP},
        "bar": {"color": colour["blue"], "cornerRadiusEnd": 2},
        "line": {"color": colour["blue"], "strokeWidth": 2.5, "strokeCap": "round", "strokeJoin": "round"},
        "point": {"color": colour["blue"], "filled": True, "size": 60, "opacity": 1},
        "area": {"color": colour["blue"]},
        "rule": {"color": muted},
        "tick": {"color": ink, "thickness": 2},
        "text": {"color": ink, "fontSize": 11},
    }
