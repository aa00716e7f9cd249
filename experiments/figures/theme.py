"""Colours and type of the page and of the pictures: one palette, by light and by dark.

The hues are those of Okabe and Ito, told apart by people with any kind of colour vision, a little darker on white and a
little lighter on black. On the page a figure's colours are CSS variables: light, dark and print are a matter of CSS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LIGHT = {
    "paper": "#ffffff",
    "raised": "#f6f7f9",
    "ink": "#1b1f24",
    "muted": "#5b636e",
    "line": "#e2e5e9",
    "blue": "#0072b2",
    "orange": "#d88a00",
    "green": "#00916b",
    "grey": "#8b939c",
    "vermilion": "#d0532a",
    "purple": "#b5679a",
    "sky": "#4aa5d8",
    "yellow": "#b7a400",
}
DARK = {
    "paper": "#14171b",
    "raised": "#1c2026",
    "ink": "#e8eaed",
    "muted": "#9aa3ae",
    "line": "#2d333b",
    "blue": "#55a8e2",
    "orange": "#eba83a",
    "green": "#3dbb95",
    "grey": "#8b939c",
    "vermilion": "#f0835c",
    "purple": "#d58fbd",
    "sky": "#8fd0f5",
    "yellow": "#d9cb45",
}
CATEGORIES = ("blue", "orange", "green", "grey", "vermilion", "purple", "sky", "yellow")
# from hardly there to full: it is seen on white as on black, and ramps cannot be CSS variables
RAMP = ("rgba(34, 118, 184, 0.07)", "rgba(34, 118, 184, 1)")
PAGE_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
PICTURE_FONT = "Helvetica, Arial, sans-serif"  # the picture maker has faces of its own for these


def page_config() -> dict[str, Any]:
    """Returns the Vega-Lite configuration of figures on the page."""
    return _config({name: f"var(--{name})" for name in LIGHT}, PAGE_FONT, "transparent")


def picture_config() -> dict[str, Any]:
    """Returns the Vega-Lite configuration of figures in PNG files."""
    return _config(LIGHT, PICTURE_FONT, LIGHT["paper"]) | {"padding": 20}


def _config(colour: Mapping[str, str], font: str, background: str) -> dict[str, Any]:
    return {
        "background": background,
        "font": font,
        "padding": 0,
        "params": [{"name": "ink", "value": colour["ink"]}, {"name": "muted", "value": colour["muted"]}],
        "view": {"stroke": None},
        "title": {
            "anchor": "start",
            "color": colour["ink"],
            "fontSize": 16,
            "fontWeight": 600,
            "offset": 16,
            "frame": "group",
            "subtitleColor": colour["muted"],
            "subtitleFontSize": 12,
            "subtitlePadding": 6,
        },
        "axis": {
            "domainColor": colour["line"],
            "tickColor": colour["line"],
            "gridColor": colour["line"],
            "labelColor": colour["muted"],
            "titleColor": colour["muted"],
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 10,
            "labelPadding": 6,
            "tickSize": 4,
            "labelOverlap": "greedy",
        },
        "axisQuantitative": {"tickCount": 6},
        "axisBand": {"ticks": False, "domain": False, "grid": False},
        "legend": {
            "orient": "top",
            "title": None,
            "labelColor": colour["muted"],
            "labelFontSize": 12,
            "symbolSize": 80,
            "titleColor": colour["muted"],
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "padding": 0,
            "offset": 14,
            "gradientLength": 140,
            "gradientThickness": 8,
            "symbolStrokeWidth": 2,
            "columnPadding": 18,
        },
        "range": {
            "category": [colour[name] for name in CATEGORIES],
            "ramp": list(RAMP),
            "heatmap": list(RAMP),
        },
        "bar": {"color": colour["blue"], "cornerRadiusEnd": 2},
        "line": {"color": colour["blue"], "strokeWidth": 2.5, "strokeCap": "round", "strokeJoin": "round"},
        "point": {"color": colour["blue"], "filled": True, "size": 60, "opacity": 1},
        "area": {"color": colour["blue"]},
        "rule": {"color": colour["muted"]},
        "tick": {"color": colour["ink"], "thickness": 2},
        "text": {"color": colour["ink"], "fontSize": 11},
    }
