"""The `tapfl` command. Exit codes: 0 success, 1 a run failed, 2 the input was refused, 130 interrupted."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from experiments import pruning_cli
from experiments.bench import cli as bench_cli
from experiments.command_line import (
    Config,
    JobOptions,
    JsonObject,
    JsonRows,
    RayOptions,
    Set,
    assignments,
    load_torch,
    of_the_system,
    option_groups,
    options_of,
)
from experiments.deploy import cli as deploy_cli
from experiments.output import command, console, flags, show_line, show_rows, show_summary, show_written
from experiments.report import cli as report_cli
from tapfl.errors import ConfigError, RunError, TapflError

app = typer.Typer(
    name="tapfl",
    help="Federated learning of Vision Transformers on heterogeneous devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(pruning_cli.app)
app.add_typer(bench_cli.app, name="bench")
app.add_typer(deploy_cli.app)
app.add_typer(report_cli.app)


NEED_RAY = ("address", "actor_cpus", "actor_gpus")
Engine = Literal["flower", "ray", "inprocess"]
SearchEngine = Literal["inprocess", "ray"]
Method = Literal["bohb", "tpe-hyperband", "random"]


@app.command()
@option_groups
def run(
    *,
    config: Config = None,
    set: Set = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; must not exist")] = None,
    resume: Annotated[Path | None, typer.Option(help="continue the run in this folder")] = None,
    engine: Annotated[
        Engine, typer.Option(help="Flower's simulation, Ray actors, or this process and its forks")
    ] = "flower",
    ray: RayOptions,
    as_json: JsonObject = False,
    report: Annotated[bool, typer.Option(help="also write report.html")] = True,
) -> None:
    """Run one federation: device summaries, pruning plans, pruned models, rounds of adapters, personal models."""
    options = options_of(config, set)
    from experiments.preflight import place_of_run, resolve_run
    from strategies.progress import shown

    place, resumed = place_of_run(options, out, resume)
    _require_ray(engine, ray)
    with shown():
        resolved = resolve_run(options, place, resumed)
    from experiments.engines.cluster import EngineLostError
    from experiments.jobs.federation import engine_of, require_gpus
    from experiments.jobs.pool import interruptible
    from experiments.statistics import against_references
    from strategies.records import SUMMARY, read_summary

    require_gpus(engine, ray, [resolved.compute.device])
    folder, again = Path(resolved.out), f"tapfl run --resume {shlex.quote(resolved.out)}"

    def begun() -> bool:
        return (folder / "config.json").is_file()

    with interruptible(lambda: again if begun() else "the same command"):
        try:
            with shown(), engine_of(engine, ray) as execute:
                execute(resolved.flat(), resolved.devices.count)
        except (OSError, EngineLostError) as error:
            go_on = f"; after solving this, continue with: {again}" if begun() else ""
            why = of_the_system(error) if isinstance(error, OSError) else str(error)
            raise RunError(why + go_on) from error
    if not (folder / SUMMARY).is_file():
        raise RunError("the run ended without a result" + (f"; continue with: {again}" if begun() else ""))
    summary = read_summary(folder)
    page, remarks = _report(folder) if report else (None, [])
    if as_json:
        shared = {"run": str(folder)} | ({"report": str(page)} if page else {}) | {"devices": len(summary.devices)}
        print(json.dumps(shared | summary.model_dump(exclude={"devices"})))
        return
    show_summary(summary, against_references(summary.equipped), private=resolved.privacy.dp_noise > 0)
    show_line(f"run folder: {folder}")
    for remark in remarks:
        show_line(remark)
    if page:
        show_line(f"report: {page}")


@app.command()
def options() -> None:
    """List every option of a run with its default. --set, TOML files and flwr's --run-config use these names."""
    from rich.table import Column, Table

    from tapfl.config import RunConfig

    table = Table("option", Column("default", overflow="fold"), "meaning")
    for name, value in RunConfig().flat().items():
        section, _, option = name.rpartition(".")
        model = type(getattr(RunConfig(), section)) if section else RunConfig
        field = model.model_fields[option.replace("-", "_")]
        meaning = field.description or " | ".join(map(str, getattr(field.annotation, "__args__", ())))
        table.add_row(name, str(value) or "(empty)", meaning)
    console().print(table)


@app.command()
@option_groups
def sweep(
    *,
    config: Annotated[
        Path, typer.Option(help="TOML file with a table \\[grid] of lists, tables \\[\\[run]], and options of all runs")
    ],
    out: Annotated[Path, typer.Option(help="folder of the runs; runs that are finished in it are not repeated")],
    engine: Annotated[Engine, typer.Option(help="engine of each run")] = "inprocess",
    runs: JobOptions,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="key=value; overrides the options of all runs in the file")
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="key=value: compare every point with the point that has this value", callback=assignments),
    ] = None,
    as_json: JsonRows = False,
) -> None:
    """Run many federations and compare them: mean ± standard deviation over seeds, tests over devices, learning curves.

    With --engine ray, all runs share this process and one pool of actors; otherwise each run has its own process.
    Runs that differ only in options that take effect after round zero share round zero.
    """
    from experiments.jobs.federation import federations, require_gpus
    from experiments.jobs.pool import interruptible
    from experiments.sweep.grid import group_of, read_sweep, references, run_sweep
    from strategies.progress import shown
    from tapfl.progress import stage
    from tapfl.run_folder import only_one

    _require_ray(engine, runs)
    planned, options = read_sweep(config, options_of(None, set), options_of(None, reference))
    require_gpus(engine, runs, [str(run.options.get("compute.device", "cpu")) for run in planned])
    references([group_of(run.point) for run in planned], options.reference)
    with interruptible(), only_one(out, "sweep"), ExitStack() as stack:
        stack.enter_context(shown())
        pool, execute = stack.enter_context(federations(engine, runs))
        failures = run_sweep(planned, out, pool, execute, stack.enter_context(stage("runs")))
    from experiments.figures.figure import write_figure
    from experiments.sweep.picture import learning_curves
    from experiments.sweep.results import caption_of, means_over_seeds, outcomes, write_results, write_table

    if found := outcomes(planned, out):
        write_results(found, out, options)
        rows = means_over_seeds(found, options)
        made_by = command("sweep", "--config", str(config), "--out", "DIR", *flags(set=set, reference=reference))
        write_table(rows, caption_of(found, made_by, options), out / "table.md")
        write_figure(learning_curves(found), out / "learning-curves.png")
        show_rows(rows, as_json)
        show_written(out, "results.csv", "devices.csv", "table.md", "learning-curves.png")
    if failures:
        reasons = "\n".join(f"  {name}: {error}" for name, error in failures.items())
        raise RunError(f"{len(failures)} of {len(planned)} runs failed; their logs are in {out}\n{reasons}")


@app.command()
@option_groups
def search(
    *,
    config: Annotated[Path, typer.Option(help="TOML file with \\[search], \\[space] and the options of all runs")],
    method: Annotated[
        Method | None, typer.Option(help="BOHB, Optuna's TPE with Hyperband, or random search; overrides the file")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the search; default: runs/NAME for NAME.toml")] = None,
    storage: Annotated[
        str | None, typer.Option(help="URL of an Optuna storage; default: a journal file in --out")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the search in --out")] = False,
    engine: Annotated[
        SearchEngine, typer.Option(help="each run in its own process, or the devices of all runs on Ray actors")
    ] = "inprocess",
    runs: JobOptions,
    as_json: JsonObject = False,
) -> None:
    """Search for good options. A trial's budget is a number of rounds; promising runs continue from checkpoints."""
    from experiments.search.settings import read_search
    from strategies.progress import shown

    _require_ray(engine, runs, needs_ray=("workers", *NEED_RAY))
    wanted = read_search(config, method)
    load_torch()  # only after the file has been checked
    from experiments.jobs.federation import federations, require_gpus
    from experiments.jobs.pool import interruptible
    from experiments.search.study import begun, run_search

    require_gpus(engine, runs, [str(wanted.options.get("compute.device", "cpu"))])
    folder, start = out or Path("runs") / config.stem, partial(federations, engine, runs)
    same = "the same command"
    with interruptible(lambda: f"{same} and --resume" if begun(folder) and not resume else same), shown():
        found = run_search(wanted, config.stem, folder, start, storage, resume)
    if as_json:
        print(json.dumps(vars(found) | {"folder": str(found.folder)}))
        return
    show_rows([{"option": name, "value": str(value)} for name, value in found.params.items()], as_json=False)
    show_line(f"trial {found.trial}: {found.loss:.4f} after {found.rounds} rounds")
    show_line(f"options: {found.folder / 'best.toml'}; figures: {found.folder / 'search.html'}")


def _report(folder: Path) -> tuple[Path | None, list[str]]:
    """Writes the report of a finished run and returns its page and remarks; an error does not fail the run."""
    from experiments.report.cli import write_report
    from experiments.report.reading import read_run
    from experiments.report.single import differences
    from experiments.report.warnings import warnings_of

    try:
        run = read_run(folder)
        found = [f"warning: {warning.found} What to try: {warning.advice}." for warning in warnings_of(run)]
        return write_report([run], pictures=False), [*filter(None, [differences(run).strip()]), *found]
    except Exception as error:
        reason, again = f"{type(error).__name__}: {error}", f"tapfl report {shlex.quote(str(folder))}"
        print(f"tapfl: no report was written ({reason}); try again with: {again}", file=sys.stderr)
        return None, []


def _require_ray(engine: str, options: RayOptions, needs_ray: Sequence[str] = NEED_RAY) -> None:
    """Refuses options of Ray with another engine, and an address at which no cluster answers."""
    if engine == "ray":
        from experiments.engines.cluster import require_reachable

        require_reachable(options.address)
        return
    for name in needs_ray:
        if name == "actor_gpus" and engine == "flower":
            continue
        if (value := getattr(options, name)) != getattr(RayOptions, name):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: only with --engine ray")


def _require_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the current folder was deleted; accepted: cd to an existing folder") from None


def main() -> NoReturn:
    """Entry point: every TapflError becomes one line on standard error and an exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # as stderr does: α in locale C
    try:
        _require_folder()
        app()
        sys.exit(0)
    except TapflError as error:
        reason, code = str(error), 1 if isinstance(error, RunError) else 2
    except OSError as error:  # a full disk, a folder that cannot be written
        reason, code = of_the_system(error), 1
    print(f"tapfl: {reason}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
