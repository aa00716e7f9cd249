"""`table.md`: the tables of a comparison under a caption that says how they were made. Nothing in it tells the time."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.compare.grid import Comparison
from experiments.compare.results import ResultOptions
from experiments.compare.table import Rows, Section, mean_over_devices, measured, named_reference
from experiments.output import as_markdown, installed, named
from experiments.statistics import TEST
from tapfl.config import RunConfig
from tapfl.models.forward import input_transform

WORDS = {
    "pruned": "accuracy among all classes",
    "pruned_own": "accuracy among the device's own classes",
    "own_share": "share of the metric set that is of the device's classes",
    "classes_covered": "share of the device's classes that occur in the metric set",
    "rank_ffn": "rank correlation (Spearman, mean over FFNs) of the scores with the oracle's",
    "rank_attention": "rank correlation (Spearman, mean over attentions) of the scores with the oracle's",
}


def page(sections: Iterable[Section], rows: Rows, comparison: Comparison, results: ResultOptions, command: str) -> str:
    """Returns the caption and the tables as Markdown."""
    parts = [caption(rows, comparison, results, command)]
    parts += [
        f"**{WORDS.get(each.measure, each.measure)} (`{each.measure}`), {each.devices}**\n\n{as_markdown(each.rows)}"
        for each in sections
    ]
    return "\n".join(parts)


def caption(rows: Rows, comparison: Comparison, results: ResultOptions, command: str) -> str:
    """Returns what a reader needs to know to make the tables again, and to judge them."""
    config: RunConfig = next(comparison.cells()).config
    height, width = input_transform(config.model).size
    kept = config.data.image_size or max(height, width)
    count = len(list(comparison.cells()))
    lines = [
        f"Made by `{command}`{'' if len(rows) == count else f', of which {len(rows)} of {count} cells were finished'}.",
        f"Backbone {config.model.name} at {height}×{width} px (images kept at {kept} px), "
        f"{config.devices.count} devices, metric set of {config.metric.size} images; "
        f"seeds {', '.join(map(str, comparison.axes['seed']))}.",
        "Mean ± standard deviation over devices and seeds (how many).",
    ]
    if len(measured(rows, "dense")):
        dense, own = (mean_over_devices(rows, name) for name in ("dense", "dense_own"))
        lines.append(f"Dense: {dense:.3f} among all classes, {own:.3f} among the device's own.")
    if results.reference:
        to = named_reference(results.values)
        lines.append(
            f"Differences to the line of {to}, else alike: mean over devices (p, n devices); {TEST}, not corrected for "
            "the number of lines."
        )
    lines.append(f"{named(installed())}.")
    return "\n".join(lines) + "\n"
