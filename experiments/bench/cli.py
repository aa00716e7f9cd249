"""`tapfl bench`: one command per benchmark. A benchmark is a function from options to the rows of a table."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import Parameter, Signature, signature
from typing import Any

import typer
from typer.core import TyperGroup

from experiments.command_line import JsonRows, option_groups
from experiments.output import show_rows

BENCHES = {  # command -> module and function
    "start": "start:start",
    "scoring": "scores:scoring",
    "layers": "scores:layers",
    "devices": "round_zero:devices",
    "probe": "round_zero:probe",
    "noise": "round_zero:noise",
    "data": "data:data",
    "latency": "latency:latency",
    "gain": "latency:gain",
    "search": "search:search",
    "simulation": "engines:simulation",
    "engine": "engines:engine",
    "together": "together:together",
    "aggregate": "adapters:aggregate",
    "apfl": "adapters:apfl",
    "all": "goals:measure_all",
}


class _Commands(UserDict[str, Any]):
    """The commands by name. A module is imported when its command is used, as torch, Flower and Ray load slowly."""

    def __getitem__(self, name: str) -> Any:
        module, _, function = self.data[name].partition(":")
        return command_of(name, getattr(import_module(f"experiments.bench.{module}"), function))


class Benches(TyperGroup):
    """The group of all benchmarks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Commands(BENCHES)


app = typer.Typer(cls=Benches, no_args_is_help=True)


@app.callback()
def _bench(context: typer.Context) -> None:
    """Measure speed as ratios: the variants of each benchmark take turns in one run."""
    from strategies.progress import shown
    from tapfl.progress import stage

    context.with_resource(shown(bars=False))  # bars could disturb measurements, occasional lines do not
    context.with_resource(stage(f"bench {context.invoked_subcommand}"))


def command_of(name: str, bench: Callable[..., Iterable[Any]]) -> Any:
    """Returns the command that prints the rows of `bench`.

    Its options are the function's parameters, annotated for typer, and ``--json``, which is passed to the function if
    that has a parameter `as_json`. Its help is the function's docstring.
    """
    rows = option_groups(bench)
    parameters = dict(signature(rows).parameters)
    passes_on = "as_json" in parameters

    def show(**options: Any) -> None:
        as_json = options["as_json"] if passes_on else options.pop("as_json")
        show_rows(list(rows(**options)), as_json)

    parameters["as_json"] = Parameter("as_json", Parameter.KEYWORD_ONLY, default=False, annotation=JsonRows)
    vars(show)["__signature__"] = Signature(list(parameters.values()))
    show.__annotations__ = {key: part.annotation for key, part in parameters.items()}
    show.__doc__ = bench.__doc__
    single = typer.Typer(add_completion=False)
    single.command(name)(show)
    return typer.main.get_command(single)
