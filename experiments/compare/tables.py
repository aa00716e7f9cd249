"""The tables of a comparison: mean ± standard deviation over devices and seeds, and differences to a reference line.

Results are a `pandas.DataFrame` of text with one row per cell, as in `results.csv`; missing measures are empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import pandas as pd

from experiments.compare.folder import Origin, inputs_in_words
from experiments.compare.grid import IMAGES, OWNER, WITHIN_LINE, Comparison, ResultOptions
from experiments.output import as_markdown, caption
from experiments.statistics import CORRECTED, TEST, Paired, corrected, from_text, image_error, paired
from tapfl.config import ModelOptions
from tapfl.models.forward import input_transform
from tapfl.pruning.budget import Budget

LONGEST = 40  # letters of a reference that fit into the header of a column
WORDS = {
    "pruned": "accuracy among all classes",
    "pruned_own": "accuracy among the device's own classes",
    "own_share": "share of the metric set in the device's classes",
    "classes_covered": "share of the device's classes that occur in the metric set",
    "rank_ffn": "rank correlation (Spearman, mean over FFNs) of the scores with the oracle's",
    "rank_attention": "rank correlation (Spearman, mean over attentions) of the scores with the oracle's",
}


@dataclass(frozen=True)
class Section:
    """One table: its measure, its devices as text, and its rows as text."""

    measure: str
    devices: str
    rows: list[Mapping[str, str]]


def sections(rows: pd.DataFrame, comparison: Comparison, results: ResultOptions) -> Iterator[Section]:
    """Yields the tables of each measure: over the devices on which no method was tuned, and over all devices."""
    devices = comparison.axes["device"]
    others = [str(device) for device in devices if device not in results.chosen_on]
    for measure in results.show:
        apart = rows[rows["device"].isin(others)]
        if results.chosen_on and len(apart):
            title = f"devices {', '.join(others)}, on which nothing was chosen"
            yield Section(measure, title, table(apart, comparison, measure, results.values))
        title = f"all {len(devices)} devices" if len(devices) > 1 else f"device {devices[0]}"
        yield Section(measure, title, table(rows, comparison, measure, results.values))


def table(
    rows: pd.DataFrame,
    comparison: Comparison,
    measure: str = "pruned_own",
    reference: Mapping[str, str] | None = None,
) -> list[Mapping[str, str]]:
    """Returns one row per line and one column per budget: mean ± standard deviation (number of values).

    Args:
        reference: axis -> value; adds one column per budget with the difference to the line that has these values.
            Holm's correction is over the lines of the column that are compared with the same reference.
    """
    lines, reference = line_axes(comparison), reference or {}
    budgets = {str(budget): budget.title for budget in map(Budget.parse, comparison.axes["budget"])}
    to = named_reference(reference)
    to = f"({to})" if len(to) <= LONGEST else "reference"  # the caption names it
    groups = dict(iter(rows.groupby([*lines, "budget"], sort=False)))
    keys = list(dict.fromkeys(key[:-1] for key in groups))
    named = [dict(zip(lines, key, strict=True)) for key in keys]
    bases = {key: tuple((row | dict(reference))[axis] for axis in lines) for key, row in zip(keys, named, strict=True)}
    for budget, title in budgets.items():
        found = {key: groups.get((*key, budget), rows[:0]) for key in {*keys, *bases.values()}}
        apart = {key: difference(found[key], found[bases[key]], measure) for key in keys if bases[key] != key}
        tests = corrected({key: test for key, test in apart.items() if test}, bases)
        for key, row in zip(keys, named, strict=True):
            row[title] = _spread(found[key], measure)
            if reference:
                row[f"{title} − {to}"] = "reference" if bases[key] == key else str(tests.get(key, ""))
    return list(named)


def line_axes(comparison: Comparison) -> list[str]:
    """Returns the axes that distinguish the lines of a table.

    These are the criterion and every axis with several values, except seed, device and budget.
    """
    several = [axis for axis, values in comparison.axes.items() if len(values) > 1]
    return ["criterion", *(axis for axis in several if axis not in ("criterion", *WITHIN_LINE))]


def named_reference(reference: Mapping[str, str]) -> str:
    """Returns a reference as on the command line: ``axis=value axis=value``."""
    return " ".join(f"{axis}={value}" for axis, value in reference.items())


def measured(rows: pd.DataFrame, measure: str) -> pd.Series[float]:
    """Returns the values of a measure, indexed by device and seed, for the rows that have it."""
    return _known(rows, measure)[measure].astype(float)


def _known(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Returns the rows that have a measure, indexed by device and seed."""
    return rows[rows[measure] != ""].set_index(OWNER)


def mean_over_devices(rows: pd.DataFrame, measure: str) -> float | None:
    """Returns the mean of a measure that is the same for all lines, such as the dense accuracy.

    Each combination of device and seed counts once. The result is None if no row has the measure, or if it is not the
    same for all lines, as when an axis changes the dense model.
    """
    owners = measured(rows, measure).groupby(level=OWNER, sort=False)
    return float(owners.first().mean()) if len(owners) and (owners.nunique() == 1).all() else None


def difference(line: pd.DataFrame, reference: pd.DataFrame, measure: str) -> Paired | None:
    """Returns the difference of a line to the reference, over the devices and seeds of both; None if there are none."""
    both = pd.concat([measured(line, measure), measured(reference, measure)], axis=1, join="inner", keys=[0, 1])
    if both.empty:
        return None
    means = both.groupby(level="device", sort=False).mean()
    found = paired(means[0].to_dict(), means[1].to_dict())
    if measure not in IMAGES:
        return found
    ours, theirs = (_known(rows, measure)[IMAGES[measure]].map(from_text) for rows in (line, reference))
    apart = {
        device: [ours[key] - theirs[key] for key in keys] for device, keys in both.groupby("device").groups.items()
    }
    return replace(found, error=image_error(apart))


def _spread(rows: pd.DataFrame, measure: str) -> str:
    values = measured(rows, measure)
    if values.empty:
        return "refused" if rows["refused"].any() else ""
    return f"{values.mean():.3f} ± {values.std() if len(values) > 1 else 0:.3f} ({len(values)})"


def page(
    tables: Iterable[Section],
    rows: pd.DataFrame,
    comparison: Comparison,
    origin: Origin,
    results: ResultOptions,
    command: str,
) -> str:
    """Returns `table.md`: the caption and the tables as Markdown, without a date."""
    parts = [caption_of(rows, comparison, origin, results, command) + "\n"]
    for part in tables:
        title = f"**{WORDS.get(part.measure, part.measure)} (`{part.measure}`), {part.devices}**"
        parts.append(f"{title}\n\n{as_markdown(part.rows)}")
    return "\n".join(parts)


def caption_of(rows: pd.DataFrame, comparison: Comparison, origin: Origin, results: ResultOptions, command: str) -> str:
    """Returns the caption: how the tables were made, and what their numbers mean."""
    cells = list(comparison.cells())
    configs = [cell.config for cell in cells]
    backbones = {(config.model.name, config.model.args): config.model for config in configs}.values()
    counts, sizes = _each(config.devices.count for config in configs), _each(config.metric.size for config in configs)
    about = [
        f"backbone {_each(map(_backbone, backbones))}",
        *inputs_in_words(origin, comparison),
        f"{counts} devices, metric set of {sizes} images",
        "mean ± standard deviation over devices and seeds (number of values)",
    ]
    if len(rows) < len(cells):
        about.append(f"{len(rows)} of {len(cells)} cells were finished")
    dense, own = (mean_over_devices(rows, name) for name in ("dense", "dense_own"))
    if dense is not None and own is not None:
        about.append(f"dense: {dense:.3f} among all classes, {own:.3f} among the device's own")
    if results.reference:
        about.append(
            f"differences to the line with {named_reference(results.values)}: mean over devices ± standard error "
            "over their images, paired (p, Holm, n devices); "
            f"p: {TEST}; {CORRECTED} in a column"
        )
    versions = {package: " and ".join(known) for package, known in origin.versions.items()}
    return caption(command, (config.seed for config in configs), versions, about)


def _backbone(options: ModelOptions) -> str:
    height, width = input_transform(options).size
    return f"{options.name} at {height}×{width} px"


def _each(values: Iterable[object]) -> str:
    """Returns the different values among those of all cells: ``64 or 128``."""
    return " or ".join(dict.fromkeys(map(str, values)))
