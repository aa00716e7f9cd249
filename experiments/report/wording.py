"""What a run came to, in sentences that a stranger can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.output import duration, size
from experiments.report import series
from experiments.report.reading import Run

METHODS = {
    "apfl": "a personal mixture of the shared adapters and its own (APFL)",
    "ditto": "personal adapters that are held near the shared ones (Ditto)",
    "local": "adapters that it trains alone",
    "fedavg": "the shared adapters alone (FedAvg)",
    "fedavg+finetune": "the shared adapters, tuned on its own images at the end",
}


def title(run: Run) -> str:
    """Returns how the run is called."""
    return f"{_devices(len(run.devices))} on {source(run)}" if run.devices else f"A run on {source(run)}"


def source(run: Run) -> str:
    """Returns what the private images are of: a name, or the last part of a path."""
    name = str(run.config.get("data.source", "?"))
    return name if name.startswith("hf:") else Path(name).name or name


def lead(run: Run) -> list[str]:
    """Returns what was run, with which result, and at what cost: a paragraph each."""
    if not run.equipped:
        return ["No device has a model yet: round zero is not done, and there is no result."]
    return [_what(run), _result(run), _cost(run)]


def headline(run: Run) -> list[tuple[str, str]]:
    """Returns the figures that matter most, each with what it is."""
    if not run.equipped:
        return []
    personal, pruned = series.mean_accuracy(run, "personal"), series.mean_accuracy(run, "pruned")
    assert personal is not None and pruned is not None
    sent = sum(series.total_bytes(device, "bytes_up") for device in run.devices)
    shares = [device["macs_share"] for device in run.equipped]
    return [
        (f"{personal:.3f}", "mean personal accuracy"),
        (f"{personal - pruned:+.3f}", "against the pruned models before training"),
        (_between([f"{share:.0%}" for share in sorted(shares)]), "of the dense model's MACs"),
        (size(sent), "sent by all devices"),
    ]


def _what(run: Run) -> str:
    config, devices = run.config, run.equipped
    images = _between([str(n) for n in sorted(device["train_samples"] for device in devices)])
    classes = _between([str(n) for n in sorted(device["classes"] for device in devices if device["classes"])])
    holding = f"{images} training images of {source(run)}" + (f" from {classes} classes" if classes else "")
    shares = _between([f"{share:.0%}" for share in sorted(device["macs_share"] for device in devices)])
    rounds = f"{run.rounds} round{'s' if run.rounds != 1 else ''}"
    method = METHODS.get(str(config.get("personalize.method")), str(config.get("personalize.method")))
    return (
        f"{_devices(len(run.devices))} took part, each holding {holding} ({config.get('data.partition')} partition). "
        f"Each got a {config.get('model.name')} cut for its own task (criterion {config.get('pruning.criterion')}) to "
        f"{shares} of the dense model's MACs, and trained adapters for {rounds} "
        f"(aggregation {config.get('adapters.rule')}). In the end it uses {method}."
    )


def _result(run: Run) -> str:
    devices = run.equipped
    means = {stage: series.mean_accuracy(run, stage) for stage in series.STAGES}
    personal, pruned, dense = means["personal"], means["pruned"], means["dense"]
    assert personal is not None and pruned is not None
    dense_too = f" and {_against(personal - dense)} the dense model ({dense:.3f})" if dense is not None else ""
    best = max(devices, key=series.gain)
    lost = [device for device in devices if series.gain(device) < 0]
    losers = f"{_named(lost)} lost by it" if lost else "no device lost by it"
    tenth = float(np.mean(sorted(d["personal_accuracy"] for d in devices)[: -(-len(devices) // 10)]))
    gained = (
        f"Training helped device {best['device']} most, from {best['pruned_accuracy']:.3f} to "
        f"{best['personal_accuracy']:.3f}; {losers}."
        if series.gain(best) > 0
        else "Training helped no device."
    )
    return (
        f"On their own test images the personal models have an accuracy of {personal:.3f} on average, "
        f"{_against(personal - pruned)} the pruned models before training ({pruned:.3f}){dense_too}. {gained} The "
        f"worst tenth of the devices is at {tenth:.3f}."
    )


def _cost(run: Run) -> str:
    sent, received = (sum(series.total_bytes(d, side) for d in run.devices) for side in ("bytes_up", "bytes_down"))
    said = f"The devices sent {size(sent)} and received {size(received)}, the dense backbone included."
    if full := run.summary.get("full_model_bytes"):
        said += f" Sending the full model in every round would be {size(full * len(run.equipped))} up."
    if simulated := run.summary.get("simulated_seconds"):
        said += f" On devices of these profiles the run would take {duration(simulated)}"
        real = sum(row["seconds"] for row in series.phases(run))
        said += f"; here it took {duration(real)}." if real else "."
    if generic := [device for device in run.equipped if device["generic"]]:
        said += f" {_named(generic)} gave no mixture and got the generic plan."
    if without := [device for device in run.devices if not device["params"]]:
        said += f" {_named(without)} got no model."
    if (epsilon := run.summary.get("epsilon")) is not None:
        said += f" Differential privacy of the shared adapters: ε ≤ {epsilon:.3g}."
    return said


def _against(difference: float) -> str:
    return f"{abs(difference):.3f} {'below' if difference < 0 else 'above'}"


def _devices(count: int) -> str:
    return f"{count} device{'s' if count != 1 else ''}"


def _named(devices: Sequence[dict[str, Any]]) -> str:
    ids = [str(device["device"]) for device in devices]
    if len(ids) > 8:
        return f"{len(ids)} devices"
    return f"Device{'s' if len(ids) > 1 else ''} {', '.join(ids)}"


def _between(values: Sequence[str]) -> str:
    """Returns the first and the last of sorted values, or the one that they are."""
    if not values:
        return ""
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
