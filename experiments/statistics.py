"""Are the differences between two methods more than chance? A paired test over devices.

Devices are what a result should generalise over; seeds of one device are no independent evidence, and count as one
value, their mean. The test is the sign-flip permutation test on the mean difference (`scipy.stats.permutation_test`,
``permutation_type="samples"``, two-sided): if the methods were alike, each device's difference could as well have had
the other sign. It assumes nothing of the differences' distribution, and ties, of which accuracies on small test parts
are full, do it no harm. All sign flips are tried up to 16 devices; above, 65,536 drawn ones.

Of many methods against one reference some differ by chance. Holm's correction (Scandinavian Journal of Statistics 6,
1979) bounds the chance of even one wrong difference among them: with the p-values in order, p_(1) ≤ … ≤ p_(m),

    Holm's p_(i) = max over j ≤ i of min(1, (m − j + 1) p_(j))

whatever the dependence between the tests.

A difference also has a standard error over images, which says what other test images of the same devices would change:
each image counts as -1, 0 or 1, so that what both methods find hard cancels.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy import stats

from strategies.records import DeviceRecord
from tapfl.seeds import numpy_generator

TEST = "two-sided sign-flip permutation test over devices (scipy.stats.permutation_test)"
CORRECTED = "Holm: p by Holm's correction over all comparisons with the same reference"
FLIPS = 2**16
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Paired:
    """What two methods differ by.

    Attributes:
        difference: mean over devices of value - reference.
        p: of the two-sided test; 1 where all differences are zero. No smaller than 2 / 2^n.
        n: devices that both have.
        holm: p by Holm's correction over the tests that this one is among; None: it stands alone.
        error: standard error of the difference over the devices' images; None: it is not known.
    """

    difference: float
    p: float
    n: int
    holm: float | None = None
    error: float | None = None

    def __str__(self) -> str:
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        holm = "" if self.holm is None else ", Holm < 0.001" if self.holm < 0.001 else f", Holm {self.holm:.3f}"
        error = "" if self.error is None else f" ± {self.error:.3f}"
        return f"{self.difference:+.3f}{error} ({p}{holm}, n = {self.n})"


def paired(values: Mapping[Hashable, float], reference: Mapping[Hashable, float]) -> Paired:
    """Tests whether `values` differ from `reference`, device by device; devices that only one has are left out.

    Raises:
        ValueError: if they have no device in common.
    """
    both = [device for device in values if device in reference]
    if not both:
        raise ValueError("no device has both a value and a reference")
    differences = np.array([values[device] - reference[device] for device in both])
    if len(both) == 1 or not differences.any():
        return Paired(float(differences.mean()), 1.0, len(both))
    found = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=FLIPS,
        batch=FLIPS // 16,
        vectorized=True,
        rng=numpy_generator(0, "sign flips"),
    )
    return Paired(float(differences.mean()), min(1.0, float(found.pvalue)), len(both))


def as_text(right: Sequence[bool]) -> str:
    """Returns which images a model is right about, (n,), as a hexadecimal number; its first bit is always 1."""
    return f"{int('1' + ''.join('1' if each else '0' for each in right), 2):x}"


def from_text(text: str) -> np.ndarray:
    """Returns what `as_text` wrote, float64 (n,) of 0 and 1."""
    return np.array([float(bit) for bit in f"{int(text, 16):b}"[1:]])


def image_error(apart: Mapping[Hashable, Sequence[np.ndarray]]) -> float:
    """Returns the standard error of the mean over devices of the mean difference over a device's images.

    Args:
        apart: by device, for each of its seeds, the difference of every test image (n,). Seeds share most of a device's
            images, so that they make its error no smaller: it is that of one seed.
    """
    variances = [np.mean([each.std(ddof=1) / np.sqrt(len(each)) for each in seeds]) ** 2 for seeds in apart.values()]
    return float(np.sqrt(np.sum(variances)) / len(variances))


def against_references(devices: Sequence[DeviceRecord]) -> dict[str, Paired]:
    """Returns how the personal accuracies differ from those of each of `personalize.references`, by its name."""
    personal: dict[Hashable, float] = {each.device: each.personal_accuracy for each in devices}
    beside = {each.device: each.reference_accuracies or {} for each in devices}
    names = dict.fromkeys(name for known in beside.values() for name in known)
    return {name: paired(personal, {i: known[name] for i, known in beside.items() if name in known}) for name in names}


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values by Holm's correction, in the order of `p_values`."""
    p = np.asarray(p_values, dtype=float)
    order = p.argsort(kind="stable")
    found = np.empty_like(p)
    found[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return found.tolist()


def corrected(tests: Mapping[Key, Paired], references: Mapping[Key, Hashable]) -> dict[Key, Paired]:
    """Returns the tests with Holm's p, each corrected over those that have the same reference."""
    families: dict[Hashable, list[Key]] = {}
    for key in tests:
        families.setdefault(references[key], []).append(key)
    found: dict[Key, Paired] = {}
    for members in families.values():
        values = holm([tests[key].p for key in members])
        found |= {key: replace(tests[key], holm=value) for key, value in zip(members, values, strict=True)}
    return found
