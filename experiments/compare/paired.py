"""Two lines of a comparison, device by device: they met the same images, so their difference says more than means do.

The unit is the device: its value is the mean over the seeds that both lines have. Tested is whether the mean difference
is zero, by the two-sided paired t-test (`scipy.stats.ttest_rel`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_rel

TEST = "two-sided paired t-test over devices, on means over seeds (scipy.stats.ttest_rel)"


@dataclass(frozen=True)
class Difference:
    """A line minus the reference line.

    Attributes:
        mean: over devices.
        p: of the test; None where there is none to make: one device, or the same difference on all.
        devices: how many both lines have.
    """

    mean: float
    p: float | None
    devices: int

    def __str__(self) -> str:
        p = "" if self.p is None else "p < 0.001, " if self.p < 0.001 else f"p = {self.p:.3f}, "
        return f"{self.mean:+.3f} ({p}{self.devices})"


def difference(
    line: Sequence[Mapping[str, str]], reference: Sequence[Mapping[str, str]], measure: str
) -> Difference | None:
    """Returns how the rows of a line differ from those of the reference; None if they have no device in common."""
    ours, theirs = _values(line, measure), _values(reference, measure)
    common = ours.keys() & theirs.keys()
    devices = sorted({device for device, _ in common})
    if not devices:
        return None
    means = np.array(
        [[np.mean([values[k] for k in sorted(common) if k[0] == i]) for i in devices] for values in (ours, theirs)]
    )
    differences = means[0] - means[1]
    p = None if np.ptp(differences) < 1e-12 else float(ttest_rel(*means).pvalue)
    return Difference(float(differences.mean()), p, len(devices))


def _values(rows: Sequence[Mapping[str, str]], measure: str) -> dict[tuple[int, int], float]:
    """Returns the measure by device and seed, of the rows that have it."""
    return {(int(row["device"]), int(row["seed"])): float(row[measure]) for row in rows if row[measure]}
