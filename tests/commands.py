"""Checks commands without running them: the command, its options, their values and the files it names must exist."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer
from pages import ROOT

from experiments import cli
from experiments.bench.goals import read_measurements
from experiments.compare.grid import read_comparison
from experiments.search.settings import read_search
from experiments.sweep.grid import read_sweep
from tapfl.config import RunConfig
from tapfl.options import parse_assignment, read_toml
from tapfl.plugin import is_plugin
from tapfl.pruning.criteria.registry import resolved

# shell builtins, and programs of the reader's machine
UNCHECKED = {"export", "set", "sleep", "source", "srun", "time"}
ASSIGNED = re.compile(r"\w+=(.*)", re.DOTALL)
NAMED = re.compile(r"[A-Z]+(\.\w+)?")  # FILE, DIR, NAME: placeholder for a value of the reader
NUMBER = re.compile(r"^(N|RUN_ID)$|\$\{?\w+(:-\w+)?\}?")  # placeholder for a number, or a variable
READERS: dict[str, Callable[[Path], object]] = {
    "all": read_measurements,  # of tapfl bench
    "compare": read_comparison,
    "search": read_search,
    "sweep": read_sweep,
}


@dataclass(frozen=True)
class Context:
    """The place of a command.

    Attributes:
        folder: where `files` are written, so that they can be read.
        files: the files that blocks of the page define, by name.
        mentioned: whether the command is in a sentence, where required arguments may be missing.
    """

    folder: Path
    files: Mapping[str, str]
    mentioned: bool = False


def check(words: Sequence[str], context: Context) -> None:
    """Raises an exception that says what is wrong with a command.

    Args:
        words: the words of the command; alternatives are written a|b, optional parts in brackets.
    """
    words = list(words)
    while words and (assigned := ASSIGNED.fullmatch(words[0])):
        value = shlex.split(assigned[1])
        if value and value[0] in PROGRAMS:  # a command that is stored for later
            check(value, context)
        words.pop(0)
    if words and words[0] in UNCHECKED:  # some of them run another command
        words = words[next((i for i, word in enumerate(words) if word in PROGRAMS), len(words)) :]
    if not words:
        return
    if words[0] not in PROGRAMS:
        raise AssertionError(f"nobody knows how to check {words[0]!r}: run it, or say in tests/commands.py how")
    choices = [_plain(word).split("|") if " " not in word else [word] for word in words]
    for choice in product(*choices):
        PROGRAMS[words[0]](list(choice), context)


def check_tapfl(words: list[str], context: Context) -> None:
    words = [word for word in words if word not in ("…", "...")]
    path, rest = _parse(typer.main.get_command(cli.app), words, context)
    for file in _values(rest, "--config"):
        if not NAMED.fullmatch(file):
            read = READERS.get(path[-1], lambda config: RunConfig.from_flat(read_toml(config)))
            read(_file(file, context))
    if path[1:2] != ["bench"]:  # whose --set may have other options
        pruning = RunConfig.from_flat(_options(rest, path[-1])).pruning
        if not is_plugin(pruning.criterion):
            resolved(pruning)


def check_flwr(words: list[str], context: Context) -> None:
    from flwr.cli.app import app

    _, rest = _parse(typer.main.get_command(app), words, context)
    for text in _values(rest, "--run-config"):
        given = re.findall(r"(\S+?)=('[^']*'|\S+)", text)
        RunConfig.from_flat(dict(parse_assignment(f"{key}={value.strip(chr(39))}") for key, value in given))


def check_ray(words: list[str], context: Context) -> None:
    from ray.scripts.scripts import cli as ray_cli  # with all of Ray's dashboard, which takes seconds

    _parse(ray_cli, words, context)


def check_by_help(words: list[str], context: Context) -> None:
    for word in words[1:]:
        assert not word.startswith("-") or word in _help(words[0]), f"{words[0]} has no option {word}"


def check_make(words: list[str], context: Context) -> None:
    for target in words[1:]:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make has no target {target}"


def check_pip(words: list[str], context: Context) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"tapfl\[([^]]+)\]", " ".join(words)):
        assert set(extra.split(",")) <= set(extras), f"tapfl has no extra {extra}"


def check_python(words: list[str], context: Context) -> None:
    if words[1:2] == ["-m"]:
        assert find_spec(words[2]), f"there is no module {words[2]}"


PROGRAMS: dict[str, Callable[[list[str], Context], None]] = {
    "flower-superlink": check_by_help,
    "flower-supernode": check_by_help,
    "flwr": check_flwr,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "ray": check_ray,
    "tapfl": check_tapfl,
    "tensorboard": check_by_help,
}


def _parse(command: Any, words: list[str], context: Context) -> tuple[list[str], list[str]]:
    """Parses words as their command would; returns the path of the command and the other words."""
    path, rest = words[:1], words[1:]
    while rest and not rest[0].startswith("-") and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{' '.join(path)} has no command {rest[0]}"
        path.append(rest.pop(0))
        command = command.commands[path[-1]]
    try:
        command.make_context(" ".join(path), [NUMBER.sub("1", word) for word in rest if word != "--help"])
    except Exception as error:  # typer may use its own copy of click, so only names can be compared
        said = f"{type(error).__name__}: {error.format_message() if hasattr(error, 'format_message') else error}"
        if (
            not (context.mentioned and re.match(r"NoArgsIsHelp|Missing|.*requires an arg", said))
            and "--help" not in rest
        ):
            raise AssertionError(f"{' '.join(words)}: {said}") from None
    return path, rest


def _options(words: Sequence[str], command: str) -> dict[str, Any]:
    given = [parse_assignment(text) for text in _values(words, "--set") if text != "key=value"]
    for name in ("criterion", "compensation", "recovery") if command == "prune" else ():
        given += [(f"pruning.{name}", value) for value in _values(words, f"--{name}") if not NAMED.fullmatch(value)]
    return dict(given)


def _values(words: Sequence[str], option: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words[:-1]) if word == option]


def _file(name: str, context: Context) -> Path:
    if name in context.files:
        (context.folder / name).write_text(context.files[name])
        return context.folder / name
    assert (ROOT / name).is_file(), f"--config {name}: there is no such file"
    return ROOT / name


def _plain(word: str) -> str:
    """Returns a word of a usage line without its brackets."""
    word = word.removeprefix("[")
    return word.removesuffix("]") if "[" not in word else word


@cache
def _help(program: str) -> frozenset[str]:
    (command,) = entry_points(group="console_scripts", name=program)
    said = StringIO()
    with patch.object(sys, "argv", [program, "--help"]), redirect_stdout(said), pytest.raises(SystemExit, match=r"^0$"):
        command.load()()
    return frozenset(re.findall(r"--?[\w-]+", said.getvalue()))
