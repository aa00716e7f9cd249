"""What a search minimises: a weighted sum of errors, bytes and MACs of a run, under constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.jobs.federation import Engine, carry_out
from experiments.jobs.pool import Emit
from strategies.records import Summary
from tapfl.options import Scalar

# of a run so far; less is better for each
MEASURES: dict[str, Callable[[Summary], float]] = {
    "mean": lambda summary: 1 - summary.personal_accuracy,
    "worst-decile": lambda summary: 1 - summary.personal_accuracy_worst_decile,
    "bytes_up": lambda summary: summary.bytes_up,
    "bytes_down": lambda summary: summary.bytes_down,
    "macs": lambda summary: float(np.mean([device.macs_share for device in summary.devices])),
}


@dataclass(frozen=True)
class Constraint:
    measure: str
    limit: float


@dataclass(frozen=True)
class Objective:
    """A weighted sum of measures, and constraints on them.

    Attributes:
        weights: by measure; `mean` and `worst-decile` are errors (1 − accuracy), `bytes_*` count the whole run so far,
            `macs` is the mean share of the dense model's.
    """

    weights: Mapping[str, float]
    constraints: tuple[Constraint, ...] = ()

    def loss(self, measures: Mapping[str, float]) -> float:
        return sum(weight * measures[name] for name, weight in self.weights.items())

    def violation(self, measures: Mapping[str, float]) -> float:
        """Returns the sum of the excesses over the limits, each as a share of its limit; 0: all constraints are met."""
        over = [max(0.0, measures[c.measure] - c.limit) / (abs(c.limit) or 1.0) for c in self.constraints]
        return math.fsum(over)


def measured(emit: Emit, options: Mapping[str, Scalar], folder: Path, engine: Engine) -> dict[str, float]:
    """Begins a run, or goes on with it, and returns its measures: the job of one rung of a trial."""
    return measures_of(carry_out(emit, options, folder, engine))


def measures_of(summary: Summary) -> dict[str, float]:
    """Returns the measures of a run's summary."""
    return {name: float(measure(summary)) for name, measure in MEASURES.items()}
