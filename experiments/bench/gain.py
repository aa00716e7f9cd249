"""What the devices of a finished run gained: parameters, file, MACs and latency of their models against the dense one.

How fast a model is depends on its shapes alone, so devices whose models have the same shapes share a row, and the dense
model is built anew, whatever its weights. All models take turns, one image at a time on one thread; times are the
thread's own (`tapfl.models.latency`). Adapters are not in it: merged into the weights they cost nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from clients.storage import DeviceStorage
from experiments.output import as_csv
from experiments.swept.table import write_table
from tapfl.errors import ConfigError
from tapfl.models.backbone import build
from tapfl.models.forward import example_input
from tapfl.models.latency import timed_ms
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import Shape
from tapfl.pruning.export import export, load_exported
from tapfl.pruning.plan import PruningPlan, load_plan
from tapfl.pruning.surgery import WEIGHTS_FILE, load_pruned
from tapfl.store import RunFolder, pack_tensors, write_bytes

ENGINES = ("torch", "onnxruntime")


@dataclass(frozen=True)
class Measured:
    """One model: what it costs, and its milliseconds an image in each turn, by engine.

    Attributes:
        devices: whose model it is; none: the dense one.
        budget: of the first of them.
    """

    devices: tuple[int, ...]
    budget: str
    macs: int
    params: int
    file_bytes: int
    milliseconds: Mapping[str, np.ndarray]

    def numbers(self, dense: Measured) -> dict[str, str | float]:
        """Returns a line of the CSV: what it is, and the shares and speed-ups against the dense model.

        The speed-up is the median over turns of the two models' ratio in the same turn.
        """
        row: dict[str, str | float] = {
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
            speed_up = float(np.median(dense.milliseconds[engine] / times))
            row |= {f"{engine}_ms": median, f"{engine}_ms_q1": low, f"{engine}_ms_q3": high}
            row[f"{engine}_speed_up"] = speed_up
        return row


def bench_gain(run: Path, repeats: int, devices: Sequence[int] = ()) -> list[Measured]:
    """Returns the dense model, and one model for each shape that devices of the run have, by the first of them.

    Args:
        repeats: turns of every model.
        devices: of which to look at the models; all, if none is named.

    Raises:
        ConfigError: if the folder is not that of a run, or holds no models of these devices.
        PlanError: if a model is damaged.
    """
    torch.set_num_threads(1)
    plans = _plans(run, devices)
    first = next(iter(plans.values()))
    dense = build(first.backbone).requires_grad_(False)
    layers = prunable_layers(dense)
    alike: dict[tuple[Shape, ...], list[int]] = {}
    for device, plan in plans.items():
        shapes = tuple(layer.shape_of(part.index()) for layer, part in zip(layers, plan.layers, strict=True))
        alike.setdefault(shapes, []).append(device)
    models: list[tuple[nn.Module, PruningPlan]] = [(dense, _whole(first))]
    models += [(load_pruned(_pruned(run, group[0]), dense), plans[group[0]]) for group in alike.values()]
    calls: list[Callable[[], object]] = []
    for model, plan in models:
        image = example_input(model)
        calls += [partial(model, image), partial(_onnx(model, plan), image)]
    times = iter(timed_ms(calls, repeats))
    made = []
    for (model, plan), group in zip(models, ((), *alike.values()), strict=True):
        weights = _pruned(run, group[0]) / WEIGHTS_FILE if group else None
        made.append(
            Measured(
                devices=tuple(group),
                budget=str(plan.provenance.get("budget", "")) if group else "",
                macs=plan.cost.macs,
                params=plan.cost.params,
                file_bytes=weights.stat().st_size if weights else len(pack_tensors(model.state_dict())),
                milliseconds={engine: next(times) for engine in ENGINES},
            )
        )
    return made


def _plans(run: Path, devices: Sequence[int]) -> dict[int, PruningPlan]:
    if not (run / "config.json").is_file():
        raise ConfigError(f"RUN {run}: is not a run's folder (there is no config.json)")
    options = RunFolder(run).config().keys()
    names = {path.parent.name for path in run.glob("devices/*/pruned")}
    there = sorted(int(name) for name in names if re.fullmatch(r"[0-9]{2,18}", name))
    if not there:
        raise ConfigError(f"RUN {run}: holds no models of devices; they lie in devices/NN/pruned where these ran")
    if lacking := {"model.name", "model.args", "seed"} - options:
        raise ConfigError(f"RUN {run}: is not a run's folder (its config.json lacks {min(lacking)})")
    if absent := [device for device in devices if device not in there]:
        raise ConfigError(f"--device {absent[0]}: accepted are {', '.join(map(str, there))}")
    return {device: load_plan(_pruned(run, device))[0] for device in devices or there}


def _pruned(run: Path, device: int) -> Path:
    return DeviceStorage(RunFolder(run).device(device)).pruned


def _whole(plan: PruningPlan) -> PruningPlan:
    """Returns the plan that keeps everything."""
    layers = tuple(layer.model_copy(update={"kept": tuple(range(layer.units))}) for layer in plan.layers)
    return plan.model_copy(update={"layers": layers, "cost": plan.dense})


def _onnx(model: nn.Module, plan: PruningPlan) -> Callable[[torch.Tensor], torch.Tensor]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export(model, plan, file, "onnx", batch=1)
        return load_exported(file, "onnx")


def write_gain(measured: Sequence[Measured], out: Path, said: str) -> None:
    """Writes `gain.csv`, all numbers, and `gain.md`, the table with `said` under it."""
    rows = [model.numbers(measured[0]) for model in measured]
    write_bytes(out / "gain.csv", as_csv(rows, list(rows[0])))
    write_table(shown(measured), said, out / "gain.md")


def shown(measured: Sequence[Measured]) -> list[Mapping[str, str]]:
    """Returns the rows in words: what each model is, and against the dense one; times are median (quartiles)."""
    dense = measured[0]
    rows: list[Mapping[str, str]] = []
    for model in measured:
        row = model.numbers(dense)
        row_shown = {
            "devices": str(row["devices"]),
            "budget": str(row["budget"]),
            "MACs": f"{model.macs / 1e6:.4g}M {row['macs_share']:.1%}",
            "parameters": f"{model.params / 1e6:.3g}M {row['params_share']:.1%}",
            "file": f"{model.file_bytes / 1e6:.3g} MB {row['file_share']:.1%}",
        }
        for engine in ENGINES:
            times = f"{row[f'{engine}_ms']:.3g} ({row[f'{engine}_ms_q1']:.3g}–{row[f'{engine}_ms_q3']:.3g}) ms"
            row_shown[engine] = times + (f", {row[f'{engine}_speed_up']:.2f} ×" if model.devices else "")
        rows.append(row_shown)
    return rows
