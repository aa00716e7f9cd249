"""The `tapfl` command. Exit codes: 0 done, 1 the run failed, 2 the input was refused, 130 interrupted."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.table import Table

from experiments import pruning_cli
from experiments.bench import cli as bench_cli
from experiments.command_line import (
    Config,
    JobOptions,
    JsonObject,
    JsonRows,
    RayOptions,
    Set,
    load_torch,
    of_the_system,
    option_groups,
    options_of,
    starting,
)
from experiments.deploy import cli as deploy_cli
from experiments.output import command, console, flags, show_rows, show_summary
from experiments.report import cli as report_cli
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, RunError, TapflError

if TYPE_CHECKING:
    from experiments.engines.ray import ActorPool


app = typer.Typer(
    name="tapfl",
    help="Federated learning of Vision Transformers on devices that differ.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(pruning_cli.app)
app.add_typer(bench_cli.app, name="bench")
app.add_typer(deploy_cli.app)
app.add_typer(report_cli.app)


NEED_RAY = ("address", "actor_cpus", "actor_gpus")


class Engine(StrEnum):
    FLOWER = "flower"
    RAY = "ray"
    INPROCESS = "inprocess"


class SearchEngine(StrEnum):
    INPROCESS = "inprocess"
    RAY = "ray"


class Method(StrEnum):
    BOHB = "bohb"
    TPE_HYPERBAND = "tpe-hyperband"
    RANDOM = "random"


@app.callback()
def _tapfl() -> None:
    """Makes `run` a command of its own even while it is alone."""


@app.command()
@option_groups
def run(
    *,
    config: Config = None,
    set: Set = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; must not exist")] = None,
    resume: Annotated[Path | None, typer.Option(help="continue the run in this folder")] = None,
    engine: Annotated[Engine, typer.Option(help="Flower's simulation, Ray actors, or this process")] = Engine.FLOWER,
    ray: RayOptions,
    as_json: JsonObject = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="also write report.html and figures/*.png")
    ] = True,
) -> None:
    """Carry out one federation: summaries, plans, smaller models, adapter rounds, personal models."""
    options = options_of(config, set)
    from experiments.jobs.pool import interruptible
    from experiments.preflight import resolve_run
    from strategies.progress import shown

    if resume is not None and out is not None and out.absolute() != resume.absolute():
        raise ConfigError(f"--out {out}: a run that goes on stays in its folder, {resume}")
    path = resume or out or options.get("out") or f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}"
    _require_ray(engine, ray)
    with shown():
        resolved = resolve_run(options, Path(str(path)), resume is not None or bool(options.get("resume")))
    with interruptible(f"tapfl run --resume {resolved.out}"):
        try:
            _carry_out(resolved, engine, ray)
        except OSError as error:
            go_on = f"; with that mended, go on with: tapfl run --resume {resolved.out}"
            begun = (Path(resolved.out) / "config.json").is_file()
            raise RunError(f"{of_the_system(error)}{go_on if begun else ''}") from error
    if not (Path(resolved.out) / "summary.json").is_file():
        raise RunError(f"the run ended without a result; go on with: tapfl run --resume {resolved.out}")
    from strategies.records import read_summary

    folder = Path(resolved.out)
    summary = read_summary(folder)
    if as_json:
        page = {"report": str(written)} if report and (written := _report(folder)) else {}
        rest = summary.model_dump(exclude={"devices"})
        print(json.dumps({"run": str(folder), **page, "devices": len(summary.devices), **rest}))
        return
    screen = console()
    show_summary(summary, screen)
    screen.print(f"the run's folder: {folder}", highlight=False, soft_wrap=True)
    if report and (written := _report(folder)):
        screen.print(f"the report: {written}", highlight=False, soft_wrap=True)


@app.command()
def options() -> None:
    """List every option of a run with its default; the same names go in --set, in TOML and in flwr's --run-config."""
    table = Table("option", "default", "meaning")
    defaults = RunConfig().flat()
    for name, value in defaults.items():
        table.add_row(name, str(value) or "(empty)", _describe(name))
    console().print(table)


@app.command()
@option_groups
def sweep(
    *,
    config: Annotated[
        Path,
        typer.Option(help="TOML: a table \\[grid] of lists, tables \\[\\[run]], options of all runs"),
    ],
    out: Annotated[Path, typer.Option(help="folder of the runs; runs that are finished there are not repeated")],
    engine: Annotated[Engine, typer.Option(help="engine of each run")] = Engine.INPROCESS,
    runs: JobOptions,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="key=value; overrides the options that the file's runs share")
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="key=value: test every point against the one with this value, over devices"),
    ] = None,
    as_json: JsonRows = False,
) -> None:
    """Carry out many federations; tabulate and draw them: mean ± standard deviation over seeds, tests over devices.

    With --engine ray all of them share this process and one pool of warm actors; else each is a process of its own.
    Runs that differ only in what comes after round zero share it.
    """
    from experiments.jobs.federation import federations
    from experiments.jobs.pool import interruptible
    from experiments.sweep.grid import read_sweep, run_sweep
    from experiments.sweep.outcome import group_of, outcomes
    from experiments.sweep.picture import picture
    from experiments.sweep.settings import read_sweep_options, references
    from experiments.sweep.table import caption_of, means_over_seeds, write_results, write_table
    from strategies.progress import shown
    from tapfl.progress import stage
    from tapfl.store import only_one

    _require_ray(engine, runs)
    planned = read_sweep(config, options_of(None, set))
    told = read_sweep_options(config, options_of(None, reference))
    references([group_of(run.point) for run in planned], told.reference)
    with interruptible("the same command"), only_one(out, "sweep"), ExitStack() as stack:
        stack.enter_context(shown())
        pool, each = stack.enter_context(federations(engine, runs))
        failures = run_sweep(planned, out, pool, each, stack.enter_context(stage("runs")))
    found = outcomes(planned, out)
    write_results(found, out, told)
    rows = means_over_seeds(found, told)
    made_by = command("sweep", "--config", str(config), "--out", "DIR", *flags(set=set, reference=reference))
    write_table(rows, caption_of(found, made_by, told), out / "table.md")
    picture(found, out / "learning-curves.png")
    show_rows(rows, as_json)
    print(f"in {out}: results.csv, devices.csv, table.md, learning-curves.png", file=sys.stderr)
    if failures:
        said = "\n".join(f"  {name}: {error}" for name, error in failures.items())
        raise RunError(f"{len(failures)} of {len(planned)} runs failed; their logs lie in {out}\n{said}")


@app.command()
@option_groups
def search(
    *,
    config: Annotated[Path, typer.Option(help="TOML with \\[search], \\[space] and the options that all runs share")],
    method: Annotated[
        Method | None,
        typer.Option(help="overrides the file's: BOHB, Optuna's TPE with Hyperband, or random search"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the search; default: runs/ and the file's name")] = None,
    storage: Annotated[str | None, typer.Option(help="URL of an Optuna storage; default: a journal in --out")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the search in --out")] = False,
    engine: Annotated[
        SearchEngine,
        typer.Option(help="each run in a process of its own, or the devices of all runs on Ray actors"),
    ] = SearchEngine.INPROCESS,
    runs: JobOptions,
    as_json: JsonObject = False,
) -> None:
    """Search for good options: budgets are rounds, and what is promising goes on from its checkpoint."""
    from experiments.jobs.federation import federations
    from experiments.jobs.pool import interruptible
    from experiments.preflight import DEFAULT_DEVICES
    from experiments.search.settings import read_search
    from strategies.progress import shown

    _require_ray(engine, runs, needs_ray=("workers", *NEED_RAY))
    wanted = read_search(config, method, {"devices.count": DEFAULT_DEVICES})
    load_torch()  # not before the file is known to be good
    from experiments.search.command import Place, run_search

    place = Place(config.stem, out or Path("runs") / config.stem, storage, resume)
    with interruptible("the same command and --resume"), shown():
        found = run_search(wanted, place, partial(federations, engine, runs))
    if as_json:
        print(json.dumps(vars(found) | {"folder": str(found.folder)}))
        return
    screen = console()
    rows = [{"option": name, "value": str(value)} for name, value in found.params.items()]
    show_rows(rows, as_json=False)
    screen.print(f"trial {found.trial}: {found.loss:.4f} after {found.rounds} rounds", highlight=False)
    files = f"as options: {found.folder / 'best.toml'}; in pictures: {found.folder / 'search.html'}"
    screen.print(files, highlight=False, soft_wrap=True)


def _report(folder: Path) -> Path | None:
    """Writes the report of a run that is finished; what goes wrong with it is said, and costs the run nothing."""
    from experiments.report.write import write_report

    try:
        return write_report([folder])
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        print(f"tapfl: no report was written ({said}); again with: tapfl report {folder}", file=sys.stderr)
        return None


def _describe(name: str) -> str:
    section, _, option = name.rpartition(".")
    model = type(getattr(RunConfig(), section)) if section else RunConfig
    field = model.model_fields[option.replace("-", "_")]
    choices = getattr(field.annotation, "__args__", ())
    return field.description or (" | ".join(map(str, choices)) if choices else "")


def _require_ray(engine: Engine | SearchEngine, options: RayOptions, needs_ray: Sequence[str] = NEED_RAY) -> None:
    """Refuses Ray's options with another engine, and an address where no cluster answers."""
    if engine == Engine.RAY:
        from experiments.engines.cluster import require_reachable

        require_reachable(options.address)
        return
    for name in needs_ray:
        if (value := getattr(options, name)) != getattr(RayOptions, name):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: only with --engine ray")


def _pool(options: RayOptions) -> ActorPool:
    from experiments.engines.ray import ActorPool

    return ActorPool(options.address, options.workers, options.actor_cpus, options.actor_gpus)


def _carry_out(config: RunConfig, engine: Engine, ray: RayOptions) -> None:
    if engine is Engine.INPROCESS:
        from clients.client_app import app as client_app
        from experiments.engines.local import run_inprocess
        from strategies.server_app import app as server_app

        run_inprocess(server_app, client_app, config.flat(), config.devices.count)
        return
    starting("Ray")
    if engine is Engine.RAY:
        from strategies.progress import shown
        from strategies.server_app import app as server_app

        with shown(), _pool(ray) as pool:
            pool.run(server_app, config.flat(), config.devices.count)
    else:
        from experiments.engines.flower import run_flower

        run_flower(config.flat(), config.devices.count, ray.workers or os.cpu_count() or 1)


def main() -> NoReturn:
    """Entry point: every TapflError becomes one line on standard error and an exit code."""
    try:
        app()
    except RunError as error:
        _fail(error, 1)
    except TapflError as error:
        _fail(error, 2)
    except OSError as error:  # a full disk, a folder that cannot be written
        _fail(RunError(of_the_system(error)), 1)
    sys.exit(0)


def _fail(error: TapflError, code: int) -> NoReturn:
    print(f"tapfl: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
