"""The page of one run: its sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.figures.page import Page, Section, Table
from experiments.output import count, duration, size
from experiments.report import charts, heatmaps, series
from experiments.report.reading import Run
from strategies.records import DeviceRecord
from tapfl.config import RunConfig

CHAPTERS = {
    "How accurate the devices are": (charts.accuracy, charts.curves, charts.alpha),
    "Which images they hold, and which public images stand for them": (
        *(heatmaps.partition, heatmaps.metric_classes, heatmaps.coverage),
    ),
    "What is kept of the model": (heatmaps.kept_attention, heatmaps.kept_ffn),
    "What it cost": (charts.traffic, charts.simulated_rounds, charts.phases, charts.real_rounds),
}
PLACE = {"out", "resume", "cache", "devices.count"}  # options that name a place, or that every run sets
METHODS = {
    "apfl": "an interpolation of the shared adapters and its own (APFL)",
    "ditto": "personal adapters that are kept close to the shared ones (Ditto)",
    "local": "adapters that it trains alone",
    "fedavg": "the shared adapters (FedAvg)",
    "fedavg+finetune": "the shared adapters, fine-tuned on its own images at the end",
}


def page_of(run: Run) -> Page:
    """Returns the page of a run."""
    sections = [Section("Devices", table=devices(run), pick=True)] if run.devices else []
    for heading, draws in CHAPTERS.items():
        if figures := [figure for draw in draws if (figure := draw(run))]:
            sections.append(Section(heading, figures))
    lost, changed = events(run), changed_options(run)
    nothing = "" if lost.rows else "Every message was answered, and every device took part in every round."
    if run.lines:
        sections.append(Section("Faults, absences and refusals", table=lost if lost.rows else None, note=nothing))
    options = [[name, shown_option(value)] for name, value in run.config.items()]
    versions = [[name, version] for name, version in run.versions.items()]
    details = [
        ("All options", Table(("option", "value"), options, words=frozenset({0, 1}))),
        ("Versions", Table(("package", "version"), versions, words=frozenset({0, 1}))),
    ]
    sections.append(
        Section(
            "Options",
            table=changed if changed.rows else None,
            note="" if changed.rows else "All options have their default values.",
            details=[(name, table) for name, table in details if table.rows],
        )
    )
    count = f"{_devices(len(run.devices))} on {source(run)}" if run.devices else f"A run on {source(run)}"
    where, picker = f"The run's folder: {run.path}", [device.device for device in run.devices]
    return Page(count, lead(run), sections, headline(run), run.missing, where, picker)


# -- sentences ---------------------------------------------------------------------------------------------------------


def source(run: Run) -> str:
    """Returns the name of the private images' source, or the last part of its path."""
    name = str(run.config.get("data.source", "?"))
    return name if name.startswith("hf:") else Path(name).name or name


def lead(run: Run) -> list[str]:
    """Returns a paragraph each on the setup, the result and the cost."""
    if not run.equipped:
        return ["No device has a model yet: round zero is not finished, and there is no result."]
    return [_setup(run), _result(run), _cost(run)]


def headline(run: Run) -> list[tuple[str, str]]:
    """Returns the most important values, each with its name."""
    if not run.equipped:
        return []
    personal, pruned = _mean(run, "personal"), _mean(run, "pruned")
    return [
        (f"{personal:.3f}", "mean personal accuracy"),
        (f"{personal - pruned:+.3f}", "against the pruned models before training"),
        (_shares(run), "of the dense model's MACs"),
        (size(series.total_bytes(run.devices, "up")), "sent by all devices"),
    ]


def _setup(run: Run) -> str:
    config, equipped = run.config, run.equipped
    images = _between([str(n) for n in sorted(device.train_samples for device in equipped)])
    classes = _between([str(n) for n in sorted(device.classes for device in equipped if device.classes)])
    holding = f"{images} training images of {source(run)}" + (f" from {classes} classes" if classes else "")
    method = str(config.get("personalize.method"))
    return (
        f"{_devices(len(run.devices))} took part. Each holds {holding} ({config.get('data.partition')} partition), "
        f"got a {config.get('model.name')} pruned for its own task (criterion {config.get('pruning.criterion')}) to "
        f"{_shares(run)} of the dense model's MACs, and trained adapters for {run.rounds} "
        f"round{'s' if run.rounds != 1 else ''} (aggregation {config.get('adapters.rule')}). At the end each device "
        f"uses {METHODS.get(method, method)}."
    )


def _result(run: Run) -> str:
    personal, pruned, dense = _mean(run, "personal"), _mean(run, "pruned"), series.mean_accuracy(run, "dense")
    dense_too = f" and {_against(personal - dense)} the dense model ({dense:.3f})" if dense is not None else ""
    best, lost = max(run.equipped, key=series.gain), [device for device in run.equipped if series.gain(device) < 0]
    worse = f"{_named(lost)} became less accurate" if lost else "no device became less accurate"
    gained = (
        f"Training helped device {best.device} most, from {best.pruned_accuracy:.3f} to "
        f"{best.personal_accuracy:.3f}; {worse}."
        if series.gain(best) > 0
        else "Training helped no device."
    )
    tenth = sorted(device.personal_accuracy for device in run.equipped)[: -(-len(run.equipped) // 10)]
    return (
        f"On the devices' own test images the mean accuracy of the personal models is {personal:.3f}, "
        f"{_against(personal - pruned)} the pruned models before training ({pruned:.3f}){dense_too}. {gained} The "
        f"mean of the worst tenth of the devices is {np.mean(tenth):.3f}."
    )


def _cost(run: Run) -> str:
    sent, received = (size(series.total_bytes(run.devices, side)) for side in ("up", "down"))
    sentences = [f"The devices sent {sent} and received {received}, including the dense backbone."]
    if run.summary:
        full = size(run.summary.full_model_bytes * len(run.equipped))
        sentences.append(f"Sending the full model in every round would take {full} up.")
        if simulated := run.summary.simulated_seconds:
            real = sum(run.seconds.values())
            here = f"; here it took {duration(real)}" if real else ""
            sentences.append(f"On devices of these profiles the run would take {duration(simulated)}{here}.")
    if generic := [device for device in run.equipped if device.generic]:
        sentences.append(f"{_named(generic)} sent no mixture and got the generic plan.")
    if without := [device for device in run.devices if not device.params]:
        sentences.append(f"{_named(without)} got no model.")
    if run.summary and run.summary.epsilon is not None:
        sentences.append(f"Differential privacy of the shared adapters: ε ≤ {run.summary.epsilon:.3g}.")
    return " ".join(sentences)


def _mean(run: Run, stage: str) -> float:
    mean = series.mean_accuracy(run, stage)
    assert mean is not None
    return mean


def _shares(run: Run) -> str:
    return _between([f"{share:.0%}" for share in sorted(device.macs_share for device in run.equipped)])


def _against(difference: float) -> str:
    return f"{abs(difference):.3f} {'below' if difference < 0 else 'above'}"


def _devices(count: int) -> str:
    return f"{count} device{'s' if count != 1 else ''}"


def _named(devices: Sequence[DeviceRecord]) -> str:
    if len(devices) > 8:
        return f"{len(devices)} devices"
    return f"Device{'s' if len(devices) > 1 else ''} {', '.join(str(device.device) for device in devices)}"


def _between(values: Sequence[str]) -> str:
    """Returns the first and the last of sorted values, or one if they are the same."""
    return " to ".join(dict.fromkeys((values[0], values[-1]))) if values else ""


# -- tables ------------------------------------------------------------------------------------------------------------


def devices(run: Run) -> Table:
    """Returns a row a device: its data, its model, its accuracies, and its traffic."""
    costs = {"MACs": "macs", "params": "params"}
    if run.equipped:
        first = run.equipped[0]
        dense = {name: getattr(first, name) / getattr(first, f"{name}_share") for name in costs.values()}
        costs = {f"{title}, of {count(dense[name])}": name for title, name in costs.items()}
    profiles = ["profile"] if any(device.profile.name for device in run.devices) else []
    columns = ["device", *profiles, "images", "classes", "budget", *costs, *series.STAGES, "gain", "α", "up", "down"]
    return Table(
        columns,
        [_device(run, device, bool(profiles)) for device in run.devices],
        keys=[device.device for device in run.devices],
        words=frozenset({1} if profiles else ()),
        note="images: training + test; gain: personal minus pruned accuracy.",
    )


def _device(run: Run, device: DeviceRecord, named: bool) -> list[str]:
    head = [
        str(device.device),
        *([device.profile.name or ""] if named else []),
        f"{device.train_samples} + {device.test_samples}",
        str(device.classes or "?"),
        str(device.profile.budget),
    ]
    traffic = [size(series.total_bytes([device], side)) for side in ("up", "down")]
    if not device.params:
        return [*head, *["–"] * 8, *traffic]
    interpolates = run.config.get("personalize.method") == "apfl" and device.rounds
    return [
        *head,
        f"{count(device.macs)}, {device.macs_share:.1%}",
        f"{count(device.params)}, {device.params_share:.0%}",
        *(shown_accuracy(series.accuracy(device, stage)) for stage in series.STAGES),
        f"{series.gain(device):+.3f}",
        f"{device.alpha:.3f}" if interpolates else "–",
        *traffic,
    ]


def events(run: Run) -> Table:
    """Returns failures and absences, equal ones in one row."""
    rows = [
        [
            str(row["what"]),
            str(row["where"]) + (f" {_some(row['rounds'])}" if row["rounds"] else ""),
            str(row["times"]),
            _some(row["devices"]),
            str(row["reason"]),
        ]
        for row in series.events(run)
    ]
    return Table(("what", "where", "times", "devices", "reason"), rows, words=frozenset({0, 1, 3, 4}))


def changed_options(run: Run) -> Table:
    """Returns the options whose values are not the defaults."""
    defaults = RunConfig().flat()
    rows = [
        [name, shown_option(value), shown_option(defaults[name]) if name in defaults else "(no longer an option)"]
        for name, value in run.config.items()
        if name not in PLACE and defaults.get(name) != value
    ]
    return Table(("option", "value", "default"), rows, words=frozenset({0, 1, 2}))


def shown_option(value: object) -> str:
    return str(value) if value != "" else "(empty)"


def shown_accuracy(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _some(values: Sequence[object], most: int = 12) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return f"{shown}, … ({len(values)} in all)" if len(values) > most else shown
