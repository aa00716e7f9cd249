"""The documentation site: its tables match the code, its links are valid, and it needs no network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import markdown
import pytest
from mkdocs.exceptions import PluginError
from mkdocs_click._exceptions import MkDocsClickException

from experiments import manual
from tapfl.config import RunConfig
from tapfl.pruning.criteria.registry import BUILT_IN

ROOT = Path(__file__).parent.parent


def test_every_option_of_a_run_is_in_the_table_with_its_default() -> None:
    text = manual.options_table()
    for name, value in RunConfig().flat().items():
        (line,) = re.findall(rf"^\| `{name}` \| (.*?) \| ", text, re.MULTILINE)
        assert line == ("" if value == "" else f"`{str(value).lower() if isinstance(value, bool) else value}`")
    assert "| `data.public-share` | `0.5` | number > 0, < 1 |" in text
    assert "| `devices.ranks` | `4,6,8` | a list, each integer ≥ 1 |" in text
    assert "| `pruning.recovery` | `none` | `none`, `fine-tune`, `distill` |" in text


@pytest.mark.parametrize("name", sorted(manual.commands()))
def test_the_page_of_a_command_shows_all_its_options(name: str) -> None:
    page = (ROOT / "docs" / "commands" / f"{name}.md").read_text()
    shown = markdown.markdown(page, extensions=["attr_list", "fenced_code", "mkdocs-click"])
    found = manual.commands()[name]
    for command in getattr(found, "commands", {name: found}).values():
        path = f"tapfl {name}" if command.name == name else f"tapfl {name} {command.name}"
        section = shown.split(f">{path}</h")[1].split("<h")[0]
        assert f">{path} " in section
        for part in command.params:
            shown_as = (
                rf"(^|>)  {part.opts[0]}\b"
                if part.opts[0].startswith("--")
                else rf"\[OPTIONS\].* \[?{part.name.upper()}\b"
            )
            assert re.search(shown_as, section, re.MULTILINE), part.name


def test_every_criterion_and_every_configuration_is_listed() -> None:
    assert all(f"| `{name}` |" in manual.criteria_table() for name in BUILT_IN)
    assert "ratio = uniform, basis = canonical, compensation = sequential" in manual.criteria_table()
    for file in (ROOT / "experiments" / "configs").glob("*.toml"):
        assert f"[{file.name}](" in manual.configs_table()


def test_an_unknown_table_or_command_stops_the_build() -> None:
    with pytest.raises(PluginError, match="table: everything -->: unknown table; accepted: options, criteria, configs"):
        manual.with_tables("text\n<!-- table: everything -->\n")
    with pytest.raises(MkDocsClickException, match="rum"):
        markdown.markdown(
            "::: mkdocs-click\n    :module: experiments.manual\n    :command: rum\n", extensions=["mkdocs-click"]
        )


def test_only_links_to_files_of_the_repository_are_followed(tmp_path: Path) -> None:
    docs = ROOT / "docs"
    others = "[b](../tapfl/nowhere.py) [c](privacy.md) [d](../docs/privacy.md) [e](../../x) [f](../tapfl)"
    text = f"[a](../tapfl/seeds.py) {others}"
    assert list(manual.linked("method.md", text, docs)) == [("../tapfl/seeds.py", ROOT / "tapfl" / "seeds.py")]
    shown = manual.show(ROOT / "tapfl" / "seeds.py")
    assert "# tapfl/seeds.py" in shown and "~~~~~python\n" in shown and "def numpy_generator" in shown


@pytest.mark.slow
def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {page.name for page in (tmp_path / "site").iterdir()} >= {"index.html", "tutorial.html", "method.html"}
    for page in pages:
        text = page.read_text()
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\s\">]+)", text)
        fetched += re.findall(r"<link[^>]*\shref=\"?(https?:[^\s\">]+)", text)
        assert not fetched, f"{page.name}: {fetched}"
        if "source" not in page.relative_to(tmp_path / "site").parts:  # the text of a source file may contain them
            assert "<!-- table:" not in text and "mkdocs-click" not in text
    assert "numpy_generator" in (tmp_path / "site" / "source" / "tapfl" / "seeds.py.html").read_text()
    for style in (tmp_path / "site" / "assets").rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?https?:", style.read_text()), style.name
