"""Local rounds of devices that step together, against the same devices one by one and against a loop by hand.

All three take turns on one thread. Only local training is measured, without messages, evaluation or storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import numpy as np
import torch
import typer

from experiments.bench.local_training import METHODS, Device, specs
from experiments.bench.timing import Models, Repeats, Row, Sizes, chosen, turns
from strategies.fleet import groups_of
from tapfl.adapters.stacked_model import StackedModel
from tapfl.compute import HERE
from tapfl.config import DeviceOptions, RunConfig, TrainOptions
from tapfl.options import parse_assignment
from tapfl.personalize.together import LocalTask, Outcome, all_of

KINDS = list(zip(DeviceOptions().budgets, DeviceOptions().ranks, strict=True))
LOOP, ALONE, TOGETHER, STACKING = "loop by hand", "one by one", "together", "stacking"


def together(
    model: Models = ["digits"],
    size: Sizes = [64],
    method: Annotated[list[str], typer.Option(help=f"{', '.join(METHODS)}; default: all")] = [],
    devices: Annotated[int, typer.Option(min=2, help="devices, with the default budgets and ranks in turn")] = 20,
    at_once: Annotated[str, typer.Option(help="as train.together: a number, or auto")] = "auto",
    samples: Annotated[int, typer.Option(min=2, help="training images per device")] = 72,
    batch: Annotated[int, typer.Option(min=2, help="images per step")] = 16,
    repeats: Repeats = 3,
) -> Iterator[Row]:
    """A local round of devices that step together, relative to a bare loop over them; the time includes stacking.

    A round has three epochs. `stacking` is the share of the time spent on building one stacked model per group.
    """
    methods = chosen("--method", method, [*METHODS])
    train = RunConfig.from_flat(dict([parse_assignment(f"train.together={at_once}")]) | {"train.batch": batch}).train
    torch.set_num_threads(1)
    for name, spec in specs(model, size):
        made = [Device.random(spec, samples, HERE, *KINDS[i % len(KINDS)], seed=i) for i in range(devices)]
        groups = _groups(made, train)
        for method_name in methods:
            taken = turns(_variants(made, groups, method_name, train), repeats)
            yield {"model": name, "method": method_name, "groups": _sizes(groups)} | _row(taken)


def _groups(devices: Sequence[Device], train: TrainOptions) -> list[list[int]]:
    """Returns all devices in the groups that are computed together, as in a run."""
    groups = groups_of({i: device.macs for i, device in enumerate(devices)}, train)
    grouped = {i for group in groups for i in group}
    return groups + [[i] for i in range(len(devices)) if i not in grouped]


def _sizes(groups: Sequence[Sequence[int]]) -> str:
    sizes = [len(group) for group in groups]
    return " + ".join(f"{sizes.count(size)} × {size}" for size in dict.fromkeys(sizes))


def _variants(
    devices: Sequence[Device], groups: Sequence[Sequence[int]], method: str, train: TrainOptions
) -> dict[str, Callable[[], object]]:
    def tasks(group: Sequence[int]) -> list[LocalTask]:
        return [devices[i].task(method, train.batch, train.epochs) for i in group]

    return {
        LOOP: lambda: [device.by_hand(method, train.batch, train.epochs) for device in devices],
        ALONE: lambda: [task.alone() for task in tasks(range(len(devices)))],
        TOGETHER: lambda: [_whole(all_of(tasks(group))) for group in groups],
        STACKING: lambda: [StackedModel([devices[i].adapted for i in group]) for group in groups if len(group) > 1],
    }


def _whole(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """Returns the outcomes. Raises the first one that is an error."""
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def _row(taken: dict[str, np.ndarray]) -> Row:
    """Returns the columns of the table; `taken` has wall and CPU seconds of each turn."""

    def ratio(what: str, to: str, unit: int = 1) -> str:
        shares = taken[what][:, unit] / taken[to][:, unit]
        return f"{np.median(shares):.2f} ({shares.min():.2f}–{shares.max():.2f})"

    return {
        "loop s": f"{np.median(taken[LOOP][:, 1]):.2f}",
        "one by one / loop": ratio(ALONE, LOOP),
        "together / loop": ratio(TOGETHER, LOOP),
        "together / one by one": ratio(TOGETHER, ALONE),
        "wall / loop": ratio(TOGETHER, LOOP, 0),
        "stacking": ratio(STACKING, TOGETHER),
    }
