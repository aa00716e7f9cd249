"""The numbers behind a run's figures: pure functions of a `Run`, one per table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from experiments.pruning import layers_of
from experiments.report.reading import Run
from strategies.records import DeviceLine, DeviceRecord, Line, RoundLine, TrafficLine
from tapfl.config import REFERENCES
from tapfl.models.backbone import BackboneSpec, outline
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer
from tapfl.summary.heterogeneity import label_shift

KINDS = ("personal", "global", *REFERENCES)  # the accuracies that change from round to round


def stages(*runs: Run) -> tuple[str, ...]:
    """Returns the models whose accuracy is shown for each device; references only if a run has them."""
    known = {name for run in runs for device in run.equipped for name in device.reference_accuracies or {}}
    return ("dense", "pruned", *(name for name in REFERENCES if name in known), "global", "personal")


def accuracies(run: Run) -> pd.DataFrame:
    """Returns the accuracy of every stage (column) for each device that has a model (index).

    The dense accuracy is NaN for a device with the generic plan, which never evaluated the dense model.
    """
    known = stages(run)
    found = {d.device: {stage: d.accuracy_of(stage) for stage in known} for d in run.equipped}
    frame = pd.DataFrame.from_dict(found, "index", columns=list(known), dtype=float).rename_axis("device")
    frame.loc[[d.device for d in run.equipped if d.generic], "dense"] = np.nan
    return frame


def mean_accuracy(run: Run, stage: str) -> float:
    """Returns the mean over the devices that have a model, as summary.json does; NaN if there are none."""
    return float(accuracies(run).reindex(columns=[stage])[stage].mean())


def total_bytes(devices: Iterable[DeviceRecord], side: str) -> int:
    """Returns the total bytes of the devices; `side` is ``up`` or ``down``."""
    return sum(sum(getattr(device, f"bytes_{side}").values()) for device in devices)


def curves(run: Run) -> pd.DataFrame:
    """Returns device, round, kind and accuracy: of every device that has a model, after every round."""
    kinds = [kind for kind in KINDS if kind in stages(run)]
    # before training each model is the pruned one, except that which is trained from the dense one
    before = {kind: "dense" if kind == "dense+alone" else "pruned" for kind in kinds}
    start = {d.device: {kind: d.accuracy_of(model) for kind, model in before.items()} for d in run.equipped}
    lines = [
        {"device": line.device, "round": line.round} | {k: line.accuracy_of(k) for k in kinds}
        for line in run.of(DeviceLine)
    ]
    return _carried(lines, start, kinds, "accuracy", _ended(run))


def alphas(run: Run) -> pd.DataFrame:
    """Returns device, round, kind (always ``α``) and α of the devices that trained; no rows unless the method is APFL.

    α is the value that a device used after the round; it is 0 as long as the device has no personal parameters.
    """
    apfl = run.config.get("personalize.method") == "apfl"
    start = {device.device: {"α": 0.0} for device in run.equipped if device.rounds and apfl}
    lines = [{"device": line.device, "round": line.round, "α": line.alpha} for line in run.of(DeviceLine)]
    return _carried(lines, start, ["α"], "α", _ended(run))


def _ended(run: Run) -> list[int]:
    return [line.round for line in run.of(RoundLine)]


def _carried(
    lines: Sequence[Mapping[str, Any]],
    start: Mapping[int, Mapping[str, float | None]],
    kinds: Sequence[str],
    name: str,
    rounds: Sequence[int],
) -> pd.DataFrame:
    """Returns device, round, kind and value of every device after every round.

    A device that did not answer in a round keeps its last value, which is that of `start` before its first answer;
    otherwise means would depend on which devices answered.

    Args:
        lines: device, round, and one value for each of `kinds`.
        start: the values of each device, by kind.
        name: name of the column of values.
    """
    if not start:
        return pd.DataFrame(columns=["device", "round", "kind", name])
    first = [{"device": i, "round": -1, **values} for i, values in start.items()]
    found = pd.DataFrame([*first, *lines])
    index = pd.MultiIndex.from_product([[-1, *rounds], list(start)], names=["round", "device"])
    known = found.groupby(["round", "device"])[[*kinds]].last().reindex(index).groupby("device").ffill()
    long = known.rename_axis(columns="kind").stack().rename(name).reset_index()
    return long.loc[long["round"] >= 0, ["device", "round", "kind", name]]


def spread(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Returns round, kind, mean, low and high over devices; low and high are the lower and upper quartile."""
    groups = frame.groupby(["round", "kind"], sort=False)[name]
    found = {"mean": groups.mean(), "low": groups.quantile(0.25), "high": groups.quantile(0.75)}
    return pd.DataFrame(found, index=found["mean"].index).reset_index()


def partition(run: Run) -> pd.DataFrame:
    """Returns device, class, train and test: the number of images of each device in each of its classes."""
    rows = [
        (i, *counts)
        for i, images in run.images.items()
        for counts in zip(images.names, images.train, images.test, strict=True)
    ]
    frame = pd.DataFrame(rows, columns=["device", "class", "train", "test"])
    return frame[(frame["train"] > 0) | (frame["test"] > 0)]


def shifts(run: Run) -> dict[str, float]:
    """Returns measures of how much the devices differ in labels, quantity and features, those that are known."""
    counts = [images.train for images in run.images.values() if any(images.train)]
    found = {"labels": label_shift(np.array(counts))} if counts and len(set(map(len, counts))) == 1 else {}
    known = {name: getattr(run.summary, f"{name}_shift", None) for name in ("quantity", "feature")}
    return found | {name: value for name, value in known.items() if value is not None}


def widths(run: Run) -> pd.DataFrame:
    """Returns one row per device and layer: block, kind, kept units and all units, widths as text, and tokens."""
    rows = [
        {"device": i, "layer": layer["name"], "block": layer["name"].rpartition(".")[0]}
        | {key: layer[key] for key in ("kind", "kept", "units", "width")}
        | {"dense width": layer["width_dense"], "share": layer["kept"] / layer["units"]}
        | {"tokens": layer["tokens"], "dense tokens": layer["tokens_dense"]}
        for i, plan in run.plans.items()
        for layer in layers_of(_layers(plan.backbone.model_dump_json()), plan)
    ]
    columns = ["device", "layer", "block", "kind", "kept", "units", "width", "dense width", "share"]
    return pd.DataFrame(rows, columns=[*columns, "tokens", "dense tokens"])


@lru_cache(maxsize=4)
def _layers(spec: str) -> list[PrunableLayer]:
    return prunable_layers(outline(BackboneSpec.model_validate_json(spec)))  # only their widths are used


def metric_classes(run: Run) -> pd.DataFrame:
    """Returns device, class, images and pool (counts in metric set and pool), and own (whether the device has it)."""
    rows = [
        (i, *counts, counts[0] in own)
        for i, chosen in run.metric_sets.items()
        for own in [_own_classes(run, i)]
        for counts in zip(chosen.names, chosen.metric, chosen.pool, strict=True)
    ]
    return pd.DataFrame(rows, columns=["device", "class", "images", "pool", "own"])


def _own_classes(run: Run, i: int) -> set[str]:
    """Returns the names of the classes of which a device has training images; an empty set if they are not known."""
    if i in run.images:
        return {name for name, count in zip(run.images[i].names, run.images[i].train, strict=True) if count}
    held = next((device.held_classes for device in run.devices if device.device == i), None)
    return {name for name, has in zip(run.classes or run.metric_sets[i].names, held or (), strict=False) if has}


def coverage(run: Run) -> pd.DataFrame:
    """Returns one row per device: the share of its own classes in its metric set and in the pool."""
    rows = []
    for i, part in metric_classes(run).groupby("device", sort=False):
        own, total = part[part["own"]], part[["images", "pool"]].astype(float).sum()
        if own.empty or not total.all():
            continue
        shares, missed = own[["images", "pool"]].astype(float).sum() / total, own["class"][own["images"] == 0]
        covered = len(own) - len(missed)
        rows.append((i, shares["images"], shares["pool"], covered, len(own), ", ".join(missed)))
    columns = ["device", "own share", "by chance", "covered", "own classes", "not covered"]
    return pd.DataFrame(rows, columns=columns)


def effective_sizes(run: Run) -> pd.DataFrame:
    """Returns device, size (of its metric set), effective (the effective sample size) and share (their quotient)."""
    known = {i: chosen for i, chosen in run.metric_sets.items() if chosen.effective_size and chosen.size}
    rows = [(i, c.size, c.effective_size, c.effective_size / c.size) for i, c in known.items() if c.effective_size]
    return pd.DataFrame(rows, columns=["device", "size", "effective", "share"])


def bytes_by_kind(run: Run) -> pd.DataFrame:
    """Returns device, direction, kind and bytes."""
    rows = [
        (device.device, direction, kind, count)
        for device in run.devices
        for direction, sizes in (("up", device.bytes_up), ("down", device.bytes_down))
        for kind, count in sizes.items()
        if count
    ]
    return pd.DataFrame(rows, columns=["device", "direction", "kind", "bytes"])


def simulated_rounds(run: Run) -> pd.DataFrame:
    """Returns round (0: round zero), its simulated seconds, and the slowest device that answered."""
    traffic = _frame(run, TrafficLine).sort_values(["simulated_seconds", "device"])
    ended, slowest = _frame(run, RoundLine), traffic.groupby("round")["device"].last()
    seconds = np.diff(ended["simulated_seconds"].astype(float), prepend=0.0)
    return pd.DataFrame(
        {"round": ended["round"], "seconds": seconds, "slowest": ended["round"].map(slowest).astype("Int64")}
    )


def simulated_devices(run: Run) -> pd.DataFrame:
    """Returns device, round and the simulated seconds of the device in that round."""
    traffic = _frame(run, TrafficLine).rename(columns={"simulated_seconds": "seconds"})
    trained = traffic[traffic["phase"] != "evaluation"]
    return trained.groupby(["device", "round"])["seconds"].sum().reset_index()


def _frame(run: Run, kind: type[Line]) -> pd.DataFrame:
    return pd.DataFrame([vars(line) for line in run.of(kind)], columns=list(kind.model_fields))
