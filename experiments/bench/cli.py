"""`tapfl bench`: one command a measurement."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.terminal import show_rows

app = typer.Typer(help="Measure speed, as ratios side by side in one run.", no_args_is_help=True)


@app.command("scoring")
def bench_scoring(
    model: Annotated[list[str], typer.Option(help="timm names")] = ["deit_tiny_patch16_224"],  # noqa: B006
    size: Annotated[list[int], typer.Option(help="image sizes")] = [64],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a row")] = False,
) -> None:
    """Composite neuron importance against the per-channel loop and the arithmetic floor; one thread, batch 64."""
    from experiments.bench.scoring import bench_scoring as measure

    rows = [measure(name, pixels, repeats).row() for name in model for pixels in size]
    show_rows(rows, as_json)


@app.command("layers")
def bench_layers(
    model: Annotated[list[str], typer.Option(help="timm names")] = ["deit_tiny_patch16_224"],  # noqa: B006
    size: Annotated[list[int], typer.Option(help="image sizes")] = [64],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a row")] = False,
) -> None:
    """Layer importance with cached prefixes against two whole forward passes a probe; one thread, batch 64."""
    from experiments.bench.layers import bench_layers as measure

    show_rows([measure(name, pixels, repeats) for name in model for pixels in size], as_json)
