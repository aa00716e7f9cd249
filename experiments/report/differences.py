"""Several runs beside each other: what they are called, what they differ in, and how they got where they are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.report import series
from experiments.report.reading import Run
from experiments.report.series import Row
from experiments.report.tables import PLACE

AXES = {"round": "rounds", "MB": "bytes", "seconds": "simulated time"}  # over which runs are compared


def names(runs: Sequence[Run]) -> list[str]:
    """Returns what each run is called: the last part of its path, or as much of it as tells them apart."""
    paths = [run.path for run in runs]
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    common = Path(os.path.commonpath(paths))
    short = [str(path.relative_to(common)) for path in paths]
    seen: Counter[str] = Counter()
    for k, name in enumerate(short):  # the same folder, given twice
        seen[name] += 1
        short[k] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return short


def differing(runs: Sequence[Run]) -> list[str]:
    """Returns the options in which the runs differ, but for where they lie."""
    options = dict.fromkeys(option for run in runs for option in run.config)
    return [
        option
        for option in options
        if option not in PLACE - {"devices.count"} and len({repr(run.config.get(option)) for run in runs}) > 1
    ]


def curve(run: Run) -> list[Row]:
    """Returns round, MB (sent and received by all devices until its end), seconds (simulated), accuracy."""
    means = {
        row["round"]: row["mean"] for row in series.spread(series.curves(run), "accuracy") if row["kind"] == "personal"
    }
    return [
        {
            "round": line["round"],
            "MB": (line["bytes_up"] + line["bytes_down"]) / 1e6,
            "seconds": line["simulated_seconds"],
            "accuracy": means[line["round"]],
        }
        for line in run.of_kind("round")
        if line["round"] in means
    ]
