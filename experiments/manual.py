"""Hooks of the documentation site: reference tables made from the code, and pages that show files of the repository.

A line ``<!-- table: options -->`` becomes the table of that name (`TABLES`). A relative link to a file of the
repository leads to a page that shows the file, so that the site needs no network. For the pages of docs/commands
mkdocs-click looks up the commands of `tapfl` as attributes of this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from experiments.output import as_markdown
from tapfl.config import RunConfig

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"^<!-- table: (\w+) -->$", re.MULTILINE)
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)\)")
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".csv": "text", ".json": "json"}
HUGE = 10**9  # larger bounds only catch mistyped numbers and are not shown
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
WORDS = {"integer": "integer", "number": "number", "boolean": "`true`, `false`"}


def __getattr__(name: str) -> Any:
    """Returns the command `tapfl NAME`; mkdocs-click looks it up like this."""
    if found := commands().get(name):
        return found
    raise AttributeError(name)


def commands() -> dict[str, Any]:
    """Returns every command of `tapfl` by name, including hidden ones and groups."""
    from experiments.cli import app

    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in list(files.documentation_pages()):
        for _, shown in linked(page.src_uri, with_tables(page.content_string), Path(config.docs_dir)):
            if files.get_file_from_path(uri := _uri(shown)) is None:
                content = show(shown)
                files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    if page.file.generated_by:
        return markdown
    markdown = with_tables(markdown)
    up = "../" * page.file.src_uri.count("/")
    for link, shown in linked(page.file.src_uri, markdown, Path(config.docs_dir)):
        markdown = markdown.replace(f"]({link})", f"]({up}{_uri(shown)})")
    return markdown


def on_page_content(html: str, page: Page, **_: Any) -> str:
    return html.replace("\\[", "[") if page.file.src_uri.startswith("commands/") else html  # rich's escapes in help


def with_tables(markdown: str) -> str:
    """Returns the page with its tables filled in. Raises PluginError for an unknown table."""

    def fill(mark: re.Match[str]) -> str:
        if mark[1] not in TABLES:
            raise PluginError(f"{mark[0]}: unknown table; accepted: {', '.join(TABLES)}")
        return TABLES[mark[1]]()

    return TABLE.sub(fill, markdown)


def linked(page: str, markdown: str, docs: Path) -> Iterator[tuple[str, Path]]:
    """Yields every link of a page that leads to a file of the repository outside `docs`, with the file."""
    for link in sorted(set(LINK.findall(markdown))):
        file = (docs / page).parent.joinpath(link).resolve()
        if file.is_file() and file.is_relative_to(ROOT) and not file.is_relative_to(docs):
            yield link, file


def show(file: Path) -> str:
    """Returns a page that shows a file of the repository."""
    name, language = file.relative_to(ROOT).as_posix(), LANGUAGES.get(file.suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n~~~~~{language}\n{file.read_text().rstrip()}\n~~~~~\n"


def _uri(file: Path) -> str:
    return f"source/{file.relative_to(ROOT).as_posix()}.md"


def options_table() -> str:
    """Returns every option of a run, in one table per section."""
    schema = RunConfig.model_json_schema()
    parts = [f"## The run\n\n{_options('', {k: part for k, part in schema['properties'].items() if 'title' in part})}"]
    for name, part in schema["properties"].items():
        if "$ref" in part:
            section = schema["$defs"][part["$ref"].rpartition("/")[2]]
            parts.append(f"## {name}\n\n{section['description']}\n\n{_options(f'{name}.', section['properties'])}")
    return "\n".join(parts)


def criteria_table() -> str:
    """Returns a table of the built-in criteria: a description, and the options that each sets."""
    from tapfl.pruning.criteria.registry import BUILT_IN, criterion_of

    rows = []
    for name, where in BUILT_IN.items():
        module = where.partition(":")[0]
        criterion = criterion_of(name)
        defaults = ", ".join(f"{key.replace('_', '-')} = {value}" for key, value in criterion.defaults.items())
        file = f"[{module.rpartition('.')[2]}.py](../../{module.replace('.', '/')}.py)"
        rows.append(
            {
                "criterion": f"`{name}`",
                "what it is": criterion.about,
                "`auto` stands for": defaults or "those of `tap`",
                "file": file,
            }
        )
    return as_markdown(rows)


def configs_table() -> str:
    """Returns a table of the ready configurations: the purpose of each, and the commands in its first comment."""
    rows = []
    for file in sorted((ROOT / "experiments" / "configs").glob("*.toml")):
        purpose, named = about(file)
        link = f"[{file.name}](../../experiments/configs/{file.name})"
        rows.append({"file": link, "what for": purpose, "command": "<br>".join(f"`{line}`" for line in named)})
    return as_markdown(rows)


def about(config: Path) -> tuple[str, list[str]]:
    """Returns the purpose of a configuration as its first comment states it, and the commands in that comment."""
    comment = [line[1:].strip() for line in takewhile(lambda line: line[:1] == "#", config.read_text().splitlines())]
    purpose = " ".join(takewhile(lambda line: not line.startswith("tapfl "), comment)).rstrip(":")
    return purpose, [line for line in comment if line.startswith("tapfl ")]


TABLES = {"options": options_table, "criteria": criteria_table, "configs": configs_table}


def _options(prefix: str, fields: dict[str, dict[str, Any]]) -> str:
    rows, defaults = [], RunConfig().flat()
    for name, field in fields.items():
        default = defaults[prefix + name]
        shown = f"`{str(default).lower() if isinstance(default, bool) else default}`" if default != "" else ""
        row = {"option": f"`{prefix}{name}`", "default": shown, "accepted": _accepted(field)}
        rows.append(row | {"meaning": field.get("description", "")})
    return as_markdown(rows)


def _accepted(field: dict[str, Any]) -> str:
    if field.get("type") == "array":
        return f"a list, each {_accepted(field.get('items') or field['prefixItems'][0])}"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    limits = [f"{sign} {field[bound]:g}" for bound, sign in BOUNDS.items() if field.get(bound, HUGE) < HUGE]
    return f"{WORDS.get(field.get('type', ''), 'text')} {', '.join(limits)}".strip()
