"""The page of one run."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.figures.figure import Figure
from experiments.figures.page import Page, Section
from experiments.report import tables, wording
from experiments.report.figures import figures
from experiments.report.reading import Run

CHAPTERS = {
    "How well the devices do": ("accuracy", "curves", "alpha"),
    "Which images they hold, and which stand for them": ("partition", "metric-classes", "coverage"),
    "What stays of the model": ("kept-attention", "kept-ffn"),
    "What it cost": ("bytes", "simulated-rounds", "real-phases", "real-rounds"),
}


def page_of(run: Run) -> Page:
    """Returns what there is to see of a run."""
    made = figures(run)
    sections = [Section("Devices", table=tables.devices(run), pick=True)] if run.devices else []
    for title, names in CHAPTERS.items():
        if chosen := list(_named(made, names)):
            sections.append(Section(title, chosen))
    lost = tables.events(run)
    nothing = "" if lost.rows else "Every message was answered, and every device was there in every round."
    if run.lines:
        sections.append(Section("Faults, absences and refusals", table=lost if lost.rows else None, note=nothing))
    changed = tables.changed_options(run)
    details = [("All options", tables.options(run)), ("Versions", tables.versions(run))]
    sections.append(
        Section(
            "Options",
            table=changed if changed.rows else None,
            note="" if changed.rows else "All options have their default values.",
            details=[(name, shown) for name, shown in details if shown.rows],
        )
    )
    return Page(
        wording.title(run),
        wording.lead(run),
        sections,
        wording.headline(run),
        run.missing,
        f"The run's folder: {run.path}",
        [device["device"] for device in run.devices],
    )


def _named(made: Iterable[Figure], names: Iterable[str]) -> Iterable[Figure]:
    by_name = {figure.name: figure for figure in made}
    return (by_name[name] for name in names if name in by_name)
