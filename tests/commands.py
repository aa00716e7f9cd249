"""Checks of commands that are not run: that the command, its options, their values and the files it names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import click
import typer
from pages import ROOT
from ray.scripts.scripts import cli as ray_cli

from experiments import cli
from experiments.compare.grid import read_comparison
from experiments.search.settings import read_search
from experiments.sweep import read_sweep
from tapfl.config import RunConfig, parse_assignment, read_toml
from tapfl.own import is_own
from tapfl.pruning.criteria.registry import resolved

Files = Mapping[str, str]  # those that the page's own blocks are, by name

# what a shell can do of itself, and what only its own machine knows
UNCHECKED = {"export", "set", "sleep", "source", "time"}
ASSIGNED = re.compile(r"\w+=(.*)", re.DOTALL)
VALUE = re.compile(r"^(N|RUN_ID)$|\$\{?\w+(:-\w+)?\}?")  # a number that stands in a variable, or for one
NAMED = re.compile(r"[A-Z]+(\.\w+)?")  # FILE, DIR, N: a name for what the reader puts there
READERS: dict[str, Callable[[Path], object]] = {
    "compare": read_comparison,
    "search": read_search,
    "sweep": read_sweep,
}


def check(words: Sequence[str], files: Files, folder: Path, mentioned: bool = False) -> None:
    """Raises an exception that says what is not right about a command.

    Args:
        words: of the command; alternatives are written a|b, what can be left out in brackets.
        files: of the page.
        folder: for files, to read them.
        mentioned: in a sentence, where what must be given may be left out.
    """
    words = list(words)
    while words and (assigned := ASSIGNED.fullmatch(words[0])):
        value = shlex.split(assigned[1])
        if value and value[0] in PROGRAMS:  # a command that is kept for later
            check(value, files, folder)
        words.pop(0)
    if words and words[0] == "srun":  # what runs another command
        words = words[next(i for i, word in enumerate(words) if word in PROGRAMS or word.startswith("$s")) :]
    if not words or words[0].startswith("$") or words[0] in UNCHECKED:
        return
    if words[0] not in PROGRAMS:
        raise AssertionError(f"nobody knows how to check {words[0]!r}: run it, or say here how")
    usage = [_without_brackets(word) for word in words]
    for choice in product(*(word.split("|") if "|" in word and " " not in word else [word] for word in usage)):
        PROGRAMS[words[0]](list(choice), files, folder, mentioned)


def check_tapfl(words: list[str], files: Files, folder: Path, mentioned: bool) -> None:
    command: Any = typer.main.get_command(cli.app)
    path, rest = words[:1], [word for word in words[1:] if word not in ("…", "...")]
    while rest and not rest[0].startswith("-") and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{' '.join(path)} has no command {rest[0]}"
        command = command.commands[rest[0]]
        path.append(rest.pop(0))
    _parse(command, path, rest, mentioned)
    options = dict(_options(rest, path[-1]))
    for config in _values(rest, "--config"):
        if not NAMED.fullmatch(config):
            read = READERS.get(path[-1], lambda file: RunConfig.from_flat(read_toml(file)))
            read(_file(config, files, folder))
    if path[1:2] != ["bench"]:  # whose --set may be of other options
        config = RunConfig.from_flat(options)
        if not is_own(config.pruning.criterion):
            resolved(config.pruning)


def check_make(words: list[str], files: Files, folder: Path, mentioned: bool) -> None:
    for target in words[1:]:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make has no target {target}"


def check_flwr(words: list[str], files: Files, folder: Path, mentioned: bool) -> None:
    from flwr.cli.app import app

    command: Any = typer.main.get_command(app)
    path, rest = words[:1], words[1:]
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{' '.join(path)} has no command {rest[0]}"
        command = command.commands[rest[0]]
        path.append(rest.pop(0))
    _parse(command, path, rest, mentioned)
    for text in _values(rest, "--run-config"):
        given = re.findall(r"(\S+?)=('[^']*'|\S+)", text)
        RunConfig.from_flat(dict(parse_assignment(f"{key}={value.strip(chr(39))}") for key, value in given))


def check_by_help(words: list[str], files: Files, folder: Path, mentioned: bool) -> None:
    known = _help(words[0])
    for word in words[1:]:
        assert not word.startswith("-") or word in known, f"{words[0]} has no option {word}"


def check_ray(words: list[str], files: Files, folder: Path, mentioned: bool) -> None:
    assert words[1] in ray_cli.commands, f"ray has no command {words[1]}"
    _parse(ray_cli.commands[words[1]], words[:2], words[2:], mentioned)


def check_pip(words: list[str], files: Files, folder: Path, mentioned: bool) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"tapfl\[([^]]+)\]", " ".join(words)):
        assert set(extra.split(",")) <= set(extras), f"tapfl has no extra {extra}"


PROGRAMS: dict[str, Callable[[list[str], Files, Path, bool], None]] = {
    "flower-superlink": check_by_help,
    "flower-supernode": check_by_help,
    "flwr": check_flwr,
    "make": check_make,
    "pip": check_pip,
    "ray": check_ray,
    "tapfl": check_tapfl,
}


def _parse(command: Any, path: list[str], rest: list[str], mentioned: bool) -> None:
    """Parses the words of a command as it would itself."""
    rest = [VALUE.sub("1", word) for word in rest if word != "--help"]
    try:
        command.make_context(" ".join(path), rest)
    except Exception as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError) or (
            mentioned and re.search("Missing|requires an arg", _said(error))
        ):
            return
        raise AssertionError(f"{' '.join([*path, *rest])}: {_said(error)}") from None


def _without_brackets(word: str) -> str:
    word = word.removeprefix("[")
    return word.removesuffix("]") if "[" not in word else word


def _options(words: Sequence[str], command: str) -> list[tuple[str, Any]]:
    given = [parse_assignment(text) for text in _values(words, "--set") if text != "key=value" and "..." not in text]
    short = ("criterion", "compensation", "recovery") if command == "prune" else ()
    return given + [
        (f"pruning.{name}", value)
        for name in short
        for value in _values(words, f"--{name}")
        if not NAMED.fullmatch(value)
    ]


def _values(words: Sequence[str], option: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words[:-1]) if word == option]


def _file(name: str, files: Files, folder: Path) -> Path:
    if name in files:
        (folder / Path(name).name).write_text(files[name])
        return folder / Path(name).name
    assert (ROOT / name).is_file(), f"--config {name}: there is no such file"
    return ROOT / name


@cache
def _help(program: str) -> frozenset[str]:
    said = subprocess.run([Path(sys.executable).parent / program, "--help"], capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"--?[\w-]+", said.stdout))
