"""The documentation site: its tables say what the code says, its links hold, and it needs no network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mkdocs.exceptions import PluginError

from experiments.manual import hooks, reference
from tapfl.config import RunConfig
from tapfl.pruning.criteria.registry import BUILT_IN

ROOT = Path(__file__).parent.parent


def test_every_option_of_a_run_is_in_the_table_with_its_default() -> None:
    text = reference.options()
    for name, value in RunConfig().flat().items():
        (line,) = re.findall(rf"^\| `{name}` \| (.*?) \| ", text, re.MULTILINE)
        assert line == ("" if value == "" else f"`{str(value).lower() if isinstance(value, bool) else value}`")
    assert "| `data.public-share` | `0.5` | number > 0, < 1 |" in text
    assert "| `devices.ranks` | `4,6,8` | a list, each integer ≥ 1 |" in text
    assert "| `pruning.recovery` | `none` | `none`, `fine-tune`, `distill` |" in text


def test_a_command_shows_how_it_is_called_and_all_its_options() -> None:
    text = reference.command("prune")
    assert text.startswith("```text\ntapfl prune --out PATH [--budget TEXT]")
    assert "[--set KEY=VALUE]..." in text and "| `--out PATH` | required |" in text
    for part in reference.commands()["prune"].params:
        assert f"| `{part.opts[0]}" in text
    assert "| `--engine flower|ray|inprocess` | `flower` |" in reference.command("run")


def test_a_group_shows_all_its_commands() -> None:
    text = reference.command("bench")
    for name in reference.commands()["bench"].commands:
        assert f"### bench {name}\n" in text and f"tapfl bench {name}" in text


def test_every_criterion_and_every_configuration_is_listed() -> None:
    assert all(f"| `{name}` |" in reference.criteria() for name in BUILT_IN)
    assert "ratio = power, basis = canonical" in reference.criteria()
    for file in (ROOT / "experiments" / "configs").glob("*.toml"):
        assert f"[{file.name}](" in reference.configs()


@pytest.mark.parametrize("mark", ["command rum", "everything", "command", "options too"])
def test_a_table_that_is_none_stops_the_build(mark: str) -> None:
    with pytest.raises(PluginError, match=f"table: {mark}"):
        hooks.tables(f"text\n<!-- table: {mark} -->\n")


def test_links_to_files_of_the_repository_are_followed_and_no_others(tmp_path: Path) -> None:
    docs = ROOT / "docs"
    others = "[b](../tapfl/nowhere.py) [c](privacy.md) [d](../docs/privacy.md) [e](../../x) [f](../tapfl)"
    text = f"[a](../tapfl/seeds.py) {others}"
    assert list(hooks.linked("method.md", text, docs)) == [("../tapfl/seeds.py", ROOT / "tapfl" / "seeds.py")]
    shown = hooks.show(ROOT / "tapfl" / "seeds.py")
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
        assert "<!-- table:" not in text
    assert "numpy_generator" in (tmp_path / "site" / "source" / "tapfl" / "seeds.py.html").read_text()
    for style in (tmp_path / "site" / "assets").rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?https?:", style.read_text()), style.name
