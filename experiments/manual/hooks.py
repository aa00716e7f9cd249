"""What mkdocs does to the pages, beyond Markdown.

``<!-- table: command run -->``, alone on a line, becomes the table that `experiments.manual.reference` reads off the
code, so it cannot rot. A link to a file of the repository, relative as everywhere, leads to a page that shows it, so
that the site is whole without a network. A page that the navigation does not name is found under *More*.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from experiments.manual import reference
from experiments.manual.reference import ROOT

TABLE = re.compile(r"^<!-- table: (\S+)(?: (\S+))? -->$", re.MULTILINE)
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)\)")
SOURCE = "source"  # where the pages lie that show files of the repository
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".csv": "text", ".json": "json"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    docs = Path(config.docs_dir)
    named = set(_named(config.nav or []))
    others = sorted(page for file in docs.rglob("*.md") if (page := file.relative_to(docs).as_posix()) not in named)
    if others:
        config.nav = [*(config.nav or []), {"More": others}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in list(files.documentation_pages()):
        assert page.abs_src_path
        text = tables(Path(page.abs_src_path).read_text())
        for _, shown in linked(page.src_uri, text, Path(config.docs_dir)):
            if files.get_file_from_path(uri := _uri(shown)) is None:
                content = show(shown)
                files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    if page.file.generated_by:
        return markdown
    markdown = tables(markdown)
    up = "../" * page.file.src_uri.count("/")
    for link, shown in linked(page.file.src_uri, markdown, Path(config.docs_dir)):
        markdown = markdown.replace(f"]({link})", f"]({up}{_uri(shown)})")
    return markdown


def tables(markdown: str) -> str:
    """Returns a page with its tables filled in. Raises PluginError if one is not known."""

    def fill(mark: re.Match[str]) -> str:
        try:
            return str(getattr(reference, mark[1])(*([mark[2]] if mark[2] else [])))
        except (AttributeError, KeyError, TypeError) as error:
            raise PluginError(f"{mark[0]}: there is no such table ({type(error).__name__}: {error})") from None

    return TABLE.sub(fill, markdown)


def linked(page: str, markdown: str, docs: Path) -> Iterator[tuple[str, Path]]:
    """Yields every link of a page to a file of the repository outside `docs`, and the file."""
    for link in sorted(set(LINK.findall(markdown))):
        file = (docs / page).parent.joinpath(link).resolve()
        if file.is_file() and file.is_relative_to(ROOT) and not file.is_relative_to(docs):
            yield link, file


def show(file: Path) -> str:
    """Returns a page that shows a file of the repository."""
    name, language = file.relative_to(ROOT).as_posix(), LANGUAGES.get(file.suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n~~~~~{language}\n{file.read_text().rstrip()}\n~~~~~\n"


def _uri(file: Path) -> str:
    return f"{SOURCE}/{file.relative_to(ROOT).as_posix()}.md"


def _named(nav: Any) -> Iterator[str]:
    """Every page of a navigation."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict | list):
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _named(part)
