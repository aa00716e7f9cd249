"""The commands that need no federation: prune, criteria, inspect, export, compare."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from experiments.command_line import Config, JsonObject, JsonRows, Set, load_torch, option_groups, options_of
from experiments.output import command, flags, show_line, show_rows, show_written
from tapfl.errors import ConfigError

PRUNED = "pruned model: a folder with plan.json and model.safetensors, or devices/NN of a run"
BACKBONE = {"model.name", "model.args"}  # options that determine the backbone
OF_PRUNING = ("pruning.", "metric.")  # options that a plan leaves nothing to decide

app = typer.Typer()


@dataclass(frozen=True)
class PruningShorthands:
    """Short names of three options of `[pruning]`."""

    criterion: Annotated[str | None, typer.Option(help="short for --set pruning.criterion=...")] = None
    compensation: Annotated[str | None, typer.Option(help="short for --set pruning.compensation=...")] = None
    recovery: Annotated[str | None, typer.Option(help="short for --set pruning.recovery=...")] = None


@app.command()
@option_groups
def prune(
    *,
    out: Annotated[Path, typer.Option(help="folder of the pruned model; must not exist")],
    budget: Annotated[
        str | None, typer.Option(help="share of the MACs, or limits: macs<=0.5,params<=8e6,latency<=5ms")
    ] = None,
    shorthands: PruningShorthands,
    plan: Annotated[
        Path | None, typer.Option(help="existing plan to apply to model.weights: a pruned model's folder, or JSON file")
    ] = None,
    config: Config = None,
    set: Set = None,
    as_json: JsonObject = False,
) -> None:
    """Prune a backbone for the images of data.source, or apply an existing plan to other weights."""
    if (plan is None) == (budget is None):
        raise ConfigError("--budget, --plan: give exactly one of the two")
    from experiments.preflight import absolute_paths
    from strategies.progress import shown
    from tapfl.config import RunConfig
    from tapfl.pruning.budget import Budget
    from tapfl.pruning.criteria.registry import require_criterion

    short = {f"pruning.{name}": value for name, value in vars(shorthands).items() if value is not None}
    typed = options_of(None, set) | short
    if plan is not None and (unused := [name for name in typed if name.startswith(OF_PRUNING)]):
        given = ", ".join(f"{name} = {typed[name]!r}" for name in unused)
        raise ConfigError(f"{given}: not with --plan, which selects no units and trains nothing; omit it")
    options = options_of(config, set) | short
    checked = absolute_paths(RunConfig.from_flat(options))
    limits = None if budget is None else Budget.parse(budget)
    require_criterion(checked.pruning.criterion)
    load_torch()  # only after the options have been checked
    from experiments import pruning

    with shown():
        if limits is not None:
            pruning.prune(checked, limits, out)
        elif plan is not None:
            for warning in pruning.reapply(plan, checked.model, bool(BACKBONE & options.keys()), out):
                print(f"tapfl: {warning}", file=sys.stderr)
    _inspect_pruned(out, None, as_json)


@app.command()
def criteria(*, as_json: JsonRows = False) -> None:
    """List the pruning criteria, including those of installed packages."""
    from tapfl.pruning.criteria.registry import criterion_names, criterion_of

    load_torch()  # which the modules of the criteria import
    rows = [{"criterion": name, "about": criterion_of(name).about} for name in criterion_names()]
    if as_json:
        show_rows(rows, as_json=True)
        return
    width = max(len(row["criterion"]) for row in rows)
    for row in rows:
        print(f"{row['criterion']:<{width}}  {row['about']}".rstrip())


@app.command()
def inspect(
    folder: Annotated[Path | None, typer.Argument(help=PRUNED)] = None,
    picture: Annotated[
        Path | None, typer.Option(help="file for a picture of kept widths, importance and costs; .svg, else PNG")
    ] = None,
    uplink: Annotated[
        bool, typer.Option("--uplink", help="list everything that leaves a device; if FOLDER is a run, also its bytes")
    ] = False,
    as_json: JsonObject = False,
) -> None:
    """Show a pruned model's widths, layer importance, cost, latency and origin; or everything that leaves a device."""
    if uplink and picture:
        raise ConfigError(f"--picture {picture}: shows a pruned model; it cannot be combined with --uplink")
    if uplink:
        _inspect_uplink(folder, as_json)
    elif folder is None:
        raise ConfigError("inspect: give a pruned model's folder, or --uplink to list everything that leaves a device")
    else:
        _inspect_pruned(folder, picture, as_json)


def _inspect_uplink(run: Path | None, as_json: bool) -> None:
    from experiments.uplink import uplink
    from strategies.records import read_summary

    rows = uplink()
    sent = [{"device": device.device, **device.bytes_up} for device in read_summary(run).devices] if run else []
    if as_json:
        print(json.dumps({"uplink": rows} | ({"sent": sent} if run else {})))
        return
    show_rows(rows, as_json=False)
    print("If a device fails, Flower also sends the class and the text of the error.")
    if run:
        kinds = list(dict.fromkeys(kind for row in sent for kind in row))
        print("bytes sent by each device, by kind")
        show_rows([{kind: row.get(kind, 0) for kind in kinds} for row in sent], as_json=False)


def _inspect_pruned(folder: Path, picture: Path | None, as_json: bool) -> None:
    load_torch()
    from experiments import pruning
    from experiments.picture import picture as draw
    from strategies.progress import shown

    with shown():
        found = pruning.inspect(folder)
    if picture:
        draw(found, picture)
    if as_json:
        print(json.dumps(found))
        return
    layers = [
        {
            "layer": layer["name"],
            "kind": layer["kind"],
            "dense": layer["width_dense"],
            "kept": layer["width"],
            "share": f"{layer['kept'] / layer['units']:.0%}",
            "importance (KL)": "" if layer["importance"] is None else f"{layer['importance']:.3g}",
        }
        | ({"tokens": f"{layer['tokens']} of {layer['tokens_dense']}"} if found["merges"] else {})
        for layer in found["layers"]
    ]
    show_rows(layers, as_json=False)
    spent = pruning.costs(found)
    show_rows([{"cost": n, "dense": d, "pruned": p, "share": f"{s:.1%}"} for n, d, p, s in spent], as_json=False)
    origin = {"backbone": found["backbone"], **found["provenance"]}
    show_line(", ".join(f"{key} = {value}" for key, value in origin.items()))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help=PRUNED)],
    out: Annotated[Path, typer.Option(help="file to write; must not exist")],
    format: Annotated[str, typer.Option(help="onnx, torch-export or torchscript")] = "onnx",
    batch: Annotated[str, typer.Option(help="images per pass: a number, or dynamic")] = "dynamic",
    opset: Annotated[int | None, typer.Option(help="ONNX operator set; default: the exporter's")] = None,
    personal: Annotated[
        bool, typer.Option("--personal", help="with devices/NN of a run: the device's personal model")
    ] = False,
    as_json: JsonObject = False,
) -> None:
    """Export a pruned model for other runtimes. The file is read back, and removed if its outputs are different."""
    if batch != "dynamic" and not batch.isdecimal():
        raise ConfigError(f"--batch {batch}: accepted: dynamic, or a number of images")
    load_torch()
    from experiments.pruning import export_folder
    from strategies.progress import shown
    from tapfl.progress import stage

    with shown(), stage(f"export as {format}"):
        written = export_folder(folder, out, format, None if batch == "dynamic" else int(batch), opset, personal)
    if as_json:
        print(json.dumps(written))
        return
    row = {
        "format": written["format"],
        "bytes": f"{written['bytes']:,}",
        "largest difference": f"{written['max_abs_difference']:.2g}",
        "top-1 equal": "yes" if written["top1_equal"] else "no",
        "ms per pass": f"{written['latency_ms']:.3g}",
        "ms in torch": f"{written['latency_ms_torch']:.3g}",
    }
    show_rows([row], as_json=False)
    show_line(written["file"])


@app.command()
def compare(
    config: Annotated[
        Path, typer.Option(help="TOML file with a table \\[compare] of lists, and the options of all cells")
    ],
    out: Annotated[Path, typer.Option(help="folder of results, table and figure; finished cells are not repeated")],
    jobs: Annotated[int, typer.Option(min=0, help="devices at a time; 0: one per CPU")] = 0,
    measure: Annotated[
        list[str] | None, typer.Option(help="measure shown in a table; can be repeated; overrides results.show")
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="axis=value: add differences to the line with this value; overrides results.reference"),
    ] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="key=value; overrides the options of --config")] = None,
    finished: Annotated[bool, typer.Option("--finished", help="tabulate the finished cells; compute nothing")] = False,
    as_json: JsonRows = False,
) -> None:
    """Compare pruning criteria over budgets, options, devices and seeds, on the same metric sets and test images."""
    from experiments.compare.grid import read_comparison

    comparison = read_comparison(config, set or [])
    results = comparison.results.override(measure, reference)
    results.check(comparison.axes)
    load_torch()  # only after the file has been checked
    import pandas as pd

    from experiments.compare.folder import read_origin
    from experiments.compare.picture import accuracy_against_macs
    from experiments.compare.run import finished_rows, run_comparison
    from experiments.compare.tables import page, sections
    from experiments.figures.figure import write_figure
    from experiments.jobs.pool import interruptible
    from strategies.progress import shown
    from tapfl.progress import stage
    from tapfl.run_folder import only_one
    from tapfl.store import write_bytes

    if finished:
        rows = finished_rows(comparison, out)
    else:
        with interruptible(), only_one(out, "comparison"), shown(), stage("cells") as advance:
            rows = run_comparison(comparison, out, advance, jobs or os.cpu_count() or 1)
    rows, origin = pd.DataFrame(rows), read_origin(out)
    assert origin is not None  # written before the first cell
    tables = list(sections(rows, comparison, results))
    made_by = command("compare", "--config", str(config), "--out", "DIR", *flags(set=set, reference=reference))
    write_bytes(out / "table.md", page(tables, rows, comparison, origin, results, made_by).encode())
    written = ["results.csv", "table.md"]
    if figure := accuracy_against_macs(rows, comparison, results.show[0]):
        write_figure(figure, out / f"{figure.name}.png")
        written.append(f"{figure.name}.png")
    for table in tables:
        if as_json:
            show_rows([{"measure": table.measure, "devices": table.devices, **row} for row in table.rows], as_json=True)
            continue
        show_line(f"{table.measure}, {table.devices}")
        show_rows(table.rows, as_json=False)
    show_written(out, *written)
