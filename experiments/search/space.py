"""The options that a search varies, from TOML, and their coordinates in a unit cube for `experiments.search.sampler`.

```toml
[space]
"train.learning-rate" = { low = 1e-4, high = 3e-2, log = true }
"metric.size" = { low = 64, high = 448, step = 64 }
"adapters.server" = { choices = ["none", "adam"] }
"adapters.server-learning-rate" = { low = 1e-3, high = 1e-1, log = true, if = { "adapters.server" = "adam" } }
```

An option that accepts only whole numbers is searched over whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial
from pydantic import Field, Strict, field_validator, model_validator

from tapfl.config import RunConfig, binding
from tapfl.errors import ConfigError
from tapfl.options import Scalar, Section, validated
from tapfl.pruning.criteria.registry import require_criterion

Number = Annotated[float, Strict()]
Conditions = Mapping[str, tuple[Scalar, ...]]


class _Entry(Section):
    condition: dict[str, Any] = Field({}, alias="if")


class _Choices(_Entry):
    choices: list[Any]

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: list[Any]) -> list[Any]:
        if not choices or not all(isinstance(choice, Scalar) for choice in choices):
            raise ValueError("must be a list of values, at least one")
        if len(set(choices)) < len(choices):
            raise ValueError("names a value twice")
        return choices


class _Range(_Entry):
    low: Number
    high: Number
    log: Annotated[bool, Strict()] = False
    step: Annotated[Number, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log=true needs low above 0 and no step, got low={self.low:g}, step={self.step}")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step={self.step:g} must not be above high - low")
        return self


@dataclass(frozen=True)
class Parameter:
    """An option that is searched.

    Attributes:
        condition: by option, the values that another parameter must have for this one to exist.
    """

    distribution: BaseDistribution
    condition: Conditions

    def exists(self, params: Mapping[str, Scalar]) -> bool:
        return all(name in params and params[name] in values for name, values in self.condition.items())


@dataclass(frozen=True)
class SearchSpace:
    """All parameters in the order of the file; a condition refers only to earlier parameters."""

    parameters: Mapping[str, Parameter]

    @classmethod
    def parse(cls, table: Mapping[str, Any], options: Mapping[str, Scalar]) -> SearchSpace:
        """Returns the space of a table.

        Args:
            options: the options that all runs share.

        Raises:
            ConfigError: for the first entry that is not valid.
        """
        parameters: dict[str, Parameter] = {}
        for name, entry in table.items():
            try:
                parameters[name] = _parameter(name, entry, parameters, options)
            except ConfigError as error:
                raise ConfigError(f"space.{name}{error}") from None
        return cls(parameters)

    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: parameter.distribution for name, parameter in self.parameters.items()}

    def choices(self, name: str) -> tuple[Scalar, ...]:
        """Returns the choices of a parameter; an empty tuple if it is a number."""
        x = self.parameters[name].distribution
        return tuple(x.choices) if isinstance(x, CategoricalDistribution) else ()  # type: ignore[arg-type]

    def suggest(self, trial: Trial) -> dict[str, Scalar]:
        """Returns the options of a trial; those that were not drawn before are drawn now."""
        params: dict[str, Scalar] = {}
        for name, parameter in self.parameters.items():
            if not parameter.exists(params):
                continue
            x = parameter.distribution
            if isinstance(x, CategoricalDistribution):
                params[name] = trial.suggest_categorical(name, x.choices)  # type: ignore[assignment]
            elif isinstance(x, IntDistribution):
                params[name] = trial.suggest_int(name, x.low, x.high, step=x.step, log=x.log)
            elif isinstance(x, FloatDistribution):
                params[name] = trial.suggest_float(name, x.low, x.high, step=x.step, log=x.log)
        return params


def _parameter(name: str, entry: Any, above: Mapping[str, Parameter], options: Mapping[str, Scalar]) -> Parameter:
    defaults = RunConfig().flat()
    if name not in defaults:
        known = [option for option in defaults if option.startswith(name.split(".")[0])] or list(defaults)
        raise ConfigError(f": is not an option of a run; similar options: {', '.join(known[:12])}")
    if not binding({name: entry}):
        why = "is the budget" if name == "train.rounds" else "changes no result"
        raise ConfigError(f": {why}, and cannot be searched")
    if not isinstance(entry, Mapping):
        raise ConfigError(f" = {entry!r}: needs low and high (and log, step), or choices")
    try:
        read = validated(_Choices if "choices" in entry else _Range, entry)
    except ConfigError as error:
        text = str(error).splitlines()[0].removeprefix("configuration")
        raise ConfigError(text if text.startswith(":") else f".{text}") from None
    condition = {other: _allowed(other, value, above) for other, value in read.condition.items()}
    if isinstance(read, _Choices):
        distribution: BaseDistribution = CategoricalDistribution(read.choices)
        values = read.choices
    else:
        assert isinstance(read, _Range)
        distribution, values = _numbers(read, defaults[name])
    holds = {other: allowed[0] for other, allowed in condition.items()}
    for value in values:  # each choice, or both ends of the range, must be valid in a run
        try:
            require_criterion(RunConfig.from_flat({**options, **holds, name: value}).pruning.criterion)
        except ConfigError as error:
            raise ConfigError(f": {value!r} is not accepted: {error}") from None
    return Parameter(distribution, condition)


def _numbers(read: _Range, default: Scalar) -> tuple[BaseDistribution, list[float]]:
    """Returns the distribution of a range, and both ends of the range."""
    low, high, step = read.low, read.high, read.step
    if isinstance(default, bool) or not isinstance(default, int | float):
        raise ConfigError(": this option is not a number and needs choices")
    whole = isinstance(default, int)
    if whole and any(value % 1 for value in (low, high, step or 1)):
        raise ConfigError(f": this option takes whole numbers, got low={low:g}, high={high:g}, step={step}")
    if step and (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):  # exact, as Optuna computes it
        raise ConfigError(f": high={high:g} minus low={low:g} is not a multiple of step={step:g}")
    if not whole:
        return FloatDistribution(low, high, log=read.log, step=step), [low, high]
    return IntDistribution(int(low), int(high), log=read.log, step=int(step or 1)), [int(low), int(high)]


def _allowed(name: str, value: Any, above: Mapping[str, Parameter]) -> tuple[Scalar, ...]:
    """Returns the values of another parameter for which this one exists."""
    if name not in above:
        raise ConfigError(f".if: {name} must be in [space], before this option")
    allowed = tuple(value) if isinstance(value, list) else (value,)
    if not allowed or not all(isinstance(choice, Scalar) for choice in allowed):
        raise ConfigError(f".if: {name} = {value!r}: must be a value of this option, or a list of at least one value")
    x = above[name].distribution
    for choice in allowed:
        if isinstance(x, CategoricalDistribution):
            possible, values = choice in x.choices, ", ".join(map(str, x.choices))
        else:
            assert isinstance(x, IntDistribution | FloatDistribution)
            number = isinstance(choice, int | float) and not isinstance(choice, bool)
            possible, values = number and x.low <= float(choice) <= x.high, f"{x.low:g} to {x.high:g}"
        if not possible:
            raise ConfigError(f".if: {name} is never {choice!r}, only {values}")
    return allowed


# -- coordinates of the unit cube: a number lies in [0, 1], a category is the index of its choice ----------------------

Space = Mapping[str, BaseDistribution]


def choices(space: Space) -> np.ndarray:
    """Returns the number of choices of each parameter, int64 (d,); 0 for a number."""
    return np.array([len(x.choices) if isinstance(x, CategoricalDistribution) else 0 for x in space.values()], np.int64)


def encode(space: Space, internal: np.ndarray) -> np.ndarray:
    """Returns the coordinates, float64 (n, d), of Optuna's internal values (n, d); NaN stays NaN."""
    points = internal.copy()
    for j, x in enumerate(space.values()):
        if isinstance(x, FloatDistribution | IntDistribution):
            low, high = _ends(x)
            values = np.log(internal[:, j]) if x.log else internal[:, j]
            points[:, j] = np.clip((values - low) / (high - low), 0, 1)
    return points


def decode(space: Space, points: np.ndarray) -> np.ndarray:
    """Returns Optuna's internal values (n, d) of coordinates; the inverse of `encode`."""
    internal = points.copy()
    for j, x in enumerate(space.values()):
        if isinstance(x, FloatDistribution | IntDistribution):
            low, high = _ends(x)
            values = low + points[:, j] * (high - low)
            values = np.exp(values) if x.log else values
            if x.step:
                values = x.low + x.step * np.round((values - x.low) / x.step)
            internal[:, j] = np.clip(values, x.low, x.high)
    return internal


def _ends(x: FloatDistribution | IntDistribution) -> tuple[float, float]:
    half = (x.step or 0) / 2
    low, high = x.low - half, x.high + half
    return (math.log(low), math.log(high)) if x.log else (low, high)


def uniform(space: Space, n: int, generator: np.random.Generator) -> np.ndarray:
    """Returns the coordinates of `n` random points of the space, float64 (n, d)."""
    u, counts = generator.random((n, len(space))), choices(space)
    return np.where(counts > 0, np.floor(u * counts), u)


def internal_values(space: Space, params: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Returns Optuna's internal values of parameters, float64 (n, d); NaN for a parameter that does not exist."""
    rows = [[x.to_internal_repr(row[name]) if name in row else math.nan for name, x in space.items()] for row in params]
    return np.array(rows, dtype=np.float64).reshape(len(params), len(space))


def external_values(space: Space, internal: np.ndarray) -> dict[str, Any]:
    """Returns the parameters for one row of internal values."""
    values = {name: x.to_external_repr(float(internal[j])) for j, (name, x) in enumerate(space.items())}
    return {name: int(value) if isinstance(space[name], IntDistribution) else value for name, value in values.items()}
