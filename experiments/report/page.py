"""The page: one file that holds its figures, their library and its style, and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import jinja2
import vl_convert
from markupsafe import Markup

from experiments.report import tables, theme
from experiments.report.figure import Figure
from experiments.report.tables import Table

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A part of the page; figures of one group stand in one place.

    Attributes:
        pick: the lines of the table pick a device.
        details: tables that are opened by a click, by what they hold.
    """

    title: str
    figures: Sequence[Figure] = ()
    table: Table | None = None
    pick: bool = False
    note: str = ""
    details: Sequence[tuple[str, Table]] = ()


@dataclass(frozen=True)
class Page:
    """All that is on a page, from top to bottom.

    Attributes:
        where: what it is made of: folders, versions.
        picker: the devices that can be picked.
    """

    title: str
    lead: Sequence[str]
    headline: Sequence[tuple[str, str]]
    missing: Sequence[str]
    where: str
    sections: Sequence[Section]
    picker: Sequence[int] = field(default=())

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]


def render(page: Page) -> str:
    """Returns the page as HTML. What comes from a run is text in it, never markup and never script."""
    script = (HERE / "page.js").read_text("utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=page.title,
        lead=page.lead,
        headline=page.headline,
        missing=page.missing,
        where=page.where,
        picker=page.picker,
        sections=[_section(section) for section in page.sections],
        picks=any(section.pick for section in page.sections),
        light=theme.LIGHT,
        dark=theme.DARK,
        style=Markup((HERE / "page.css").read_text("utf-8")),
        figures_json=Markup(for_script({"config": theme.page_config(), "specs": _specs(page.figures)})),
        library=Markup(library()),
        script=Markup(script),
        hashes=Markup(" ".join(_allowed(text) for text in (library(), script))),
    )


def for_script(content: object) -> str:
    """Returns JSON that can stand within a script element: no text in it can end the element or begin another."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@lru_cache(maxsize=1)
def library() -> str:
    """Returns Vega-Embed, Vega-Lite and Vega as one script, as the picture maker brings them."""
    script: str = vl_convert.javascript_bundle("Object.assign(window, { vegaEmbed });")
    assert "</script" not in script.lower() and "<!--" not in script
    return script


def _allowed(script: str) -> str:
    """Returns what lets the browser run this script, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _specs(figures: Sequence[Figure]) -> dict[str, object]:
    """Returns the figures' descriptions by name; their titles are the page's headings."""
    return {figure.name: {k: v for k, v in figure.spec.items() if k != "title"} for figure in figures}


def _section(section: Section) -> dict[str, object]:
    groups: dict[str, list[dict[str, object]]] = {}
    for figure in section.figures:
        words = {name: getattr(figure, name) for name in ("name", "title", "alt", "hint", "wide", "choice")}
        groups.setdefault(figure.group or figure.name, []).append(words | {"table": tables.numbers(figure.rows)})
    return {**vars(section), "figures": list(groups.values())}
