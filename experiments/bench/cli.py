"""`tapfl bench`: one command a measurement."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from experiments.command_line import options_of
from experiments.output import show_rows
from tapfl.errors import ConfigError
from tapfl.store import RunFolder

app = typer.Typer(no_args_is_help=True)

Models = Annotated[list[str], typer.Option("--model", help="timm names")]
Sizes = Annotated[list[int], typer.Option("--size", help="image sizes, pixels a side")]
Repeats = Annotated[int, typer.Option(min=1, help="turns; the median counts")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object a row")]


@app.callback()
def _bench(context: typer.Context) -> None:
    """Measure speed, as ratios side by side in one run."""
    from strategies.progress import shown
    from tapfl.progress import stage

    context.with_resource(shown(bars=False))  # a line now and then disturbs no measurement
    context.with_resource(stage(f"bench {context.invoked_subcommand}"))


@app.command("scoring")
def bench_scoring(
    model: Models = ["deit_tiny_patch16_224"],  # noqa: B006
    size: Sizes = [64],  # noqa: B006
    repeats: Repeats = 3,
    chunk: Annotated[int, typer.Option(min=1, help="channels at once, as pruning.chunk")] = 128,
    every: Annotated[int, typer.Option(min=1, help="the loops take every n-th channel, scaled up by n")] = 16,
    as_json: Json = False,
) -> None:
    """Composite neuron importance against the per-channel loop and the arithmetic floor; one thread, batch 64."""
    from experiments.bench.scoring import bench_scoring as measure

    show_rows([measure(name, pixels, repeats, chunk, every).row() for name in model for pixels in size], as_json)


@app.command("layers")
def bench_layers(
    model: Models = ["deit_tiny_patch16_224"],  # noqa: B006
    size: Sizes = [64],  # noqa: B006
    repeats: Repeats = 3,
    as_json: Json = False,
) -> None:
    """Layer importance with all that probes share computed once, against two whole forward passes a probe."""
    from experiments.bench.layers import bench_layers as measure

    show_rows([measure(name, pixels, repeats) for name in model for pixels in size], as_json)


@app.command("devices")
def bench_devices(
    devices: Annotated[list[int], typer.Option(min=1, help="numbers of devices")] = [1, 10, 100],  # noqa: B006
    probe: Annotated[list[str], typer.Option(help="own or pool, as pruning.probe")] = ["own", "pool"],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Round zero on the server for many devices with one public pool: what a device costs."""
    from experiments.bench.devices import bench_devices as measure

    show_rows(measure(devices, probe), as_json)


@app.command("probe")
def bench_probe(
    seed: Annotated[list[int], typer.Option(help="seeds of runs")] = [0],  # noqa: B006
    devices: Annotated[int, typer.Option(min=1, help="devices of the digits run")] = 10,
    budget: Annotated[list[float], typer.Option(help="shares of the MACs")] = [0.3, 0.5, 0.7],  # noqa: B006
    tau: Annotated[list[float], typer.Option(help="temperatures, as pruning.tau")] = [5.82, 0.1],  # noqa: B006
    set: Annotated[list[str] | None, typer.Option("--set", help="key=value, further options of the runs")] = None,
    as_json: Json = False,
) -> None:
    """Layers probed on the pool once against for every device: ranks, kept units and accuracy on the digits devices."""
    from experiments.bench.probe import bench_probe as measure

    show_rows(measure(seed, devices, budget, tau, options_of(None, set)), as_json)


@app.command("latency")
def bench_latency(
    model: Models = ["deit_small_patch16_224"],  # noqa: B006
    size: Sizes = [224],  # noqa: B006
    share: Annotated[list[float], typer.Option(help="shares of the MACs")] = [0.75, 0.5, 0.25],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="images at once")] = [1, 8],  # noqa: B006
    align: Annotated[int, typer.Option(min=1, help="widths are multiples of this")] = 8,
    repeats: Repeats = 11,
    as_json: Json = False,
) -> None:
    """Latency of dense and shrunk models in torch and onnxruntime, beside the ratio of their MACs; one thread."""
    from experiments.bench.latency import bench_latency as measure

    rows = [row for name in model for pixels in size for row in measure(name, pixels, share, batch, repeats, align)]
    show_rows(rows, as_json)


@app.command("gain")
def bench_gain(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    device: Annotated[list[int] | None, typer.Option(min=0, help="whose models; all if none is named")] = None,
    repeats: Repeats = 51,
    out: Annotated[Path | None, typer.Option(help="folder for gain.csv and gain.md")] = None,
    as_json: Json = False,
) -> None:
    """What the devices of a run gained: parameters, file, MACs, and latency in torch and onnxruntime; one thread."""
    from experiments.bench.gain import bench_gain as measure
    from experiments.bench.gain import shown, write_gain
    from experiments.output import caption, command, installed

    measured = measure(run, repeats, device or ())
    if out is not None:
        options = RunFolder(run).config()
        about = [
            f"{options['model.name']} {options['model.args']}".strip(),
            f"one image, one thread, median (quartiles) of {repeats} turns; × is the median of the turns' ratios",
        ]
        versions = installed(("tapfl", "torch", "timm", "onnxruntime"))
        made_by = command("bench", "gain", "RUN", "--repeats", str(repeats))
        write_gain(measured, out, caption(made_by, [options["seed"]], versions, about))
        print(f"in {out}: gain.csv, gain.md", file=sys.stderr)
    numbers = [model.numbers(measured[0]) for model in measured]
    show_rows(numbers if as_json else shown(measured), as_json)


@app.command("noise")
def bench_noise(
    noise: Annotated[list[float], typer.Option(min=0, help="as summary.noise")] = [0, 0.05, 0.1, 0.2, 0.5, 1, 2],  # noqa: B006
    clip: Annotated[float, typer.Option(min=0, help="as summary.clip, in all rows")] = 11.0,
    seed: Annotated[list[int], typer.Option(help="seeds of runs")] = [0],  # noqa: B006
    devices: Annotated[int, typer.Option(min=1, help="devices of the digits run")] = 10,
    set: Annotated[list[str] | None, typer.Option("--set", help="key=value, further options of the runs")] = None,
    as_json: Json = False,
) -> None:
    """Noise on the mixture's moments: share of the metric set that is of the device's own classes, mean and worst."""
    from experiments.bench.noise import bench_noise as measure

    show_rows(measure(noise, clip, seed, devices, options_of(None, set)), as_json)


@app.command("search")
def bench_search(
    seeds: Annotated[int, typer.Option(min=1, help="searches a method")] = 20,
    first_seed: Annotated[int, typer.Option(min=0, help="the others follow")] = 0,
    rounds: Annotated[list[int], typer.Option(min=27, help="rounds spent in all")] = [200, 400, 800, 1600],  # noqa: B006
    method: Annotated[list[str] | None, typer.Option(help="of the table's first column; all if none is named")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="key=value, options of \\[search]")] = None,
    as_json: Json = False,
) -> None:
    """Methods of `tapfl search` on a toy of five parameters, with learning curves and noise: regret by rounds spent."""
    from experiments.bench.search import METHODS
    from experiments.bench.search import bench_search as measure
    from experiments.search.settings import SearchOptions
    from tapfl.config import validated
    from tapfl.errors import ConfigError

    if unknown := sorted({*(method or ())} - {*METHODS}):
        raise ConfigError(f"--method {unknown[0]}: must be one of {', '.join(METHODS)}")
    changes = options_of(None, set)
    validated(SearchOptions, changes)
    show_rows(list(measure(range(first_seed, first_seed + seeds), rounds, method or (), changes)), as_json)


@app.command("simulation")
def bench_simulation(
    devices: Annotated[list[int], typer.Option(min=1, help="numbers of devices")] = [20],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=2, help="rounds; the first counts as start-up")] = 5,
    repeats: Repeats = 3,
    samples: Annotated[int, typer.Option(min=10, help="training images a device")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="images a step")] = 32,
    model_args: Annotated[
        str, typer.Option(help="as model.args")
    ] = "img_size=32,patch_size=4,embed_dim=96,depth=6,num_heads=3",
    workers: Annotated[int, typer.Option(min=1, help="processes of one thread")] = 2,
    variant: Annotated[list[str] | None, typer.Option(help="besides the loop by hand; all if none is named")] = None,
    as_json: Json = False,
) -> None:
    """A round of FedAvg on Flower's engine against the bare loop that does its work, and the usual Flower app."""
    from experiments.bench.simulation import bench_simulation as measure

    rows = [
        row
        for count in devices
        for row in measure(count, rounds, repeats, samples, model_args, batch, workers, variant or ())
    ]
    show_rows(rows, as_json)


@app.command("engine")
def bench_engine(
    devices: Annotated[list[int], typer.Option(min=1, help="numbers of devices")] = [10, 200],  # noqa: B006
    work: Annotated[list[str], typer.Option(help="none, real")] = ["none", "real"],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=2, help="rounds; the first counts as start-up")] = 4,
    repeats: Repeats = 3,
    workers: Annotated[int, typer.Option(min=1, help="processes of one thread")] = 2,
    samples: Annotated[int, typer.Option(min=10, help="training images a device, with real work")] = 64,
    model_args: Annotated[
        str, typer.Option(help="as model.args")
    ] = "img_size=32,patch_size=4,embed_dim=96,depth=6,num_heads=3",
    variant: Annotated[list[str] | None, typer.Option(help="inprocess, flower, ray, ray warm; all if none")] = None,
    as_json: Json = False,
) -> None:
    """Flower's engine, Ray actors cold and warm, and one process: a round, the start, and the memory of each."""
    from experiments.bench.engine import WORKS
    from experiments.bench.engine import bench_engine as measure

    if unknown := [name for name in work if name not in WORKS]:
        raise ConfigError(f"--work {unknown[0]}: accepted: {', '.join(WORKS)}")
    rows = [
        row
        for kind in work
        for count in devices
        for row in measure(count, kind, rounds, repeats, workers, samples, model_args, variant or ())
    ]
    show_rows(rows, as_json)


@app.command("aggregate")
def bench_aggregate(
    devices: Annotated[list[int], typer.Option(min=1, help="numbers of devices")] = [10, 100],  # noqa: B006
    model: Annotated[str, typer.Option(help="timm name")] = "deit_small_patch16_224",
    repeats: Repeats = 3,
    robust_products: Annotated[bool, typer.Option(help="also medians and trimmed means of products, the slow ones")] = (
        True
    ),
    as_json: Json = False,
) -> None:
    """A round's aggregation on the server by every rule, with seconds and memory; flex also with both ways forced."""
    from experiments.bench.aggregate import bench_aggregate as measure
    from tapfl.models.backbone import BackboneSpec

    spec = BackboneSpec(name=model, args={}, num_classes=1000)
    show_rows([row for count in devices for row in measure(spec, count, repeats, robust_products)], as_json)


@app.command("apfl")
def bench_apfl(
    model: Annotated[list[str], typer.Option("--model", help="`digits`, or timm names")] = ["digits"],  # noqa: B006
    size: Sizes = [64],  # noqa: B006
    batch: Annotated[int, typer.Option(min=2, help="images a step")] = 16,
    rank: Annotated[int, typer.Option(min=1, help="of every adapter")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="steps a turn")] = 4,
    repeats: Repeats = 5,
    as_json: Json = False,
) -> None:
    """A step of APFL as a share of two steps of stock peft, beside deep copies and the floor; one thread, Adam."""
    from experiments.bench.apfl import bench_apfl as measure

    sizes = {name: size[:1] if name == "digits" else size for name in model}
    rows = [measure(name, pixels, batch, rank, steps, repeats) for name in model for pixels in sizes[name]]
    show_rows(rows, as_json)


@app.command("all")
def bench_all(
    config: Annotated[Path, typer.Option(help="what to measure, and the goals, as TOML")],
    out: Annotated[Path, typer.Option(help="folder of the rows; what is there is not measured again")],
) -> None:
    """Carry out all measurements of a file, and show every goal beside what was measured."""
    from experiments.bench.goals import measure_all

    print(measure_all(config, out))
