"""What is measured on a GPU: each part is a function of its size and device, which yields rows.

Weights and images are random, except for those that accuracy is measured with. Ratios are of things measured in the
same part on the same device.
"""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench.accuracy import accuracies, digits, pictures
from experiments.bench.local_training import DIGITS, METHODS, Device, drawn, model_of, spec_named
from tapfl.adapters.stacked_model import StackedModel
from tapfl.compute import HERE, Compute, home
from tapfl.config import PruningOptions, TrainOptions
from tapfl.data.decoded import cores
from tapfl.personalize.recorded import WARM, RecordedStep
from tapfl.personalize.together import LocalTask, all_of
from tapfl.pruning.compensation import cut
from tapfl.pruning.criteria.criterion import PruningTask
from tapfl.pruning.layer_importance import layer_importance
from tapfl.pruning.pipeline import prune_model, pruning_task
from tapfl.pruning.scores import neuron_importance
from tapfl.pruning.tokens import select
from tapfl.training import Params

Row = dict[str, Any]
WAIT = 60.0  # seconds that processes wait for each other
WATCH = (
    "nvidia-smi",
    "--id=0",
    "--query-gpu=utilization.gpu,memory.used",
    "--format=csv,noheader,nounits",
    "-lms",
    "200",
)


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        models: timm names, or `digits`.
        of_round, of_zero: those of a round, and of round zero with its criteria.
        images: of a device; metric: images of a metric set, by batches of `batch`.
        patience: times the limits of the parts.
        stacked: models of which `group` devices step together.
        pictures, weights: a folder with one subfolder of images per class, at least 60 classes, and a checkpoint of the
            first of the models; empty: random ones do.
    """

    models: tuple[str, ...] = ("deit_tiny_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224")
    of_round: str = "deit_small_patch16_224"
    of_zero: tuple[tuple[str, str], ...] = (
        ("deit_small_patch16_224", "tap"),
        ("deit_small_patch16_224", "tap+"),
        ("deit_base_patch16_224", "tap+"),
    )
    devices: int = 20
    images: int = 256
    metric: int = 640
    batch: int = 64
    step: int = 32
    repeats: int = 15
    processes: tuple[int, ...] = (1, 2, 4, 8)
    patience: float = 1.0
    stacked: tuple[str, ...] = ("deit_tiny_patch16_224", "deit_small_patch16_224")
    group: int = 4
    pictures: str = ""
    weights: str = ""


SMALL = Size(
    models=("digits",),
    of_round="digits",
    of_zero=(("digits", "tap"), ("digits", "tap+")),
    devices=2,
    images=16,
    metric=16,
    batch=8,
    step=8,
    repeats=2,
    processes=(1, 2),
    patience=10.0,
    stacked=("digits",),
    group=2,
)


def task_of(model: nn.Module, inputs: Tensor, criterion: str, batch: int, compute: Compute) -> PruningTask:
    """Returns a pruning problem at half of the MACs, where `compute` says."""
    options = PruningOptions(criterion=criterion)
    return pruning_task(compute.put(model), compute.put(inputs), 0.5, options, batch, compute=compute)


def median_seconds(compute: Compute, call: Callable[[], object], repeats: int) -> float:
    """Returns the median seconds of a call by the device's clock, after two that warm it up."""
    return statistics.median([compute.seconds(call) for _ in range(repeats + 2)][2:])


def agreement(size: Size, compute: Compute) -> Iterator[Row]:
    """The CPU against the device, on a small ViT: plans and adapters; the same round twice; the cost of determinism."""
    replace(compute, deterministic=True).prepare()  # what cuBLAS reads has to be set before it is first used
    dense, here = model_of(DIGITS), Compute()
    inputs = drawn(dense, 64)
    for criterion in ("tap", "tap+"):
        plans = [prune_model(task_of(dense, inputs, criterion, 16, way), DIGITS).plan for way in (here, compute)]
        pairs = [(set(a.kept), set(b.kept)) for a, b in zip(plans[0].layers, plans[1].layers, strict=True)]
        alike = sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)
        yield {"criterion": criterion, "kept alike": round(alike, 5)}
    ways = {"cpu": here, "device": compute, "deterministic": replace(compute, deterministic=True)}
    found: dict[str, Params] = {}
    for name, way in ways.items():
        way.prepare()
        a_round = partial(Device.random(DIGITS, 64, way).round, "fedavg", 16)
        found[name], found[f"{name} again"] = home(a_round()), home(a_round())
        yield {"round": name, "s": median_seconds(way, a_round, 3)}
    for one, other in (("cpu", "device"), ("device", "device again"), ("deterministic", "deterministic again")):
        differ = max(float((found[one][key] - found[other][key]).abs().max()) for key in found[one])
        yield {"adapters": f"{one} against {other}", "largest difference": differ}


def steps(size: Size, compute: Compute) -> Iterator[Row]:
    """One step of local training: milliseconds of the device, and of the host until it has launched all of it.

    And of the step as a graph, and of recording it, which has to be less than the rest of a round gains.
    """
    for name in size.models:
        for way in both(compute):
            device, recorder = Device.random(spec_named(name), size.step, way), replace(way, graphs=True).recorder
            index = way.put(torch.arange(size.step))
            for label, method in METHODS.items():
                train = TrainOptions(batch=size.step, steps=10**6)
                state = method.init(device.start, None, train, frozenset(device.start))
                step = partial(method.step, state, device.loss, index)
                seconds = median_seconds(way, step, size.repeats)
                begun = time.perf_counter()
                for _ in range(size.repeats):
                    step()
                launching = (time.perf_counter() - begun) / size.repeats
                row = {"model": name, "method": label, "precision": way.precision, "batch": size.step}
                yield row | {"ms": 1e3 * seconds, "ms until launched": 1e3 * launching, **memory()}
                if recorder:
                    again = partial(RecordedStep(partial(method.step, state, device.loss), recorder), index)
                    for _ in range(WARM):
                        again()
                    recording, seconds = way.seconds(again), median_seconds(way, again, size.repeats)
                    yield row | {"ms as a graph": 1e3 * seconds, "ms to record it": 1e3 * recording, **memory()}


def a_round(size: Size, compute: Compute) -> Iterator[Row]:
    """Devices one after the other: `local_round` against a bare loop (ratio), and in several processes at once."""
    for way in both(compute):
        device = Device.random(spec_named(size.of_round), size.images, way)
        loop = median_seconds(way, partial(device.by_hand, "fedavg", size.step), 3)
        ours = median_seconds(way, partial(device.round, "fedavg", size.step), 3)
        yield {"precision": way.precision, "bare s": loop, "ours s": ours, "ours / bare": ours / loop, **memory()}
    for count in size.processes:
        with watched() as seen:
            seconds = at_once(count, size, compute)
        yield {"processes": count, "s of a round": seconds, "devices": size.devices} | seen


def together(size: Size, compute: Compute) -> Iterator[Row]:
    """A step of devices together against the same devices one by one, in a round of two steps; and making the stack."""
    exact, steps = replace(compute, precision="exact"), 2
    for name in size.stacked:
        devices = [Device.random(spec_named(name), steps * size.step, exact, seed=i) for i in range(size.group)]
        stacking = median_seconds(exact, lambda: StackedModel([device.adapted for device in devices]), 3)  # noqa: B023
        for label in METHODS:
            tasks = partial(_tasks, devices, label, size.step)
            alone = median_seconds(exact, lambda: [task.alone() for task in tasks()], 3)  # noqa: B023
            stacked = median_seconds(exact, lambda: all_of(tasks()), 3)  # noqa: B023
            row = {"model": name, "method": label, "batch": size.step, "devices": size.group}
            seconds = {"one by one": alone / steps, "together": (stacked - stacking) / steps, "stacking": stacking}
            yield row | {f"{what}, ms": 1e3 * each for what, each in seconds.items()} | memory()


def _tasks(devices: Sequence[Device], method: str, step: int) -> list[LocalTask]:
    return [device.task(method, step) for device in devices]


def round_zero(size: Size, compute: Compute) -> Iterator[Row]:
    """The smaller model of one device, part by part, in forward passes of its metric set."""
    for name, criterion in size.of_zero:
        spec = spec_named(name)
        dense = model_of(spec)
        inputs = drawn(dense, size.metric)
        for way in both(compute):
            task = task_of(dense, inputs, criterion, size.batch, way)
            row = {"model": name, "criterion": criterion, "precision": way.precision}
            whole = median_seconds(way, partial(forward, task), 3)
            yield row | {"part": "forward", "s": whole}
            for part, call in parts_of(task).items():
                call()  # kernels are chosen and loaded at first
                seconds = way.seconds(call)
                yield row | {"part": part, "s": seconds, "forward passes": seconds / whole}
            seconds = way.seconds(partial(prune_model, task, spec))
            yield row | {"part": "all", "s": seconds, "forward passes": seconds / whole, **memory()}


def forward(task: PruningTask) -> None:
    """Passes the metric set through the dense model."""
    with torch.no_grad(), task.compute.forward():
        for part in task.inputs.split(task.batch):
            task.model(part)


def accuracy(size: Size, compute: Compute) -> Iterator[Row]:
    """Accuracy on the CPU, and on the device in both precisions: of the digits, and of any pictures."""
    given = pictures(size.pictures, Path(size.weights), spec_named(size.models[0])) if size.pictures else ()
    for place, problem in enumerate((digits(), *given)):
        about = {"images": f"pictures {place}" if place else "digits"}
        for name, way in zip(("cpu", "exact", "fast"), (HERE, *both(compute)), strict=True):
            way.prepare()
            if way is HERE and place:
                torch.set_num_threads(cores())  # one would take minutes
            for when, share in accuracies(problem, way):
                yield about | {"computed": name, "when": when, "accuracy": share}


def parts_of(task: PruningTask) -> dict[str, Callable[[], object]]:
    """The parts of which a criterion of `tap` or `tap+` consists, each by itself."""
    model, layers, inputs, batch = task.model, task.layers, task.inputs, task.batch
    kept = {layer.name: torch.arange(0, layer.units, 2) for layer in layers}
    found: dict[str, Callable[[], object]] = {
        "layer KL": lambda: layer_importance(model, layers, kept, inputs, batch, task.compute)
    }
    if task.options.criterion == "tap":
        scores = lambda: neuron_importance(model, layers, inputs, batch, compute=task.compute)  # noqa: E731
        return found | {"scores": scores}
    fisher = lambda: task.fisher_of(model)  # noqa: E731
    chosen, options = select(task), {"compensation": "sequential", "compensation_rows": "even"}
    sequential = replace(task, options=task.options.model_copy(update=options))
    compensate = lambda: cut(sequential, chosen)  # noqa: E731
    return found | {"sensitivities": fisher, "selection": lambda: select(replace(task)), "compensation": compensate}


def both(compute: Compute) -> tuple[Compute, Compute]:
    return replace(compute, precision="exact"), replace(compute, precision="fast")


def memory() -> Row:
    """The most memory of the device that this process has used."""
    return {"MB": torch.cuda.max_memory_allocated() / 1e6} if torch.cuda.is_available() else {}


def at_once(count: int, size: Size, compute: Compute) -> float:
    """Returns the seconds of a round of all devices in so many processes, from when each has its model."""
    context = multiprocessing.get_context("spawn")
    meeting = context.Barrier(count + 1)  # when all are ready, and when all are done: a process takes long to end
    shares = [len(range(i, size.devices, count)) for i in range(count)]
    workers = [context.Process(target=_worker, args=(share, size, compute, meeting), daemon=True) for share in shares]
    for worker in workers:
        worker.start()
    meeting.wait(WAIT * size.patience)
    begun = time.perf_counter()
    meeting.wait(WAIT * size.patience)
    taken = time.perf_counter() - begun
    for worker in workers:
        worker.join()
    return taken


def _worker(devices: int, size: Size, compute: Compute, meeting: Any) -> None:
    compute.prepare()
    device = Device.random(spec_named(size.of_round), size.images, compute)
    device.round("fedavg", size.step)
    meeting.wait(WAIT * size.patience)
    for _ in range(devices):
        home(device.round("fedavg", size.step))
    meeting.wait(WAIT * size.patience)


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Yields a row that after the block has the GPU's utilisation and memory in use, if `nvidia-smi` is available."""
    seen: dict[str, float] = {}
    if not shutil.which(WATCH[0]):
        yield seen
        return
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(WATCH, stdout=out)
        try:
            yield seen
        finally:
            process.terminate()
            process.wait()
        out.seek(0)
        pairs = []
        for line in out:
            with suppress(ValueError):  # some GPUs report [N/A]
                if line.endswith("\n"):  # the last line may be incomplete
                    pairs.append([float(each) for each in line.split(",", 1)])
        if pairs:
            busy, used = zip(*pairs, strict=True)
            seen |= {"GPU busy %": statistics.mean(busy), "MB of all processes": max(used)}


PARTS: dict[str, tuple[Callable[[Size, Compute], Iterator[Row]], float]] = {
    "agreement": (agreement, 60),
    "accuracy": (accuracy, 100),
    "steps": (steps, 110),
    "a round": (a_round, 130),
    "together": (together, 50),
    "round zero": (round_zero, 110),
}
