"""Every command and every snippet of the README and the documentation; `pages` describes how each is tested."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pages
import pytest
from commands import Context, check
from pages import PAGES, ROOT, Block
from test_inprocess_run import SMALL
from typer.testing import CliRunner

from experiments import cli, manual

QUICK = [page for page in PAGES if any(b.how == "run" and b.language in ("bash", "python") for b in pages.blocks(page))]
SLOW = [page for page in PAGES if any(block.how == "slow" for block in pages.blocks(page))]
CONFIGS = sorted((ROOT / "experiments" / "configs").glob("*.toml"))
MADE = ("small", "runs/first")  # files that pages assume: a pruned model, and the folder of a run


def test_the_architecture_page_lists_the_modules_that_lint_knows() -> None:
    """Each table of docs/architecture.md has the modules of its import contract, in an order that fits the contract."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    lines = {level: contract["layers"] for contract in contracts for level in contract.get("containers", ())}
    depths = {
        level: {module: depth for depth, line in enumerate(layers) for module in line.split(" | ")}
        for level, layers in lines.items()
    }
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    tables = {section.split("`")[1]: section for section in page.split("\n### ")[1:]}
    assert tables.keys() == depths.keys()
    for level, table in tables.items():
        named = [
            module for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for module in re.findall(r"\w+", cell)
        ]
        assert sorted(named) == sorted(depths[level]), level
        assert [depths[level][module] for module in named] == sorted(depths[level].values()), level


def files_of(page: Path) -> dict[str, str]:
    return {block.title: block.text for block in pages.blocks(page) if block.title}


@pytest.mark.parametrize("page", PAGES, ids=pages.name_of)
def test_everything_that_a_page_names_exists(page: Path, tmp_path: Path) -> None:
    context, wrong = Context(tmp_path, files_of(page)), []
    for block in pages.blocks(page):
        if block.language in ("sh", "shell", "console", "zsh"):
            wrong.append(f"{block.where}: shell is written ```bash, so that it is tested")
        if block.language in ("", "text") and re.search(r"^(\$ )?(tapfl|make|flwr) ", block.text, re.MULTILINE):
            wrong.append(f"{block.where}: has a command, and is no ```bash")
        if block.language == "python":
            compile(block.text, block.where, "exec")
        wrong += [f"{block.where}: {why}" for why in named_tests_missing(block)]
        if block.language == "bash" and not (block.how == "run" and not plain(block)):
            wrong += complaints(block.where, pages.commands(block.text), context)
    for command in pages.inline(page):
        wrong += complaints(pages.name_of(page), pages.commands(command), replace(context, mentioned=True))
    assert not wrong, "\n".join(wrong)


def complaints(where: str, found: list[list[str]], context: Context) -> list[str]:
    wrong = []
    for words in found:
        try:
            check(words, context)
        except Exception as error:
            wrong.append(f"{where}: {' '.join(words)}: {error}")
    return wrong


def named_tests_missing(block: Block) -> list[str]:
    return [f"{name} is not there" for name in re.findall(r"tests/\w+\.py", block.why) if not (ROOT / name).is_file()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.name)
def test_a_configuration_states_its_purpose_and_its_command(config: Path, tmp_path: Path) -> None:
    what, found = manual.about(config)
    assert what and any(config.name in line for line in found), (
        "its first comment: what it is for, and by which command"
    )
    for line in found:
        assert not complaints(config.name, pages.commands(line), Context(tmp_path, {}))


@pytest.mark.parametrize("name", sorted(manual.commands()))
def test_every_command_has_a_page(name: str) -> None:
    page = ROOT / "docs" / "commands" / f"{name}.md"
    assert page.is_file(), f"{page}: is missing; the others there show what is in one"
    assert f"    :command: {name}\n" in page.read_text()


@pytest.mark.parametrize(
    "command",
    [
        "tapfl rum",
        "tapfl run --rounds 3",
        "tapfl run --set train.round=3",
        "tapfl run --set pruning.criterion=taps",
        "tapfl run --workers many",
        "tapfl prune --criterion tap --budget 0.5",
        "tapfl prune --criterion taps --budget 0.5 --out small",
        "tapfl sweep --config experiments/configs/nowhere.toml --out runs/x",
        "tapfl sweep --config experiments/configs/search-digits.toml --out runs/x",
        "tapfl bench scorings",
        "make everything",
        'flwr run . --run-config "train.round=3"',
        "flwr runs .",
        "flower-supernode --superlinks here",
        "ray start --heads",
        "pip install 'tapfl[everything]'",
        "rm -rf runs",
    ],
)
def test_an_invalid_command_is_detected(command: str, tmp_path: Path) -> None:
    assert complaints("", pages.commands(command), Context(tmp_path, {}))


def test_invalid_marks_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    for text in (
        "<!-- test: never -->\n```bash\nls\n```\n",
        "<!-- test: parse -->\n```bash\nls\n```\n",
        "<!-- test: slow -->\n\n```bash\nls\n```\n",
    ):
        (tmp_path / "page.md").write_text(text)
        with pytest.raises(ValueError, match="test: "):
            pages.blocks(tmp_path / "page.md")


def test_shell_text_is_split_into_commands() -> None:
    text = "export A=1  # why\nx --y 'a b' \\\n  --z | tee file && (make run)\n# nothing\nflwr . --c \"d=1\n  e='2'\"\n"
    assert pages.commands(text) == [
        ["export", "A=1"],
        ["x", "--y", "a b", "--z"],
        ["tee", "file"],
        ["make", "run"],
        ["flwr", ".", "--c", "d=1\n  e='2'"],
    ]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that pages assume, small enough to be made in seconds."""
    folder = tmp_path_factory.mktemp("made")
    options = [*SMALL, "devices.count=2", "data.public-share=0.9", "train.steps=5", f"cache={folder / 'cache'}"]
    small = [part for option in options for part in ("--set", option)]
    for line in (
        ["run", "--engine", "inprocess", "--no-report", *small, "--out", str(folder / "runs" / "first")],
        ["prune", "--budget", "0.5", *small, "--out", str(folder / "small")],
    ):
        done = CliRunner().invoke(cli.app, line, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The commands that have been run for a page, and are not run again for another one."""
    return set()


@pytest.mark.parametrize("page", QUICK, ids=pages.name_of)
def test_quick_blocks_run(
    page: Path, made: Path, known: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in MADE:
        shutil.copytree(made / name, tmp_path / name)
    prepare(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TAPFL_CACHE", str(made / "cache"))
    modules = set(sys.modules)
    for block in pages.blocks(page):
        if block.how == "run" and block.language == "python" and not block.title:
            exec(compile(block.text, block.where, "exec"), {})
        elif block.how == "run" and block.language == "bash" and plain(block):
            for words in pages.commands(block.text):
                if (command := " ".join(words)) in known:
                    continue
                known.add(command)
                done = CliRunner().invoke(cli.app, words[1:], catch_exceptions=False)
                assert done.exit_code == 0, f"{block.where}: {command}\n{done.output}"
        elif block.how == "run" and block.language == "bash":
            shell(block, tmp_path, os.environ)
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", SLOW, ids=pages.name_of)
def test_blocks_run_one_after_another(page: Path, made: Path, shared: Path, tmp_path: Path) -> None:
    """As a reader would, in a copy of the repository with its environment set up."""
    folder, environment = copy_of_the_repository(tmp_path / "tapfl", shared)
    prepare(page, folder)
    found = pages.blocks(page)
    for name in MADE:
        if not any(block.how == "slow" and re.search(rf"--out {name}(\s|$)", block.text) for block in found):
            shutil.copytree(made / name, folder / name)
    for block in found:
        if block.how == "parse" or block.title:
            continue
        if block.language == "python":
            run([sys.executable, "-c", block.text], block, folder, environment)
        elif block.language == "bash":
            shell(block, folder, environment)


def prepare(page: Path, folder: Path) -> None:
    for name, text in files_of(page).items():
        assert not (folder / name).exists()
        (folder / name).write_text(text)


def plain(block: Block) -> bool:
    """Returns whether a block has only commands of tapfl, which can be called in this process."""
    return all(words[0] == "tapfl" for words in pages.commands(block.text)) and "$" not in block.text


def shell(block: Block, folder: Path, environment: os._Environ[str] | dict[str, str]) -> None:
    first = {words[0] for words in pages.commands(block.text)}
    if missing := [name for name in ("openssl", "ssh-keygen") if name in first and shutil.which(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    run(["bash", "-euo", "pipefail", "-c", block.text], block, folder, dict(environment))


def run(command: list[str], block: Block, folder: Path, environment: dict[str, str]) -> None:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
    try:
        out, err = process.communicate()
    except BaseException:  # timeout: end everything that it started
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, f"{block.where}: {block.text}\n{out[-2000:]}\n{err[-4000:]}"


def copy_of_the_repository(folder: Path, shared: Path) -> tuple[Path, dict[str, str]]:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (folder / ".venv" / ".ready").touch()
    return folder, os.environ | {
        "HOME": str(shared),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "TAPFL_CACHE": str(shared / "cache"),
    }
