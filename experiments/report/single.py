"""The report page of one run: its sentences, tables and figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from experiments.figures.figure import Figure
from experiments.figures.page import Page, Section, Table
from experiments.output import count, duration, guarantee, size
from experiments.report import charts, heatmaps, series
from experiments.report.reading import Run, listed, named
from experiments.report.warnings import warnings_of
from experiments.statistics import against_references
from strategies.records import AbsenceLine, FailureLine
from tapfl.config import RunConfig

CHAPTERS: dict[str, Sequence[Callable[[Run], Figure | None]]] = {
    "Accuracy": (charts.accuracy, charts.curves, charts.alpha, charts.oracle),
    "Images and metric sets": (heatmaps.partition, heatmaps.metric_classes, heatmaps.coverage, heatmaps.effective),
    "Pruned models": [*(partial(heatmaps.kept, kind=kind) for kind in heatmaps.KEPT), heatmaps.merged],
    "Cost": (charts.traffic, charts.simulated_rounds, charts.phases, charts.real_rounds),
}
PLACE = {"out", "resume", "cache", "devices.count"}  # options that name a place, or that every run sets
METHODS = {  # completes "At the end each device uses"
    "apfl": "an interpolation of the shared and its personal adapters (APFL)",
    "ditto": "personal adapters that are kept close to the shared ones (Ditto)",
    "local": "adapters that it trained alone",
    "pooled": "adapters trained on the images of all devices, an upper bound",
    "fedavg": "the shared adapters (FedAvg)",
    "fedavg+finetune": "the shared adapters, fine-tuned on its own images at the end",
    "fedprox": "the shared adapters, which devices trained close to those they received (FedProx)",
    "pfedme": "the shared adapters, trained on its own images but kept close to those received (pFedMe)",
    "perfedavg": "the shared adapters after one gradient step on its own images (Per-FedAvg)",
    "fedala": "a layer-wise mixture of the shared adapters and those it trained last (FedALA)",
    "fedper": "the shared adapters with its own head (FedPer)",
    "fedrep": "the shared adapters with its own head, each trained in turn (FedRep)",
}


def page_of(run: Run) -> Page:
    """Returns the page of a run."""
    sections = [Section("Warnings", table=warnings(run))] if warnings_of(run) else []
    if run.devices:
        sections.append(Section("Devices", table=devices(run), pick=True))
    for heading, draws in CHAPTERS.items():
        if figures := [figure for draw in draws if (figure := draw(run))]:
            sections.append(Section(heading, figures))
    lost, changed = events(run), changed_options(run)
    if run.lines:
        none_lost = "" if lost.rows else "Every message was answered, and every device took part in every round."
        sections.append(Section("Faults, absences and refusals", table=lost, note=none_lost))
    options = [[name, shown_option(value)] for name, value in run.config.items()]
    details = [
        ("All options", Table(("option", "value"), options, words={0, 1})),
        ("Versions", Table(("package", "version"), list(run.versions.items()), words={0, 1})),
    ]
    unchanged = "" if changed.rows else "All options have their default values."
    sections.append(Section("Options", table=changed, note=unchanged, details=details))
    title = f"{_devices(len(run.devices))} on {source(run)}" if run.devices else f"A run on {source(run)}"
    where, picker = f"Run folder: {run.path}", [device.device for device in run.devices]
    return Page(title, lead(run), sections, headline(run), run.missing, where, picker)


# -- sentences ---------------------------------------------------------------------------------------------------------


def source(run: Run) -> str:
    """Returns the name of the source of the private images; of a path only its last part."""
    name = str(run.config.get("data.source", "?"))
    return name if name.startswith("hf:") else Path(name).name or name


def lead(run: Run) -> list[str]:
    """Returns three paragraphs: on the setup, the result and the cost."""
    if not run.equipped:
        return ["No device has a model yet: round zero is not finished, and there is no result."]
    return [_setup(run), _result(run), _cost(run)]


def headline(run: Run) -> list[tuple[str, str]]:
    """Returns the most important values, each with its description."""
    if not run.equipped:
        return []
    mean = series.accuracies(run).mean()
    return [
        (f"{mean['personal']:.3f}", "mean personal accuracy"),
        (f"{mean['personal'] - mean['pruned']:+.3f}", "compared with the pruned models before training"),
        (_shares(run), "of the dense model's MACs"),
        (size(series.total_bytes(run.devices, "up")), "sent by all devices"),
    ]


def _setup(run: Run) -> str:
    config, equipped = run.config, run.equipped
    images = _between([device.train_samples for device in equipped])
    classes = _between([device.classes for device in equipped if device.classes])
    holding = f"{images} training images of {source(run)}" + (f" in {classes} classes" if classes else "")
    method = str(config.get("personalize.method"))
    return (
        f"{_devices(len(run.devices))} took part. Each holds {holding} ({config.get('data.partition')} partition), "
        f"got a {config.get('model.name')} pruned for its own task (criterion {config.get('pruning.criterion')}) to "
        f"{_shares(run)} of the dense model's MACs, and trained adapters for {run.rounds} "
        f"round{'s' if run.rounds != 1 else ''} (aggregation {config.get('adapters.rule')}). At the end each device "
        f"uses {METHODS.get(method, method)}.{differences(run)}"
    )


def differences(run: Run) -> str:
    """Returns sentences on how much the devices differ, or an empty string."""
    measures = {
        "labels": "labels {:.3f} (mean total variation distance to all images)",
        "quantity": "quantity {:.3f} (Gini coefficient of the numbers of training images)",
        "feature": "features {:.3f} (mean squared Fréchet distance to all devices, divided by the variance)",
    }
    shown = [measures[name].format(value) for name, value in series.shifts(run).items()]
    apart = f" How much the devices differ: {'; '.join(shown)}." if shown else ""
    drifts = [device.drift for device in run.devices if device.drift is not None]
    moved = f" Since round zero their mixtures have moved by {_between(drifts, '.3f')} (in the unit of the features)."
    return apart + (moved if drifts else "")


def _result(run: Run) -> str:
    frame = series.accuracies(run)
    mean, gain = frame.mean(), frame["personal"] - frame["pruned"]
    personal, pruned, dense = (mean[stage] for stage in ("personal", "pruned", "dense"))
    dense_too = f" and {_against(personal - dense)} the dense model ({dense:.3f})" if pd.notna(dense) else ""
    best, lost = frame.loc[gain.idxmax()], frame.index[gain < 0].tolist()
    worse = f"{named(lost)} became less accurate" if lost else "no device became less accurate"
    gained = (
        f"Training helped device {best.name} most (from {best['pruned']:.3f} to {best['personal']:.3f}); {worse}."
        if gain.max() > 0
        else "Training helped no device."
    )
    tenth = frame["personal"].nsmallest(-(-len(frame) // 10)).mean()
    against = "; ".join(f"{name} {test}" for name, test in against_references(run.equipped).items())
    compared = f" Compared with the reference models: {against}." if against else ""
    return (
        f"On the devices' own test images the mean accuracy of the personal models is {personal:.3f}, "
        f"{_against(personal - pruned)} the pruned models before training ({pruned:.3f}){dense_too}. {gained} "
        f"The mean over the worst tenth of the devices is {tenth:.3f}.{compared}"
    )


def _cost(run: Run) -> str:
    sent, received = (size(series.total_bytes(run.devices, side)) for side in ("up", "down"))
    sentences = [f"The devices sent {sent} and received {received}, including the dense backbone."]
    if run.summary:
        full = size(run.summary.full_model_bytes * len(run.equipped))
        sentences.append(f"Uploading the full model in every round would take {full}.")
        if simulated := run.summary.simulated_seconds:
            real = sum(run.seconds.values())
            here = f"; on this machine it took {duration(real)}" if real else ""
            sentences.append(f"On devices with these profiles the run would take {duration(simulated)}{here}.")
    if generic := [device.device for device in run.equipped if device.generic]:
        sentences.append(f"{named(generic).capitalize()} sent no mixture and got the generic plan for the budget.")
    if without := [device.device for device in run.devices if not device.params]:
        sentences.append(f"{named(without).capitalize()} got no model.")
    if run.summary and run.config.get("privacy.dp-noise"):
        sentences.append(f"Differential privacy of the shared adapters: {guarantee(run.summary)}.")
    return " ".join(sentences)


def _shares(run: Run) -> str:
    return _between([device.macs_share for device in run.equipped], ".0%")


def _against(difference: float) -> str:
    """Returns ``0.031 above that of``, or ``equal to that of`` if the difference rounds to 0."""
    amount = f"{abs(difference):.3f}"
    where = f"{amount} {'below' if difference < 0 else 'above'}" if float(amount) else "equal to"
    return f"{where} that of"


def _devices(count: int) -> str:
    return f"{count} device{'s' if count != 1 else ''}"


def _between(values: Sequence[float], form: str = "") -> str:
    """Returns ``lowest to highest``, a single number if both look the same, and an empty string without values."""
    ends = (min(values), max(values)) if values else ()
    return " to ".join(dict.fromkeys(f"{end:{form}}" for end in ends))


# -- tables ------------------------------------------------------------------------------------------------------------


def devices(run: Run) -> Table:
    """Returns one row per device: its data, its model, its accuracies and its traffic."""
    titles = {"macs": "MACs", "params": "params"}
    for device in run.equipped[:1]:
        dense = {name: getattr(device, name) / getattr(device, f"{name}_share") for name in titles}
        titles = {name: f"{title} (dense {count(dense[name])})" for name, title in titles.items()}
    accuracies, apfl = series.accuracies(run), run.config.get("personalize.method") == "apfl"
    rows = []
    for device in run.devices:
        data = {
            "device": str(device.device),
            "id": listed(run.images[device.device].ids) if device.device in run.images else "",
            "profile": device.profile.name or "",
            "images": f"{device.train_samples} + {device.test_samples}",
            "classes": str(device.classes or "?"),
            "budget": str(device.profile.budget),
        }
        model = dict.fromkeys([*titles.values(), *series.stages(run), "gain", "α"], "–")
        if device.params:
            reached = accuracies.loc[device.device]
            model |= {
                titles["macs"]: f"{count(device.macs)}, {device.macs_share:.1%}",
                titles["params"]: f"{count(device.params)}, {device.params_share:.0%}",
                **{stage: shown_accuracy(value) for stage, value in reached.items()},
                "gain": f"{reached['personal'] - reached['pruned']:+.3f}",
                "α": f"{device.alpha:.3f}" if apfl and device.rounds else "–",
            }
        rows.append(data | model | {side: size(series.total_bytes([device], side)) for side in ("up", "down")})
    words = [name for name in ("id", "profile") if any(row[name] for row in rows)]
    columns = [column for column in rows[0] if column not in ("id", "profile") or column in words]
    return Table(
        columns,
        [[row[column] for column in columns] for row in rows],
        keys=[device.device for device in run.devices],
        words={columns.index(name) for name in words},
        note="images: training + test images; gain: personal minus pruned accuracy.",
    )


def warnings(run: Run) -> Table:
    """Returns the warnings of the run, each with what to try."""
    return Table(("warning", "what to try"), [list(finding) for finding in warnings_of(run)], words={0, 1})


def events(run: Run) -> Table:
    """Returns failures and absences; equal ones share a row, and the most frequent come first."""
    groups: dict[tuple[str, str, str], list[tuple[int, str]]] = defaultdict(list)
    for failure in run.of(FailureLine):
        where, number = "rounds" if failure.phase.startswith("round ") else failure.phase, failure.phase[6:]
        groups["failure or refusal", where, failure.reason].append((failure.device, number))
    for absence in run.of(AbsenceLine):
        groups["absence", "rounds", absence.reason].append((absence.device, str(absence.round)))
    rows = []
    for (what, where, reason), entries in sorted(groups.items(), key=lambda group: -len(group[1])):
        devices, rounds = sorted({i for i, _ in entries}), sorted({t for _, t in entries}, key=lambda t: (len(t), t))
        place = f"rounds {listed(rounds)}" if where == "rounds" else where
        rows.append([what, place, str(len(entries)), listed(devices), reason])
    return Table(("what", "where", "times", "devices", "reason"), rows, words={0, 1, 3, 4})


def changed_options(run: Run) -> Table:
    """Returns the options whose values differ from the defaults."""
    defaults = RunConfig().flat()
    rows = [
        [name, shown_option(value), shown_option(defaults[name]) if name in defaults else "(no longer an option)"]
        for name, value in run.config.items()
        if name not in PLACE and defaults.get(name) != value
    ]
    return Table(("option", "value", "default"), rows, words={0, 1, 2})


def shown_option(value: object) -> str:
    return str(value) if value != "" else "(empty)"


def shown_accuracy(value: float | None) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}"
