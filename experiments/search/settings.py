"""The file of a search: `[search]` has the method, `[space]` the options to vary, the rest are options of all runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from experiments.preflight import DEFAULT_DEVICES
from experiments.search.schedule import Rungs, Schedule, bracket_tables, cost
from experiments.search.space import SearchSpace
from strategies.records import Summary
from tapfl.config import RunConfig, binding
from tapfl.data.contents import OPTIONS, fingerprints
from tapfl.errors import ConfigError
from tapfl.options import Count, Scalar, Section, flatten, read_toml_tables, validated
from tapfl.pruning.criteria.registry import require_criterion

Method = Literal["bohb", "tpe-hyperband", "random"]
FREE = {"brackets", "rounds", "keep"}  # may differ when a search is continued
UNSEEN: dict[str, Scalar] = {"data.evaluate": "validation"}  # so that options are not chosen on test images
COMPARISON = re.compile(r"\s*([a-z_-]+)\s*<=\s*([0-9.eE+-]+)\s*")
# measures of a run after its rounds so far; less is better for each
MEASURES: dict[str, Callable[[Summary], float]] = {
    "mean": lambda summary: 1 - summary.personal_accuracy,
    "worst-decile": lambda summary: 1 - summary.personal_accuracy_worst_decile,
    "bytes_up": lambda summary: summary.bytes_up,
    "bytes_down": lambda summary: summary.bytes_down,
    "macs": lambda summary: float(np.mean([device.macs_share for device in summary.equipped])),
}


class SearchOptions(Section):
    """How configurations are drawn and ranked, and the budget of the search."""

    method: Method = "bohb"
    eta: float = Field(3.0, ge=2, description="one in eta configurations continues to the next rung")
    min_rounds: Count = Field(1, description="rounds of the first rung")
    max_rounds: Count = Field(9, description="rounds of the last rung, R")
    brackets: int = Field(0, ge=0, description="brackets to open; 0: one iteration, or as many as `rounds` allows")
    rounds: int = Field(0, ge=0, description="open brackets until they cost this many rounds; 0: no limit")
    seed: int = Field(0, ge=0, lt=2**32)
    random_share: float = Field(1 / 3, ge=0, le=1, description="ρ: share of configurations that are drawn uniformly")
    block: int = Field(
        4, ge=0, description="configurations drawn together, from the same observations; 0: a whole rung"
    )
    overlap: int = Field(1, ge=0, description="number of earlier brackets that may be unfinished when a new one begins")
    objective: dict[str, float] = Field(
        {"mean": 1.0}, description=f"measures to minimise, with weights; accepted: {[*MEASURES]}"
    )
    constraints: tuple[str, ...] = Field((), description="such as bytes_up<=5e6; a trial that violates one ranks last")
    keep: Literal["all", "best"] = Field("all", description="trials whose checkpoints and models stay on disk")

    @field_validator("objective", "constraints", mode="before")
    @classmethod
    def _one(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        return {value: 1.0} if info.field_name == "objective" else (value,)

    @field_validator("objective")
    @classmethod
    def _known_measures(cls, value: dict[str, float]) -> dict[str, float]:
        if unknown := sorted(value.keys() - set(MEASURES)):
            raise ValueError(f"{', '.join(unknown)} is not a measure; accepted: {', '.join(MEASURES)}")
        if not value or any(weight <= 0 for weight in value.values()):
            raise ValueError("needs weights above 0, because every measure is minimised")
        return value

    @field_validator("constraints")
    @classmethod
    def _comparisons(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            _comparison(text)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SearchOptions:
        if self.min_rounds > self.max_rounds:
            raise ValueError(f"min-rounds={self.min_rounds} must not be above max-rounds={self.max_rounds}")
        if self.brackets and self.rounds:
            raise ValueError(f"brackets={self.brackets} and rounds={self.rounds}: only one of them can be given")
        if self.method == "tpe-hyperband" and self.eta % 1:
            raise ValueError(f"eta={self.eta:g} must be a whole number with method=tpe-hyperband")
        return self

    def loss(self, measures: Mapping[str, float]) -> float:
        """Returns the weighted sum of the measures of a run."""
        return sum(weight * measures[name] for name, weight in self.objective.items())

    def violation(self, measures: Mapping[str, float]) -> float:
        """Returns the sum of the excesses over the limits, relative to the limits; 0 if all constraints hold."""
        limits = [_comparison(text) for text in self.constraints]
        return math.fsum(max(0.0, measures[name] - limit) / (abs(limit) or 1.0) for name, limit in limits)


def _comparison(text: str) -> tuple[str, float]:
    """Returns measure and limit of a text such as ``bytes_up<=5e6``. Raises ValueError if it has another form."""
    match = COMPARISON.fullmatch(text)
    if not match or match[1] not in MEASURES:
        raise ValueError(f"{text!r} must have the form measure<=number; measures are {', '.join(MEASURES)}")
    return match[1], float(match[2])


class _File(Section):
    search: SearchOptions = SearchOptions()


@dataclass(frozen=True)
class Search:
    """A search whose options were checked.

    Attributes:
        options: the options that all runs share, by dotted name.
    """

    settings: SearchOptions
    space: SearchSpace
    options: dict[str, Scalar]

    def schedule(self) -> Schedule:
        """Returns the brackets of the search; for `random` one bracket with one rung, which costs as much as BOHB's."""
        s = self.settings
        one = bracket_tables(s.min_rounds, s.max_rounds, s.eta)
        tables: list[Rungs] = []
        spent, wanted = 0, s.brackets or (0 if s.rounds else len(one))
        while len(tables) < wanted or spent < s.rounds:
            tables.append(one[len(tables) % len(one)])
            spent += cost(tables[-1])
        if s.method == "random":
            tables = [((max(1, spent // s.max_rounds), s.max_rounds),)]
        return Schedule(tuple(tables), s.block, s.overlap)

    @property
    def rounds(self) -> int:
        """The cost of the search if nothing fails."""
        return sum(map(cost, self.schedule().brackets))

    def identity(self) -> dict[str, str]:
        """Returns everything that must not change when a search is continued, by name."""
        settings = self.settings.model_dump(mode="json", by_alias=True, exclude=FREE)
        parts = {f"search.{name}": value for name, value in settings.items()}
        parts |= {f"space.{name}": str(value) for name, value in self.space.parameters.items()}
        parts |= binding(self.options)
        return {name: json.dumps(value, sort_keys=True) for name, value in parts.items()}

    def inputs(self) -> dict[str, str]:
        """Returns the `fingerprints` of the inputs that options name, for every choice of options that vary."""
        named = [(option, value) for option in OPTIONS for value in self.values(option)]
        return fingerprints(named, require=False)

    def values(self, option: str) -> tuple[Scalar, ...]:
        """Returns the values of an option in the trials: its choices, and the shared value if it has a condition."""
        parameter, shared = self.space.parameters.get(option), RunConfig.from_flat(self.options).flat()[option]
        drawn = self.space.choices(option) if parameter else ()
        return drawn if parameter and not parameter.condition else (*drawn, shared)


def read_search(file: Path, method: str | None = None) -> Search:
    """Returns the search of a TOML file.

    Args:
        method: overrides the method in the file.

    Raises:
        ConfigError: if the file, an option or the space is not valid.
    """
    tables = read_toml_tables(file)
    how, where = tables.pop("search", {}), tables.pop("space", None)
    if not isinstance(how, dict):
        raise ConfigError(f"{file}: search must be a table, [search]")
    settings = validated(_File, {"search": how | ({"method": method} if method else {})}).search
    shared = flatten(tables)
    counted = RunConfig.from_flat({**UNSEEN, **shared}).data.makes_devices  # each run counts them in the images
    options = {**UNSEEN, **({} if counted else {"devices.count": DEFAULT_DEVICES}), **shared}
    require_criterion(RunConfig.from_flat(options).pruning.criterion)
    if not isinstance(where, dict) or not where:
        raise ConfigError(
            f'{file}: needs a table [space], such as "train.learning-rate" = {{ low = 1e-4, high = 0.1 }}'
        )
    search = Search(settings, SearchSpace.parse(where, options), options)
    changing = [value for value in search.values("train.schedule") if value != "constant"]
    if changing and any(len(rungs) > 1 for rungs in search.schedule().brackets):
        raise ConfigError(
            f"train.schedule = {changing[0]!r}: the learning rates depend on the number of rounds, so that a trial "
            "cannot go on to its next rung; accepted: constant, or search.method = random, or min-rounds = max-rounds"
        )
    return search
