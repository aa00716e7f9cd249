"""Code shared by the commands: options, groups of options, and messages on standard error.

A command with many options takes some of them as one frozen dataclass:

    @dataclass(frozen=True)
    class RayOptions:
        workers: Annotated[int, typer.Option(help="number of workers")] = 0

    @app.command()
    @option_groups
    def run(*, ray: RayOptions, as_json: bool = False) -> None: ...  # tapfl run --workers 2
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from tapfl.errors import message_of

T = TypeVar("T")
Config = Annotated[Path | None, typer.Option(help="TOML file of options, one table per section")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value; overrides --config")]
JsonObject = Annotated[bool, typer.Option("--json", help="print one JSON object at the end instead of a table")]
JsonRows = Annotated[bool, typer.Option("--json", help="print one JSON object per row")]


def option_groups(command: Callable[..., T]) -> Callable[..., T]:
    """Returns `command` as typer should see it: a dataclass parameter becomes one option per field.

    Fields are named and annotated like parameters of a command and have plain defaults (no `default_factory`). The
    help lists the options in the place of the group.

    Raises:
        ValueError: if two options have the same name.
    """
    parameters = signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {n: part.annotation for n, part in parameters.items() if is_dataclass(part.annotation)}
    options = {name: signature(group, eval_str=True).parameters for name, group in groups.items()}
    expanded = [option for name, part in parameters.items() for option in options.get(name, {name: part}).values()]

    @wraps(command)
    def with_groups(**values: Any) -> T:
        for name, group in groups.items():
            values[name] = group(**{option: values.pop(option) for option in options[name]})
        return command(**values)

    vars(with_groups)["__signature__"] = Signature([o.replace(kind=Parameter.KEYWORD_ONLY) for o in expanded])
    with_groups.__annotations__ = {option.name: option.annotation for option in expanded}
    return with_groups


def _finite(value: float) -> float:
    if not math.isfinite(value):  # click accepts nan in any range
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def assignments(values: list[str] | None) -> list[str] | None:
    """Returns the values of an option that takes ``key=value``. Raises BadParameter if one has another form."""
    if odd := [text for text in values or () if not text.partition("=")[0].strip() or "=" not in text]:
        raise typer.BadParameter(f"{odd[0]!r} must have the form key=value, such as personalize.method=local.")
    return values


@dataclass(frozen=True)
class RayOptions:
    """Options of a command whose devices can run on Ray actors."""

    workers: Annotated[
        int,
        typer.Option(
            min=0, help="workers, each with one torch thread; 0: as many as the CPUs allow, or none with inprocess"
        ),
    ] = 0
    address: Annotated[
        str, typer.Option(help="ray: HOST:PORT of a cluster, or auto; empty: RAY_ADDRESS if set, else a local Ray")
    ] = ""
    actor_cpus: Annotated[float, typer.Option(min=0, callback=_finite, help="ray: CPUs that each actor reserves")] = 1.0
    actor_gpus: Annotated[
        float,
        typer.Option(
            min=0,
            callback=_finite,
            help="ray and flower: GPUs that each worker reserves; with 0.25, four workers share one",
        ),
    ] = 0.0


@dataclass(frozen=True)
class JobOptions(RayOptions):
    """Options of a command that executes many runs."""

    jobs: Annotated[int, typer.Option(min=0, help="runs at a time; 0: one per CPU")] = 0


def options_of(config: Path | None, assignments: list[str] | None) -> dict[str, Any]:
    """Returns options by dotted name; those of --set override those of --config."""
    from tapfl.options import parse_assignment, read_toml  # imports pydantic, which --help does not need

    return (read_toml(config) if config else {}) | dict(parse_assignment(text) for text in assignments or [])


def starting(what: str) -> None:
    """Reports the start of something that takes seconds, before a progress bar can be shown."""
    print(f"tapfl: starting {what}", file=sys.stderr, flush=True)


def load_torch() -> None:
    """Imports torch and timm, and reports it first, because it takes seconds."""
    if "torch" not in sys.modules:
        starting("torch and timm")
        import timm  # noqa: F401


def of_the_system(error: OSError) -> str:
    """Returns an error of the operating system as one line: ``/data/run/metrics.jsonl: No space left on device``."""
    what = error.strerror or message_of(error)
    if not error.filename:
        return what
    name = str(error.filename)
    return f"{name if len(name) <= 200 else f'{name[:100]} ... {name[-60:]}'}: {what}"
