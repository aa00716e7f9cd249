"""A page of figures and tables: one HTML file that contains its scripts and styles and makes no network request."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2
import vl_convert
from markupsafe import Markup

from experiments.figures import theme
from experiments.figures.figure import Figure

HERE = Path(__file__).parent
MOST_ROWS = 400  # rows shown of the numbers behind a figure


@dataclass(frozen=True)
class Table:
    """Columns and rows of text.

    Attributes:
        keys: for each row, the device that a click on it selects.
        words: indices of the text columns; the others are right-aligned.
        note: text below the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: Sequence[int] = ()
    words: Collection[int] = ()
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page; figures of the same group share one place.

    Attributes:
        pick: a click on a row of the table selects a device.
        details: tables that a click on their title opens.
    """

    title: str
    figures: Sequence[Figure] = ()
    table: Table | None = None
    pick: bool = False
    note: str = ""
    details: Sequence[tuple[str, Table]] = ()


@dataclass(frozen=True)
class Page:
    """The content of a page, from top to bottom.

    Attributes:
        lead: paragraphs below the title.
        headline: the most important values, each with its description.
        missing: one sentence for each thing that the page cannot show.
        where: which folder the page was made from.
        picker: the devices that can be selected.
        kicker: line above the title: the command that made the page.
    """

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    headline: Sequence[tuple[str, str]] = ()
    missing: Sequence[str] = ()
    where: str = ""
    picker: Sequence[int] = ()
    kicker: str = "tapfl report"

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]


def render(page: Page) -> str:
    """Returns the page as HTML. Text that comes from a run is escaped, so that it is neither markup nor script."""
    script = (HERE / "page.js").read_text("utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # the figures' titles are the page's headings
    specs = {figure.name: {k: v for k, v in figure.spec.items() if k != "title"} for figure in page.figures}
    return environment.get_template("page.html.j2").render(
        page=page,
        sections=[_section(section) for section in page.sections],
        light=theme.LIGHT,
        dark=theme.DARK,
        style=Markup((HERE / "page.css").read_text("utf-8")),
        figures_json=Markup(for_script({"config": theme.page_config(), "specs": specs})),
        library=Markup(library()),
        script=Markup(script),
        hashes=Markup(" ".join(_allowed(text) for text in (library(), script))),
    )


def for_script(content: object) -> str:
    """Returns JSON that is safe inside a script element: no text in it can end the element or begin another."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@lru_cache(maxsize=1)
def library() -> str:
    """Returns Vega-Embed, Vega-Lite and Vega as one script, bundled by vl-convert."""
    script: str = vl_convert.javascript_bundle("Object.assign(window, { vegaEmbed });")
    assert "</script" not in script.lower() and "<!--" not in script
    return script


def numbers(figure: Figure) -> Table:
    """Returns the numbers behind a figure as a table of at most `MOST_ROWS` rows."""
    rows = figure.rows
    columns = figure.columns or list(dict.fromkeys(key for row in rows for key in row))
    shown = [[_value(row.get(column)) for column in columns] for row in rows[:MOST_ROWS]]
    words = [k for k, column in enumerate(columns) if any(isinstance(row.get(column), str | list) for row in rows)]
    more = len(rows) - len(shown)
    return Table(columns, shown, words=words, note=f"{more} more rows are not shown." if more else "")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _allowed(script: str) -> str:
    """Returns the source expression that allows exactly this script in the content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _section(section: Section) -> dict[str, object]:
    groups: dict[str, list[dict[str, object]]] = {}
    for figure in section.figures:
        words = {name: getattr(figure, name) for name in ("name", "title", "alt", "hint", "wide", "choice")}
        groups.setdefault(figure.group or figure.name, []).append(words | {"table": numbers(figure)})
    return {**vars(section), "figures": list(groups.values())}
