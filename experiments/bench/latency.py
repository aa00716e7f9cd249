"""Latency of pruned models in torch and onnxruntime: at given shares of the MACs, and of the devices of a run.

The speed of a model depends only on its shapes, so random weights and random units are sufficient. All models take
turns on one thread, and times are CPU times of this thread (`tapfl.models.cost`). Adapters are left out, because they
cost nothing once they are merged into the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from clients.storage import DeviceStorage
from experiments.bench.local_training import IMAGENET, model_of, specs
from experiments.bench.timing import Models, Repeats, Row, Sizes
from experiments.command_line import JsonRows
from experiments.output import as_csv, caption, command, installed, show_written
from experiments.sweep.results import write_table
from tapfl.config import PruningOptions
from tapfl.errors import ConfigError
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.cost import median_ms, timed_ms
from tapfl.models.forward import example_input
from tapfl.models.merging import Schedule
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import Shape
from tapfl.options import validated
from tapfl.pruning.export import export, load_exported
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.pruning.plan import PruningPlan, load_plan
from tapfl.pruning.surgery import WEIGHTS_FILE, load_pruned
from tapfl.run_folder import RunFolder
from tapfl.store import pack_tensors, write_bytes

ENGINES = ("torch", "onnxruntime")


def latency(
    model: Models = ["deit_small_patch16_224"],
    size: Sizes = [224],
    share: Annotated[list[float], typer.Option(help="shares of the MACs")] = [0.75, 0.5, 0.25],
    batch: Annotated[list[int], typer.Option(min=1, help="batch sizes")] = [1, 8],
    align: Annotated[int, typer.Option(min=1, help="widths are multiples of this")] = 8,
    unit_shape: Annotated[list[str], typer.Option(help="as pruning.unit-shape")] = ["head-dims", "heads"],
    token_share: Annotated[
        list[float], typer.Option(help="as pruning.token-share; the widths are cut further until --share is reached")
    ] = [],
    repeats: Repeats = 11,
) -> Iterator[Row]:
    """Latency of dense and pruned models in torch and onnxruntime, and the ratio of their MACs; one thread.

    All layers are pruned to the same share. The ratio of the MACs is the best possible speed-up if all operations cost
    the same.
    """
    base = {"criterion": "random", "ratio": "uniform", "align": align}
    tokens: list[dict[str, Any]] = [{}, *({"tokens": "merge", "token_share": kept} for kept in token_share)]
    ways = [validated(PruningOptions, {**base, "unit_shape": shape, **kept}) for shape in unit_shape for kept in tokens]
    cuts = [(1.0, PruningOptions(**base)), *((macs, options) for macs in share for options in ways)]
    torch.set_num_threads(1)
    for name, spec in specs(model, size, IMAGENET):
        yield from ({"model": name} | row for row in _latency(spec, cuts, batch, repeats))


def _latency(
    spec: BackboneSpec, cuts: Sequence[tuple[float, PruningOptions]], batches: Sequence[int], repeats: int
) -> Iterator[Row]:
    """Yields a row for each (share of the MACs, options) in `cuts`; the first is the dense model."""
    dense = model_of(spec)
    inputs = example_input(dense, 1)
    macs: list[float] = []
    runs: dict[tuple[str, int, int], Callable[[], object]] = {}
    for i, (share, options) in enumerate(cuts):
        pruned = prune_model(pruning_task(dense, inputs, share, options, batch=1), spec)
        pruned.model.requires_grad_(False)  # as a loaded model; with gradients torch uses another attention kernel
        macs.append(pruned.plan.cost.macs / pruned.plan.dense.macs)
        session = _onnx(pruned.model, pruned.plan)
        for batch in batches:
            images = torch.randn(example_input(dense, batch).shape)
            runs["torch", batch, i] = partial(pruned.model, images)
            runs["onnxruntime", batch, i] = partial(session, images)
    milliseconds = dict(zip(runs, median_ms(list(runs.values()), repeats), strict=True))
    for i, (achieved, (_, options)) in enumerate(zip(macs, cuts, strict=True)):
        row = {"MACs": f"{achieved:.1%}", "MACs ratio": f"{1 / achieved:.2f}"}
        row["unit shape"] = options.unit_shape if achieved < 1 else "dense"
        if any(cut.tokens == "merge" for _, cut in cuts):
            row["tokens"] = f"{options.token_share:.0%}" if options.tokens == "merge" else ""
        for engine in ENGINES:
            for batch in batches:
                now = milliseconds[engine, batch, i]
                row[f"{engine} ×{batch}"] = f"{milliseconds[engine, batch, 0] / now:.2f}, {now:.1f} ms"
        yield row


def gain(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    device: Annotated[list[int], typer.Option(min=0, help="devices whose models to measure; default: all")] = [],
    repeats: Repeats = 51,
    out: Annotated[Path | None, typer.Option(help="folder for gain.csv and gain.md")] = None,
    as_json: JsonRows = False,
) -> list[dict[str, Any]]:
    """Gain of a run's devices: parameters, file, MACs, and latency in torch and onnxruntime; one image, one thread.

    Devices whose models have the same shapes share a row. All are compared with the dense model in the first row.
    """
    measured = measure_gain(run, repeats, device)
    numbers, shown = [model.numbers(measured[0]) for model in measured], [model.row(measured[0]) for model in measured]
    if out is not None:
        options = RunFolder(run).config()
        about = [
            f"{options['model.name']} {options['model.args']}".strip(),
            f"one image, one thread, median (quartiles) of {repeats} turns; × is the median of the turns' ratios",
        ]
        versions = installed(("tapfl", "torch", "timm", "onnxruntime"))
        made_by = command("bench", "gain", "RUN", "--repeats", str(repeats))
        write_bytes(out / "gain.csv", as_csv(numbers, list(numbers[0])))
        write_table(shown, caption(made_by, [options["seed"]], versions, about), out / "gain.md")
        show_written(out, "gain.csv", "gain.md")
    return numbers if as_json else shown


@dataclass(frozen=True)
class Measured:
    """One model: its costs, and its milliseconds per image in each turn, by engine.

    Attributes:
        devices: the devices with a model of these shapes; empty: the dense model.
        budget: budget of the first of these devices.
    """

    devices: tuple[int, ...]
    budget: str
    macs: int
    params: int
    file_bytes: int
    milliseconds: Mapping[str, np.ndarray]

    def numbers(self, dense: Measured) -> dict[str, Any]:
        """Returns a line of the CSV: the model's numbers, and its shares and speed-ups relative to the dense model.

        The speed-up is the median over turns of the ratio of the two models' times in the same turn.
        """
        row: dict[str, Any] = {
            "devices": " ".join(map(str, self.devices)) or "dense",
            "budget": self.budget,
            "macs": self.macs,
            "macs_share": self.macs / dense.macs,
            "params": self.params,
            "params_share": self.params / dense.params,
            "file_bytes": self.file_bytes,
            "file_share": self.file_bytes / dense.file_bytes,
        }
        for engine, times in self.milliseconds.items():
            low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
            row |= {f"{engine}_ms": median, f"{engine}_ms_q1": low, f"{engine}_ms_q3": high}
            row[f"{engine}_speed_up"] = float(np.median(dense.milliseconds[engine] / times))
        return row

    def row(self, dense: Measured) -> Row:
        """Returns the numbers as text for a table; times are median (quartiles)."""
        n = self.numbers(dense)
        row = {
            "devices": str(n["devices"]),
            "budget": self.budget,
            "MACs": f"{self.macs / 1e6:.4g}M {n['macs_share']:.1%}",
            "parameters": f"{self.params / 1e6:.3g}M {n['params_share']:.1%}",
            "file": f"{self.file_bytes / 1e6:.3g} MB {n['file_share']:.1%}",
        }
        for engine in self.milliseconds:
            times = f"{n[f'{engine}_ms']:.3g} ({n[f'{engine}_ms_q1']:.3g}–{n[f'{engine}_ms_q3']:.3g}) ms"
            row[engine] = times + (f", {n[f'{engine}_speed_up']:.2f} ×" if self.devices else "")
        return row


def measure_gain(run: Path, repeats: int, devices: Sequence[int] = ()) -> list[Measured]:
    """Measures the dense model, and one model for each combination of shapes among the run's devices.

    Args:
        repeats: turns of every model.
        devices: the devices to measure; empty: all.

    Raises:
        ConfigError: if the folder is not a run's, or has no models of these devices.
        PlanError: if a model is damaged.
    """
    torch.set_num_threads(1)
    plans = _plans(run, devices)
    first = next(iter(plans.values()))
    dense = build(first.backbone).requires_grad_(False)
    layers = prunable_layers(dense)
    alike: dict[tuple[tuple[Shape, ...], Schedule], list[int]] = {}
    for device, plan in plans.items():
        shapes = tuple(layer.shape_of(part.index()) for layer, part in zip(layers, plan.layers, strict=True))
        alike.setdefault((shapes, plan.tokens), []).append(device)
    models: list[tuple[nn.Module, PruningPlan]] = [(dense, _whole(first))]
    models += [(load_pruned(_pruned(run, group[0]), dense), plans[group[0]]) for group in alike.values()]
    calls: list[Callable[[], object]] = []
    for model, plan in models:
        image = example_input(model)
        calls += [partial(model, image), partial(_onnx(model, plan, batch=1), image)]
    times = iter(timed_ms(calls, repeats))
    measured = []
    for (model, plan), group in zip(models, ((), *alike.values()), strict=True):
        weights = _pruned(run, group[0]) / WEIGHTS_FILE if group else None
        measured.append(
            Measured(
                devices=tuple(group),
                budget=str(plan.provenance.get("budget", "")) if group else "",
                macs=plan.cost.macs,
                params=plan.cost.params,
                file_bytes=weights.stat().st_size if weights else len(pack_tensors(model.state_dict())),
                milliseconds={engine: next(times) for engine in ENGINES},
            )
        )
    return measured


def _plans(run: Path, devices: Sequence[int]) -> dict[int, PruningPlan]:
    if not (run / "config.json").is_file():
        raise ConfigError(f"RUN {run}: is not a run's folder (there is no config.json)")
    options = RunFolder(run).config().keys()
    names = {path.parent.name for path in run.glob("devices/*/pruned")}
    available = sorted(int(name) for name in names if re.fullmatch(r"[0-9]{2,18}", name))
    if not available:
        raise ConfigError(f"RUN {run}: has no models of devices; they are in devices/NN/pruned where the devices ran")
    if lacking := {"model.name", "model.args", "seed"} - options:
        raise ConfigError(f"RUN {run}: is not a run's folder (its config.json lacks {min(lacking)})")
    if absent := [device for device in devices if device not in available]:
        raise ConfigError(f"--device {absent[0]}: accepted: {', '.join(map(str, available))}")
    return {device: load_plan(_pruned(run, device))[0] for device in devices or available}


def _pruned(run: Path, device: int) -> Path:
    return DeviceStorage(RunFolder(run).device(device)).pruned


def _whole(plan: PruningPlan) -> PruningPlan:
    """Returns the same plan with all units and tokens kept."""
    layers = tuple(layer.model_copy(update={"kept": tuple(range(layer.units))}) for layer in plan.layers)
    return plan.model_copy(update={"layers": layers, "cost": plan.dense, "tokens": ()})


def _onnx(model: nn.Module, plan: PruningPlan, batch: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export(model, plan, file, "onnx", batch=batch)
        return load_exported(file, "onnx")
