"""Tables of the manual that are read off the code: commands, options, criteria, configurations."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from inspect import cleandoc
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from tapfl.config import RunConfig, Section

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "experiments" / "configs"
PIPE = re.compile(r"\|(?=[^`]*(?:`[^`]*`[^`]*)*$)")  # outside of code, where mkdocs takes it as it is
HUGE = 10**9  # a bound that nobody meets is not told
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def commands() -> dict[str, Any]:
    """Returns every command of `tapfl` by name, hidden ones and groups included."""
    from experiments.cli import app

    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def command(name: str) -> str:
    """Returns synopsis and options of a command; of a group those of all its commands. Raises KeyError if unknown."""
    found = commands()[name]
    if not hasattr(found, "commands"):
        return _command(f"tapfl {name}", found)
    parts = []
    for child, sub in found.commands.items():
        parts.append(f"### {name} {child}\n\n{cleandoc(sub.help)}\n\n{_command(f'tapfl {name} {child}', sub)}")
    return "\n\n".join(parts)


def options() -> str:
    """Returns every option of a run, a table for each section."""
    plain = {name: field for name, field in RunConfig.model_fields.items() if not _section(field)}
    parts = ["## The run\n\n" + _options("", plain)]
    for name, field in RunConfig.model_fields.items():
        if section := _section(field):
            parts.append(
                f"## {name}\n\n{cleandoc(section.__doc__ or '')}\n\n{_options(f'{name}.', section.model_fields)}"
            )
    return "\n\n".join(parts)


def criteria() -> str:
    """Returns the built-in criteria: what each is, and which options it is made for."""
    from tapfl.pruning.criteria.registry import BUILT_IN, criterion_of

    rows = []
    for name, where in BUILT_IN.items():
        module = where.partition(":")[0]
        said = cleandoc(import_module(module).__doc__ or "").split("\n\n")[0].replace("\n", " ")
        made_for = getattr(criterion_of(name), "recipe", {})
        own = ", ".join(f"{key.replace('_', '-')} = {value}" for key, value in made_for.items())
        file = f"[{module.rpartition('.')[2]}.py](../../{module.replace('.', '/')}.py)"
        rows.append((f"`{name}`", said, own or "those of `tap`", file))
    return table(("criterion", "what it is", "`auto` stands for", "file"), rows)


def configs() -> str:
    """Returns the ready configurations: what each is for, and the commands that it names."""
    rows = []
    for file in sorted(CONFIGS.glob("*.toml")):
        what, lines = about(file)
        named = "<br>".join(f"`{line}`" for line in lines)
        rows.append((f"[{file.name}](../../experiments/configs/{file.name})", what, named))
    return table(("file", "what for", "command"), rows)


def about(config: Path) -> tuple[str, list[str]]:
    """Returns what the first comment of a configuration says it is for, and the commands in that comment."""
    said = [line[1:].strip() for line in takewhile(lambda line: line[:1] == "#", config.read_text().splitlines())]
    what = " ".join(takewhile(lambda line: not line.startswith("tapfl "), said)).rstrip(":")
    return what, [line for line in said if line.startswith("tapfl ")]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(PIPE.sub(r"\\|", cell) for cell in line) + " |" for line in lines)


def _command(name: str, found: Any) -> str:
    usage, rows = [name], []
    for part in found.params:
        argument = part.param_type_name == "argument"
        metavar = "" if getattr(part, "is_flag", False) else _metavar(part)
        shown = part.name.upper() if argument else " ".join(filter(None, [part.opts[0], metavar]))
        many = "..." if part.multiple else ""
        usage.append((shown if part.required else f"[{shown}]") + many)
        rows.append((f"`{shown}`", "required" if part.required else _default(part), part.help or ""))
    lines = textwrap.wrap(" ".join(word.replace(" ", "\0") for word in usage), 78, subsequent_indent="    ")
    synopsis = "```text\n" + "\n".join(lines).replace("\0", " ") + "\n```"
    return synopsis + ("\n\n" + table(("option", "default", "meaning"), rows) if rows else "")


def _metavar(part: Any) -> str:
    if choices := getattr(part.type, "choices", None):
        return "|".join(str(getattr(choice, "value", choice)) for choice in choices)
    if part.opts[0] == "--set":
        return "KEY=VALUE"
    return {"text": "TEXT", "path": "PATH", "directory": "PATH"}.get(part.type.name, "NUMBER")


def _default(part: Any) -> str:
    value = getattr(part.default, "value", part.default)
    if value is None or value is False or value in ("", []):
        return ""
    if value is True:
        return "yes"
    return f"`{' '.join(map(str, value))}`" if isinstance(value, list | tuple) else f"`{value}`"


def _section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _options(prefix: str, fields: dict[str, FieldInfo]) -> str:
    defaults = RunConfig().flat()
    rows = []
    for name, field in fields.items():
        option = prefix + name.replace("_", "-")
        default = defaults[option]
        shown = f"`{str(default).lower() if isinstance(default, bool) else default}`" if default != "" else ""
        rows.append((f"`{option}`", shown, _accepted(field), field.description or ""))
    return table(("option", "default", "accepted", "meaning"), rows)


def _accepted(field: FieldInfo) -> str:
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    listed, notes = get_origin(kind) is tuple, field.metadata
    if listed:  # of numbers that are annotated alike
        kind, *notes = get_args(get_args(kind)[0])
    limits = [
        f"{sign} {getattr(limit, bound):g}"
        for limit in _limits(notes)
        for bound, sign in BOUNDS.items()
        if getattr(limit, bound, HUGE) < HUGE
    ]
    word = {int: "integer", float: "number", str: "text"}.get(kind, "text")
    return ("a list, each " if listed else "") + " ".join([word, ", ".join(limits)]).strip()


def _limits(notes: Iterable[Any]) -> Iterator[Any]:
    """Yields the bounds among the notes of an annotation."""
    for note in notes:
        yield from note.metadata if isinstance(note, FieldInfo) else [note]
