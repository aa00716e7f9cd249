"""The numbers of a run's figures: rows of plain values, each a pure function of what was read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from experiments.pruning import layers_of
from experiments.report.reading import Run
from tapfl.models.backbone import BackboneSpec, outline
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer

Row = dict[str, Any]

STAGES = ("dense", "pruned", "global", "personal")
KINDS = ("personal", "global")  # of accuracy, that change from round to round


def accuracy(device: Mapping[str, Any], stage: str) -> float | None:
    """Returns the accuracy of a record; None of the dense model where the device never said it."""
    return None if stage == "dense" and device["generic"] else device[f"{stage}_accuracy"]


def mean_accuracy(run: Run, stage: str) -> float | None:
    """Returns the mean over the devices that have a model, as in summary.json; None if there are none."""
    values = [value for device in run.equipped if (value := accuracy(device, stage)) is not None]
    return float(np.mean(values)) if values else None


def total_bytes(device: Mapping[str, Any], side: str) -> int:
    """Returns all bytes of a device, `side` being ``bytes_up`` or ``bytes_down``."""
    return sum(device[side].values())


def gain(device: Mapping[str, Any]) -> float:
    """Returns by how much the personal model is better than the pruned one was before training."""
    return float(device["personal_accuracy"] - device["pruned_accuracy"])


def accuracies(run: Run) -> list[Row]:
    """Returns device, stage, accuracy, and the four of the device in words for its tooltip."""
    rows = []
    for device in run.equipped:
        values = {stage: value for stage in STAGES if (value := accuracy(device, stage)) is not None}
        said = {f"of {stage}": value for stage, value in values.items()}
        rows += [{"device": device["device"], "stage": stage, "accuracy": v, **said} for stage, v in values.items()]
    return rows


def curves(run: Run) -> list[Row]:
    """Returns device, round, kind, accuracy for every device that has a model, as known after every round.

    A device that did not answer in a round keeps its value: or a mean would follow who happens to be there.
    """
    known = {(d["device"], kind): d["pruned_accuracy"] for d in run.equipped for kind in KINDS}
    return _carried(
        run, known, lambda line: {kind: line[f"{kind}_accuracy"] for kind in KINDS}, "accuracy", _ended(run)
    )


def _ended(run: Run) -> list[int]:
    return [line["round"] for line in run.of_kind("round")]


def _carried(
    run: Run,
    known: dict[tuple[int, str], float],
    values: Callable[[Row], Mapping[str, float]],
    name: str,
    rounds: Iterable[int],
) -> list[Row]:
    news: dict[int, list[Row]] = defaultdict(list)
    for line in run.of_kind("device"):
        news[line["round"]].append(line)
    rows = []
    for t in rounds:
        for line in news[t]:
            known |= {(line["device"], k): v for k, v in values(line).items() if (line["device"], k) in known}
        rows += [{"device": i, "round": t, "kind": kind, name: value} for (i, kind), value in known.items()]
    return rows


def spread(rows: Iterable[Row], name: str) -> list[Row]:
    """Returns mean, lower and upper quartile over the devices of `rows`, by round and kind."""
    groups: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in rows:
        groups[row["round"], row["kind"]].append(row[name])
    return [
        {"round": t, "kind": kind, "mean": float(np.mean(v)), **_quartiles(v), "devices": len(v)}
        for (t, kind), v in groups.items()
    ]


def _quartiles(values: list[float]) -> dict[str, float]:
    low, high = np.quantile(values, (0.25, 0.75))
    return {"low": float(low), "high": float(high)}


def alphas(run: Run) -> list[Row]:
    """Returns device, round, kind (always ``α``) and α of those that trained; nothing for a method that mixes nothing.

    A device says α when it has trained on what the round before came to: its line of round t is α after round t + 1,
    but for the last evaluation, which trains no more.
    """
    if run.config.get("personalize.method") != "apfl":
        return []
    start = float(run.config["personalize.alpha"])
    known = {(device["device"], "α"): start for device in run.equipped if device["rounds"]}
    trained = [t for t in _ended(run) if t < int(run.config["train.rounds"])]
    first = [{"device": i, "round": 0, "kind": kind, "α": value} for (i, kind), value in known.items()]
    later = _carried(run, known, lambda line: {"α": line["alpha"]}, "α", trained)
    return [*first, *(row | {"round": row["round"] + 1} for row in later)]


def partition(run: Run) -> list[Row]:
    """Returns device, class, train, test: how many images a device holds of each class that it holds."""
    return [
        {"device": i, "class": str(name), "train": train, "test": test}
        for i, counts in run.images.items()
        for name, train, test in zip(counts["classes"], counts["train"], counts["test"], strict=True)
        if train or test
    ]


def widths(run: Run) -> list[Row]:
    """Returns a row a device and layer: how many units stay, of how many, and the widths in words."""
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
    return prunable_layers(outline(BackboneSpec.model_validate_json(spec)))  # their widths alone are looked at


def own_classes(run: Run, i: int) -> set[str] | None:
    """Returns the names of the classes of which a device has training images; None if nobody here knows them."""
    if i in run.images:
        counts = run.images[i]
        return {str(name) for name, count in zip(counts["classes"], counts["train"], strict=True) if count}
    held = next((device["held_classes"] for device in run.devices if device["device"] == i), None)
    if held and i in run.metric_sets:
        return {str(name) for name, held in zip(run.metric_sets[i]["classes"], held, strict=False) if held}
    return None


def metric_classes(run: Run) -> list[Row]:
    """Returns device, class, images, own: of what classes the images of each metric set are.

    There is a row for a class of which the set has images, and for one that is the device's own and is not covered.
    """
    rows = []
    for i, counts in run.metric_sets.items():
        own = own_classes(run, i)
        for name, images in zip(map(str, counts["classes"]), counts["metric"], strict=True):
            if images or name in (own or ()):
                rows.append({"device": i, "class": name, "images": images, "own": own is not None and name in own})
    return rows


def coverage(run: Run) -> list[Row]:
    """Returns a row a device: the share of its metric set that is of its own classes, beside that of the whole pool."""
    rows = []
    for i, counts in run.metric_sets.items():
        own = own_classes(run, i)
        size, pool = sum(counts["metric"]), sum(counts["pool"])
        if not own or not size or not pool:
            continue
        named = list(zip(map(str, counts["classes"]), counts["metric"], counts["pool"], strict=True))
        rows.append(
            {
                "device": i,
                "own share": sum(n for name, n, _ in named if name in own) / size,
                "by chance": sum(n for name, _, n in named if name in own) / pool,
                "covered": sum(1 for name, n, _ in named if name in own and n),
                "own classes": len(own),
                "not covered": ", ".join(name for name, n, _ in named if name in own and not n),
            }
        )
    return rows


def bytes_by_kind(run: Run) -> list[Row]:
    """Returns device, direction, kind, bytes."""
    return [
        {"device": device["device"], "direction": direction, "kind": kind, "bytes": count}
        for device in run.devices
        for direction, side in (("up", "bytes_up"), ("down", "bytes_down"))
        for kind, count in device[side].items()
        if count
    ]


def phases(run: Run) -> list[Row]:
    """Returns phase and real seconds of it, in the order in which they came."""
    seconds = run.summary.get("seconds") or run.timing.get("seconds") or {}
    return [{"phase": name, "seconds": value} for name, value in seconds.items()]


def real_rounds(run: Run) -> list[Row]:
    """Returns round and real seconds of it."""
    return [{"round": int(t), "seconds": seconds} for t, seconds in (run.timing.get("rounds") or {}).items()]


def simulated_rounds(run: Run) -> list[Row]:
    """Returns round and simulated seconds of it, with the slowest device of those that answered; 0: round zero."""
    slowest: dict[int, tuple[float, int]] = {}
    for line in run.of_kind("traffic"):
        found = (line["simulated_seconds"], line["device"])
        slowest[line["round"]] = max(slowest.get(line["round"], found), found)
    rows, before = [], 0.0
    for line in run.of_kind("round"):
        t, ended = line["round"], line["simulated_seconds"]
        rows.append({"round": t, "seconds": ended - before, "slowest": slowest.get(t, (0.0, None))[1]})
        before = ended
    return rows


def simulated_devices(run: Run) -> list[Row]:
    """Returns device, round, simulated seconds of what the device did in that round."""
    spent: Counter[tuple[int, int]] = Counter()
    for line in run.of_kind("traffic"):
        if line["phase"] != "evaluation":
            spent[line["device"], line["round"]] += line["simulated_seconds"]
    return [{"device": i, "round": t, "seconds": seconds} for (i, t), seconds in sorted(spent.items())]


def events(run: Run) -> list[Row]:
    """Returns what did not come through, alike ones together: what, where, why, how often, and which devices."""
    groups: dict[tuple[str, str, str], list[tuple[int, str]]] = defaultdict(list)
    for line in run.of_kind("failure"):
        phase = str(line["phase"])
        where = "rounds" if phase.startswith("round ") else phase
        groups["failure or refusal", where, str(line["reason"])].append((line["device"], phase.removeprefix("round ")))
    for line in run.of_kind("absence"):
        groups["absence", "rounds", str(line["reason"])].append((line["device"], str(line["round"])))
    return [
        {
            "what": what,
            "where": where,
            "reason": reason,
            "times": len(found),
            "devices": sorted({i for i, _ in found}),
            "rounds": _in_order({t for _, t in found}) if where == "rounds" else [],
        }
        for (what, where, reason), found in sorted(groups.items(), key=lambda each: -len(each[1]))
    ]


def _in_order(rounds: set[str]) -> list[str]:
    return sorted(rounds, key=lambda t: (not t.isdigit(), int(t) if t.isdigit() else 0, t))
