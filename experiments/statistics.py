"""A paired test over devices: is the difference between two methods more than chance?

Results should generalise to other devices. Several seeds of one device are not independent evidence, so a device
counts as one value, the mean over its seeds. The test is the two-sided sign-flip permutation test on the mean
difference (`scipy.stats.permutation_test`, ``permutation_type="samples"``): if the methods were equally good, the
difference of each device could as well have the other sign. The test makes no other assumption about the distribution
of the differences, and stays valid with ties, which are common for accuracies on few test images. With up to 16
devices all sign flips are tried; with more, 65,536 random ones.

If many methods are compared with one reference, some differ by chance. Holm's correction (Scandinavian Journal of
Statistics 6, 1979) bounds the probability of even one false difference among them. For p-values in increasing order,
p_(1) ≤ … ≤ p_(m),

    Holm's p_(i) = max over j ≤ i of min(1, (m − j + 1) p_(j))

It holds for any dependence between the tests.

A difference also has a standard error over images: how much it would vary with other test images of the same devices.
The difference of each image is -1, 0 or 1, so that images that both methods get right, or both get wrong, add nothing.
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
    """The difference between two methods.

    Attributes:
        difference: mean over devices of value - reference.
        p: p-value of the two-sided test, at least 2 / 2^n; 1 if all differences are zero.
        n: number of devices that both methods have.
        holm: p-value after Holm's correction over a family of tests; None: not corrected.
        error: standard error of the difference over the devices' images; None: not known.
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
    """Tests whether `values` differ from `reference`, both by device; devices that only one has are left out.

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
    """Returns which images (n,) a model classifies correctly, as a hexadecimal number whose first bit is always 1."""
    return f"{int('1' + ''.join('1' if correct else '0' for correct in right), 2):x}"


def from_text(text: str) -> np.ndarray:
    """Inverts `as_text`; returns float64 (n,) of 0 and 1."""
    return np.array([float(bit) for bit in f"{int(text, 16):b}"[1:]])


def image_error(apart: Mapping[Hashable, Sequence[np.ndarray]]) -> float:
    """Returns the standard error of the mean over devices of the mean difference over each device's images.

    Args:
        apart: for each device and each of its seeds, the differences of the test images (n,). The seeds of a device
            share most images, so they do not reduce its error: it is the mean of the errors of single seeds.
    """
    variances = [np.mean([seed.std(ddof=1) / np.sqrt(len(seed)) for seed in seeds]) ** 2 for seeds in apart.values()]
    return float(np.sqrt(np.sum(variances)) / len(variances))


def against_references(devices: Sequence[DeviceRecord]) -> dict[str, Paired]:
    """Returns the difference of the personal accuracies to those of each of `personalize.references`, by its name."""
    personal: dict[Hashable, float] = {device.device: device.personal_accuracy for device in devices}
    theirs = {device.device: device.reference_accuracies or {} for device in devices}
    names = dict.fromkeys(name for known in theirs.values() for name in known)
    return {name: paired(personal, {i: known[name] for i, known in theirs.items() if name in known}) for name in names}


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values after Holm's correction, in the order of `p_values`."""
    p = np.asarray(p_values, dtype=float)
    order = p.argsort(kind="stable")
    found = np.empty_like(p)
    found[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return found.tolist()


def corrected(tests: Mapping[Key, Paired], references: Mapping[Key, Hashable]) -> dict[Key, Paired]:
    """Returns the tests with Holm's p-values, corrected over the tests that have the same reference."""
    families: dict[Hashable, list[Key]] = {}
    for key in tests:
        families.setdefault(references[key], []).append(key)
    found: dict[Key, Paired] = {}
    for members in families.values():
        values = holm([tests[key].p for key in members])
        found |= {key: replace(tests[key], holm=value) for key, value in zip(members, values, strict=True)}
    return found
