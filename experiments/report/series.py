"""The numbers behind a run's figures: rows of plain values, each list a pure function of the run that was read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from experiments.figures.figure import Row
from experiments.pruning import layers_of
from experiments.report.reading import Run
from strategies.records import AbsenceLine, DeviceLine, DeviceRecord, FailureLine, RoundLine, TrafficLine
from tapfl.models.backbone import BackboneSpec, outline
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer

STAGES = ("dense", "pruned", "global", "personal")
KINDS = ("personal", "global")  # of accuracy that change from round to round


def accuracy(device: DeviceRecord, stage: str) -> float | None:
    """Returns the accuracy of a stage; None for the dense model if the device never evaluated it."""
    value: float = getattr(device, f"{stage}_accuracy")
    return None if stage == "dense" and device.generic else value


def mean_accuracy(run: Run, stage: str) -> float | None:
    """Returns the mean over the devices that have a model, as in summary.json; None if there are none."""
    values = [value for device in run.equipped if (value := accuracy(device, stage)) is not None]
    return float(np.mean(values)) if values else None


def total_bytes(devices: Iterable[DeviceRecord], side: str) -> int:
    """Returns all bytes of the devices, `side` being ``up`` or ``down``."""
    return sum(sum(getattr(device, f"bytes_{side}").values()) for device in devices)


def gain(device: DeviceRecord) -> float:
    """Returns the personal accuracy minus that of the pruned model before training."""
    return device.personal_accuracy - device.pruned_accuracy


def accuracies(run: Run) -> list[Row]:
    """Returns device, stage, accuracy, and all accuracies of the device for its tooltip."""
    rows: list[Row] = []
    for device in run.equipped:
        values = {stage: value for stage in STAGES if (value := accuracy(device, stage)) is not None}
        tooltip = {f"of {stage}": value for stage, value in values.items()}
        rows += [{"device": device.device, "stage": stage, "accuracy": v, **tooltip} for stage, v in values.items()]
    return rows


def curves(run: Run) -> list[Row]:
    """Returns device, round, kind, accuracy of every device that has a model, after every round.

    A device that did not answer in a round keeps its value; otherwise means would depend on who answered.
    """
    known = {(device.device, kind): device.pruned_accuracy for device in run.equipped for kind in KINDS}
    values = lambda line: {"personal": line.personal_accuracy, "global": line.global_accuracy}  # noqa: E731
    return _carried(run, known, values, "accuracy", _ended(run))


def _ended(run: Run) -> list[int]:
    return [line.round for line in run.of(RoundLine)]


def _carried(
    run: Run,
    known: dict[tuple[int, str], float],
    values: Callable[[DeviceLine], Mapping[str, float]],
    name: str,
    rounds: Iterable[int],
) -> list[Row]:
    news: dict[int, list[DeviceLine]] = defaultdict(list)
    for line in run.of(DeviceLine):
        news[line.round].append(line)
    rows: list[Row] = []
    for t in rounds:
        for line in news[t]:
            known |= {(line.device, k): v for k, v in values(line).items() if (line.device, k) in known}
        rows += [{"device": i, "round": t, "kind": kind, name: value} for (i, kind), value in known.items()]
    return rows


def spread(rows: Sequence[Row], name: str) -> list[Row]:
    """Returns round, kind, mean, low and high (quartiles over devices), and how many devices."""
    if not rows:
        return []
    groups = pd.DataFrame(rows).groupby(["round", "kind"], sort=False)[name]
    quartiles = {side: groups.quantile(q) for side, q in (("low", 0.25), ("high", 0.75))}
    found = pd.DataFrame({"mean": groups.mean(), **quartiles, "devices": groups.size()}, index=groups.mean().index)
    return list(found.reset_index().to_dict("records"))


def alphas(run: Run) -> list[Row]:
    """Returns device, round, kind (always ``α``) and α of the devices that trained; nothing unless the method is APFL.

    A device reports α when it has trained on the result of the round before: its line of round t is α after round
    t + 1, except in the last evaluation, in which it trains no more.
    """
    if run.config.get("personalize.method") != "apfl":
        return []
    start = float(run.config["personalize.alpha"])
    known = {(device.device, "α"): start for device in run.equipped if device.rounds}
    trained = [t for t in _ended(run) if t < int(run.config["train.rounds"])]
    first = [{"device": i, "round": 0, "kind": kind, "α": value} for (i, kind), value in known.items()]
    later = _carried(run, known, lambda line: {"α": line.alpha}, "α", trained)
    return [*first, *(row | {"round": row["round"] + 1} for row in later)]


def partition(run: Run) -> list[Row]:
    """Returns device, class, train, test: how many images a device has of each of its classes."""
    return [
        {"device": i, "class": name, "train": train, "test": test}
        for i, images in run.images.items()
        for name, train, test in zip(images.names, images.train, images.test, strict=True)
        if train or test
    ]


def widths(run: Run) -> list[Row]:
    """Returns a row a device and layer: kept units, of how many, and the widths in words."""
    return [
        {
            "device": i,
            "layer": layer["name"],
            "block": layer["name"].rpartition(".")[0],
            "kind": layer["kind"],
            "kept": layer["kept"],
            "units": layer["units"],
            "share": layer["kept"] / layer["units"],
            "width": layer["width"],
            "dense width": layer["width_dense"],
        }
        for i, plan in run.plans.items()
        for layer in layers_of(_layers(plan.backbone.model_dump_json()), plan)
    ]


@lru_cache(maxsize=4)
def _layers(spec: str) -> list[PrunableLayer]:
    return prunable_layers(outline(BackboneSpec.model_validate_json(spec)))  # only their widths are used


def own_classes(run: Run, i: int) -> set[str] | None:
    """Returns the names of the classes of which a device has training images; None if they are not known here."""
    if i in run.images:
        images = run.images[i]
        return {name for name, count in zip(images.names, images.train, strict=True) if count}
    held = next((device.held_classes for device in run.devices if device.device == i), None)
    if held and i in run.metric_sets:
        return {name for name, has in zip(run.metric_sets[i].names, held, strict=False) if has}
    return None


def metric_classes(run: Run) -> list[Row]:
    """Returns device, class, images, own: the classes of the images of each metric set.

    There is a row for each class of the metric set, and for each of the device's own classes that it does not cover.
    """
    rows = []
    for i, chosen in run.metric_sets.items():
        own = own_classes(run, i) or set()
        for name, images in zip(chosen.names, chosen.metric, strict=True):
            if images or name in own:
                rows.append({"device": i, "class": name, "images": images, "own": name in own})
    return rows


def coverage(run: Run) -> list[Row]:
    """Returns a row a device: the share of its metric set that is of its own classes, and that share in the pool."""
    rows: list[Row] = []
    for i, chosen in run.metric_sets.items():
        own, size, pool = own_classes(run, i), sum(chosen.metric), sum(chosen.pool)
        if not own or not size or not pool:
            continue
        named = [each for each in zip(chosen.names, chosen.metric, chosen.pool, strict=True) if each[0] in own]
        rows.append(
            {
                "device": i,
                "own share": sum(n for _, n, _ in named) / size,
                "by chance": sum(n for _, _, n in named) / pool,
                "covered": sum(1 for _, n, _ in named if n),
                "own classes": len(own),
                "not covered": ", ".join(name for name, n, _ in named if not n),
            }
        )
    return rows


def bytes_by_kind(run: Run) -> list[Row]:
    """Returns device, direction, kind, bytes."""
    return [
        {"device": device.device, "direction": direction, "kind": kind, "bytes": count}
        for device in run.devices
        for direction, sizes in (("up", device.bytes_up), ("down", device.bytes_down))
        for kind, count in sizes.items()
        if count
    ]


def simulated_rounds(run: Run) -> list[Row]:
    """Returns round (0: round zero), its simulated seconds, and the slowest of the devices that answered."""
    slowest: dict[int, tuple[float, int]] = {}
    for line in run.of(TrafficLine):
        found = (line.simulated_seconds, line.device)
        slowest[line.round] = max(slowest.get(line.round, found), found)
    rows, before = [], 0.0
    for ended in run.of(RoundLine):
        device = slowest.get(ended.round, (0.0, None))[1]
        rows.append({"round": ended.round, "seconds": ended.simulated_seconds - before, "slowest": device})
        before = ended.simulated_seconds
    return rows


def simulated_devices(run: Run) -> list[Row]:
    """Returns device, round, simulated seconds of the device in that round."""
    spent: Counter[tuple[int, int]] = Counter()
    for line in run.of(TrafficLine):
        if line.phase != "evaluation":
            spent[line.device, line.round] += line.simulated_seconds  # type: ignore[assignment]
    return [{"device": i, "round": t, "seconds": seconds} for (i, t), seconds in sorted(spent.items())]


def events(run: Run) -> list[Row]:
    """Returns failures and absences, equal ones together: what, where, reason, times, devices, rounds."""
    groups: dict[tuple[str, str, str], list[tuple[int, str]]] = defaultdict(list)
    for failure in run.of(FailureLine):
        where = "rounds" if failure.phase.startswith("round ") else failure.phase
        found = (failure.device, failure.phase.removeprefix("round "))
        groups["failure or refusal", where, failure.reason].append(found)
    for absence in run.of(AbsenceLine):
        groups["absence", "rounds", absence.reason].append((absence.device, str(absence.round)))
    return [
        {
            "what": what,
            "where": where,
            "reason": reason,
            "times": len(found),
            "devices": sorted({i for i, _ in found}),
            "rounds": sorted({t for _, t in found}, key=_numbers_first) if where == "rounds" else [],
        }
        for (what, where, reason), found in sorted(groups.items(), key=lambda each: -len(each[1]))
    ]


def _numbers_first(round: str) -> tuple[bool, int, str]:
    return not round.isdigit(), int(round) if round.isdigit() else 0, round
