"""The commands that need no federation: prune, inspect, compare, criteria."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from experiments.terminal import console, options_of, show_rows
from tapfl.config import RunConfig

app = typer.Typer()


@app.command()
def prune(
    budget: Annotated[str, typer.Option(help="share of the MACs, or limits: macs<=0.5,params<=8e6,latency<=5ms")],
    out: Annotated[Path, typer.Option(help="the smaller model's folder; must not exist")],
    criterion: Annotated[str | None, typer.Option(help="short for --set pruning.criterion=...")] = None,
    compensation: Annotated[str | None, typer.Option(help="short for --set pruning.compensation=...")] = None,
    recovery: Annotated[str | None, typer.Option(help="short for --set pruning.recovery=...")] = None,
    config: Annotated[Path | None, typer.Option(help="options as TOML, one table a section")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="key=value, after and above --config")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object last, and no table")] = False,
) -> None:
    """Prune one backbone for the images of data.source; without any federation."""
    from experiments.preflight import absolute_paths
    from experiments.prune import prune as carry_out

    short = {"criterion": criterion, "compensation": compensation, "recovery": recovery}
    options = options_of(config, set) | {f"pruning.{name}": value for name, value in short.items() if value is not None}
    carry_out(absolute_paths(RunConfig.from_flat(options)), budget, out)
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
    screen = console()
    screen.print(table)
    costs = (("macs", "M MACs", 1e6), ("params", "k parameters", 1e3), ("latency_ms", "ms an image", 1.0))
    for name, unit, scale in costs:
        dense, small = found[f"{name}_dense"] / scale, found[name] / scale
        screen.print(f"{small:10.4g} of {dense:.4g} {unit} ({small / dense:.1%})", highlight=False)


@app.command()
def compare(
    config: Annotated[Path, typer.Option(help="TOML with a table [compare] of lists, and the options of all cells")],
    out: Annotated[Path, typer.Option(help="folder of results, table and picture; finished cells are not run again")],
    jobs: Annotated[int, typer.Option(min=0, help="devices at a time; 0: as many as there are CPUs")] = 0,
    measure: Annotated[str, typer.Option(help="what the table and the picture show")] = "pruned_own",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a row")] = False,
) -> None:
    """Compare pruning criteria: criteria × budgets × any option × devices × seeds, under one harness."""
    from experiments.compare.grid import read_comparison
    from experiments.compare.picture import picture
    from experiments.compare.run import run_comparison
    from experiments.compare.table import markdown, table
    from strategies.progress import stage
    from tapfl.store import write_bytes

    comparison = read_comparison(config)
    with stage("cells", len(list(comparison.cells()))) as advance:
        rows = run_comparison(comparison, out, lambda done, _, note: advance(done, note), jobs or os.cpu_count() or 1)
    shown = table(rows, comparison, measure)
    write_bytes(out / "table.md", markdown(shown).encode())
    picture(rows, comparison, out / "accuracy-against-macs.png", measure)
    show_rows(shown, as_json)
    print(f"a line a cell: {out / 'results.csv'}; also table.md and accuracy-against-macs.png", file=sys.stderr)
