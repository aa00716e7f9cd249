"""The `tapfl` command. Exit codes: 0 done, 1 the run failed, 2 the input was refused, 130 interrupted."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from tapfl.config import RunConfig, parse_assignment, read_toml
from tapfl.errors import RunError, TapflError

DEFAULT_DEVICES = 10

app = typer.Typer(
    name="tapfl",
    help="Federated learning of Vision Transformers on devices that differ.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Engine(StrEnum):
    FLOWER = "flower"
    INPROCESS = "inprocess"


@app.callback()
def _tapfl() -> None:
    """Makes `run` a command of its own even while it is alone."""


@app.command()
def run(
    config: Annotated[Path | None, typer.Option(help="options as TOML, one table a section")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="key=value, after and above --config")] = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder; must not exist")] = None,
    engine: Annotated[Engine, typer.Option(help="Flower's simulation on Ray, or this process alone")] = Engine.FLOWER,
    workers: Annotated[int, typer.Option(min=0, help="Ray workers, one CPU each; 0: as many as there are CPUs")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object last, and no table")] = False,
) -> None:
    """Carry out one federation: summaries, plans, smaller models, adapter rounds, personal models."""
    from experiments.preflight import absolute_paths, check

    options = _options(config, set)
    if out is not None:
        options["out"] = str(out)
    if not options.get("out"):
        options["out"] = f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}"
    resolved = absolute_paths(RunConfig.from_flat({"devices.count": DEFAULT_DEVICES, **options}))
    check(resolved)
    _carry_out(resolved, engine, workers or os.cpu_count() or 1)
    folder = Path(resolved.out)
    summary = json.loads((folder / "summary.json").read_text())
    if as_json:
        devices = summary.pop("devices")
        print(json.dumps({"run": str(folder), "devices": len(devices), **summary}))
        return
    from experiments.table import show

    console = Console(width=None if sys.stdout.isatty() else 140)
    show(summary, console)
    console.print(f"the run's folder: {folder}", highlight=False, soft_wrap=True)


def _options(config: Path | None, assignments: list[str] | None) -> dict[str, Any]:
    return (read_toml(config) if config else {}) | dict(parse_assignment(text) for text in assignments or [])


@app.command()
def options() -> None:
    """List every option of a run with its default; the same names go in --set, in TOML and in flwr's --run-config."""
    table = Table("option", "default", "meaning")
    defaults = RunConfig().flat()
    for name, value in defaults.items():
        table.add_row(name, str(value) or "(empty)", _describe(name))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@app.command()
def sweep(
    config: Annotated[Path, typer.Option(help="TOML with a table [grid] of lists, and the options all runs share")],
    out: Annotated[Path, typer.Option(help="folder of the runs; finished ones in it are not run again")],
    engine: Annotated[Engine, typer.Option(help="what each run uses")] = Engine.INPROCESS,
    jobs: Annotated[int, typer.Option(min=0, help="runs at a time; 0: as many as there are CPUs")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a row")] = False,
) -> None:
    """Carry out a grid of federations and tabulate them: mean ± standard deviation over seeds."""
    from experiments.sweep import means_over_seeds, read_sweep, run_sweep, write_results
    from strategies.progress import stage

    cells = read_sweep(config)
    with stage("runs", len(cells)) as advance:
        failures = run_sweep(cells, out, engine, jobs or os.cpu_count() or 1, lambda done, _, note: advance(done, note))
    path = write_results(cells, out)
    _show_rows(means_over_seeds(cells, out), as_json)
    print(f"a line a run: {path}", file=sys.stderr)
    if failures:
        said = "\n".join(f"  {name}: {error}" for name, error in failures.items())
        raise RunError(f"{len(failures)} of {len(cells)} runs failed; their logs lie in {out}\n{said}")


@app.command()
def prune(
    budget: Annotated[float, typer.Option(help="share of the dense model's MACs, in (0, 1]")],
    out: Annotated[Path, typer.Option(help="the smaller model's folder; must not exist")],
    criterion: Annotated[str, typer.Option(help="what decides which units stay; `tapfl criteria` lists them")] = "tap",
    compensation: Annotated[str, typer.Option(help="none, one-pass or sequential")] = "none",
    config: Annotated[Path | None, typer.Option(help="options as TOML, one table a section")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="key=value, after and above --config")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object last, and no table")] = False,
) -> None:
    """Prune one backbone for the images of data.source; without any federation."""
    from experiments.preflight import absolute_paths
    from experiments.prune import prune as carry_out

    options = _options(config, set) | {"pruning.criterion": criterion}
    carry_out(absolute_paths(RunConfig.from_flat(options)), budget, compensation, out)
    inspect(out, None, as_json)


@app.command()
def criteria() -> None:
    """List the pruning criteria, those of installed packages included."""
    from tapfl.pruning.criteria.registry import criterion_names

    print("\n".join(criterion_names()))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="folder of a pruned model: plan.json and model.safetensors")],
    picture: Annotated[Path | None, typer.Option(help="PNG of kept widths and layer importance")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object last, and no table")] = False,
) -> None:
    """Show a pruned model: kept widths, layer importance, cost and latency before and after."""
    from experiments.prune import inspect as look
    from experiments.prune import picture as draw

    found = look(folder)
    if picture:
        draw(found, picture)
    if as_json:
        print(json.dumps({"folder": str(folder), **found}))
        return
    table = Table("layer", "kind", "units", "kept", "share", "importance (KL)")
    for layer in found["layers"]:
        importance = "" if layer["importance"] is None else f"{layer['importance']:.3g}"
        share = f"{layer['kept'] / layer['units']:.0%}"
        table.add_row(layer["name"], layer["kind"], str(layer["units"]), str(layer["kept"]), share, importance)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    costs = (("macs", "M MACs", 1e6), ("params", "k parameters", 1e3), ("latency_ms", "ms an image", 1.0))
    for name, unit, scale in costs:
        dense, small = found[f"{name}_dense"] / scale, found[name] / scale
        console.print(f"{small:10.4g} of {dense:.4g} {unit} ({small / dense:.1%})", highlight=False)


@app.command()
def compare(
    config: Annotated[Path, typer.Option(help="TOML with a table [compare] of lists, and the options of all cells")],
    out: Annotated[Path, typer.Option(help="folder of results.csv and table.md; finished cells are not run again")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a row")] = False,
) -> None:
    """Compare pruning criteria one-shot: criteria × budgets × compensation × metric sets × devices × seeds."""
    from experiments.compare import markdown, read_comparison, run_comparison, table
    from strategies.progress import stage
    from tapfl.store import write_bytes

    comparison = read_comparison(config)
    with stage("cells", len(list(comparison.cells()))) as advance:
        rows = run_comparison(comparison, out, lambda done, _, note: advance(done, note))
    shown = table(rows)
    write_bytes(out / "table.md", markdown(shown).encode())
    _show_rows(shown, as_json)


bench = typer.Typer(help="Measure speed, as ratios side by side in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("scoring")
def bench_scoring(
    model: Annotated[list[str], typer.Option(help="timm names")] = ["deit_tiny_patch16_224"],  # noqa: B006
    size: Annotated[list[int], typer.Option(help="image sizes")] = [64],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a row")] = False,
) -> None:
    """Composite neuron importance against the per-channel loop and the arithmetic floor; one thread, batch 64."""
    from experiments.bench.scoring import bench_scoring as measure

    rows = [measure(name, pixels, repeats).row() for name in model for pixels in size]
    _show_rows(rows, as_json)


@bench.command("layers")
def bench_layers(
    model: Annotated[list[str], typer.Option(help="timm names")] = ["deit_tiny_patch16_224"],  # noqa: B006
    size: Annotated[list[int], typer.Option(help="image sizes")] = [64],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a row")] = False,
) -> None:
    """Layer importance with cached prefixes against two whole forward passes a probe; one thread, batch 64."""
    from experiments.bench.layers import bench_layers as measure

    _show_rows([measure(name, pixels, repeats) for name in model for pixels in size], as_json)


def _show_rows(rows: Sequence[Mapping[str, str]], as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _describe(name: str) -> str:
    section, _, option = name.rpartition(".")
    model = type(getattr(RunConfig(), section)) if section else RunConfig
    field = model.model_fields[option.replace("-", "_")]
    choices = getattr(field.annotation, "__args__", ())
    return field.description or (" | ".join(map(str, choices)) if choices else "")


def _carry_out(config: RunConfig, engine: Engine, workers: int) -> None:
    """Runs the federation; whatever ends it early is reported as a RunError that names the folder left behind."""
    if engine is Engine.INPROCESS:
        from clients.client_app import app as client_app
        from experiments.engines.inprocess import run_inprocess
        from strategies.server_app import app as server_app

        run_inprocess(server_app, client_app, config.flat(), config.devices.count)
    else:
        from experiments.engines.flower import run_flower

        try:
            run_flower(config.flat(), config.devices.count, workers)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or the SIGTERM that Ray turns into an exit
            print(f"tapfl: interrupted; what there is lies in {config.out}", file=sys.stderr, flush=True)
            os._exit(130)  # Ray is stopped, but Flower runs the server in a thread that nothing else would end
    if not (Path(config.out) / "summary.json").is_file():
        raise RunError(f"the run ended without a result; what there is lies in {config.out}")


def main() -> NoReturn:
    """Entry point: every TapflError becomes one line on standard error and an exit code."""
    try:
        app()
    except RunError as error:
        _fail(error, 1)
    except TapflError as error:
        _fail(error, 2)
    sys.exit(0)


def _fail(error: TapflError, code: int) -> NoReturn:
    print(f"tapfl: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
