"""A space over the options of a run, from TOML.

```toml
[space]
"train.learning-rate" = { low = 1e-4, high = 3e-2, log = true }
"metric.size" = { low = 64, high = 448, step = 64 }
"adapters.server" = { choices = ["none", "adam"] }
"adapters.server-learning-rate" = { low = 1e-3, high = 1e-1, log = true, if = { "adapters.server" = "adam" } }
```

`SearchSpace` is the space as the file describes it; below it are its parameters as coordinates of a unit cube, for
`experiments.search.sampler`.

An option that takes whole numbers is searched in whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from tapfl.config import RunConfig, binding
from tapfl.errors import ConfigError
from tapfl.options import Scalar

RANGE, CHOICE = {"low", "high", "log", "step", "if"}, {"choices", "if"}


@dataclass(frozen=True)
class Parameter:
    """One option that is searched.

    Attributes:
        condition: values that other parameters must have for this one to exist, by option.
    """

    distribution: BaseDistribution
    condition: Mapping[str, tuple[Scalar, ...]]

    def exists(self, params: Mapping[str, Scalar]) -> bool:
        return all(name in params and params[name] in values for name, values in self.condition.items())


@dataclass(frozen=True)
class SearchSpace:
    """All parameters, in the order of the file; a condition names only those above it."""

    parameters: Mapping[str, Parameter]

    @classmethod
    def parse(cls, table: Mapping[str, Any], options: Mapping[str, Scalar]) -> SearchSpace:
        """Returns the space of a table.

        Args:
            options: what all runs share.

        Raises:
            ConfigError: naming the first entry that is not valid.
        """
        defaults, parameters = RunConfig().flat(), dict[str, Parameter]()
        for name, entry in table.items():
            where = f"space.{name}"
            if name not in defaults:
                known = [option for option in defaults if option.startswith(name.split(".")[0])] or list(defaults)
                raise ConfigError(f"{where}: is not an option of a run; close ones are {', '.join(known[:12])}")
            if not binding({name: entry}):
                why = "is the budget" if name == "train.rounds" else "changes no result"
                raise ConfigError(f"{where}: {why}, and cannot be searched")
            if not isinstance(entry, Mapping) or not (entry.keys() <= RANGE or entry.keys() <= CHOICE):
                raise ConfigError(
                    f"{where} = {entry!r}: needs low and high (and log, step), or choices, and perhaps if"
                )
            distribution = _distribution(where, entry, defaults[name])
            condition = _condition(where, entry.get("if", {}), parameters)
            _accepted(where, name, distribution, condition, options)
            parameters[name] = Parameter(distribution, condition)
        return cls(parameters)

    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: parameter.distribution for name, parameter in self.parameters.items()}

    def suggest(self, trial: Trial) -> dict[str, Scalar]:
        """Returns the options that a trial draws, or has drawn before."""
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


def _distribution(where: str, entry: Mapping[str, Any], default: Scalar) -> BaseDistribution:
    if "choices" in entry:
        choices = entry["choices"]
        if (
            not isinstance(choices, list)
            or not choices
            or not all(isinstance(c, bool | int | float | str) for c in choices)
        ):
            raise ConfigError(f"{where}.choices = {choices!r}: must be a list of values, at least one")
        if len(set(choices)) < len(choices):
            raise ConfigError(f"{where}.choices = {choices!r}: names a value twice")
        return CategoricalDistribution(choices)
    if isinstance(default, bool) or not isinstance(default, int | float):
        raise ConfigError(f"{where}: this option is no number, it needs choices")
    low, high, log, step = entry.get("low"), entry.get("high"), entry.get("log", False), entry.get("step")
    for name, value in (("low", low), ("high", high), ("step", step)):
        wrong = isinstance(value, bool) or not isinstance(value, int | float)
        if wrong and not (name == "step" and value is None):
            raise ConfigError(f"{where}.{name} = {value!r}: must be a number")
    assert low is not None and high is not None
    if not low < high:
        raise ConfigError(f"{where}: low={low} must be below high={high}")
    if not isinstance(log, bool) or (log and low <= 0):
        raise ConfigError(f"{where}: log={log} needs low above 0, got low={low}")
    if step is not None and (log or not 0 < step <= high - low):
        raise ConfigError(f"{where}: step={step} must lie in (0, high - low], and does not go with log")
    if isinstance(default, float):
        return FloatDistribution(low, high, log=log, step=step)
    if any(int(value) != value for value in (low, high, step or 1)):
        raise ConfigError(f"{where}: this option takes whole numbers, got low={low}, high={high}, step={step}")
    if step and (high - low) % step:
        raise ConfigError(f"{where}: step={step} does not lead from low={low} to high={high}")
    return IntDistribution(int(low), int(high), log=log, step=int(step or 1))


def _condition(where: str, entry: object, above: Mapping[str, Parameter]) -> dict[str, tuple[Scalar, ...]]:
    if not isinstance(entry, Mapping):
        raise ConfigError(f'{where}.if = {entry!r}: needs the form {{ "option" = value }}, or a list of values')
    condition = {}
    for name, values in entry.items():
        if name not in above:
            raise ConfigError(f"{where}.if: {name} must stand in [space], above it")
        allowed = tuple(values) if isinstance(values, list) else (values,)
        distribution = above[name].distribution
        for value in allowed:
            if isinstance(distribution, CategoricalDistribution) and value not in distribution.choices:
                raise ConfigError(
                    f"{where}.if: {name} is never {value!r}, only {', '.join(map(str, distribution.choices))}"
                )
        condition[name] = allowed
    return condition


def _accepted(
    where: str,
    name: str,
    distribution: BaseDistribution,
    condition: Mapping[str, tuple[Scalar, ...]],
    options: Mapping[str, Scalar],
) -> None:
    """Tries the ends of a range, or each choice, as the option of a run in which the condition holds."""
    if isinstance(distribution, CategoricalDistribution):
        values = list(distribution.choices)
    else:
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        values = [distribution.low, distribution.high]
    holds = {other: allowed[0] for other, allowed in condition.items()}
    for value in values:
        try:
            RunConfig.from_flat({**options, **holds, name: value})
        except ConfigError as error:
            raise ConfigError(f"{where}: {value!r} is not accepted: {error}") from None


Space = Mapping[str, BaseDistribution]


def choices(space: Space) -> np.ndarray:
    """Returns how many choices each parameter has, int64 (d,); 0: it is a number."""
    return np.array([len(x.choices) if isinstance(x, CategoricalDistribution) else 0 for x in space.values()], np.int64)


def encode(space: Space, internal: np.ndarray) -> np.ndarray:
    """Returns coordinates, float64 (n, d), of internal values (n, d); NaN stays."""
    columns = [_to_unit(x, internal[:, j]) for j, x in enumerate(space.values())]
    return np.stack(columns, axis=1) if columns else internal


def decode(space: Space, points: np.ndarray) -> np.ndarray:
    """Returns internal values (n, d) of coordinates; the inverse of `encode`."""
    return np.stack([_from_unit(x, points[:, j]) for j, x in enumerate(space.values())], axis=1)


def uniform(space: Space, n: int, generator: np.random.Generator) -> np.ndarray:
    """Returns `n` points of the space, coordinates, float64 (n, d)."""
    u, counts = generator.random((n, len(space))), choices(space)
    return np.where(counts > 0, np.floor(u * counts), u)


def internal_values(space: Space, params: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Returns the internal values, float64 (n, d), of parameters as Optuna's trials have them; NaN where one is not."""
    rows = [
        [x.to_internal_repr(found[name]) if name in found else math.nan for name, x in space.items()]
        for found in params
    ]
    return np.array(rows, dtype=np.float64).reshape(len(params), len(space))


def external_values(space: Space, internal: np.ndarray) -> dict[str, Any]:
    """Returns the parameters of one row of internal values, as Optuna's `suggest` methods give them."""
    values = {name: x.to_external_repr(float(internal[j])) for j, (name, x) in enumerate(space.items())}
    return {name: int(value) if isinstance(space[name], IntDistribution) else value for name, value in values.items()}


def _ends(x: FloatDistribution | IntDistribution) -> tuple[float, float]:
    half = (x.step or 0) / 2
    low, high = x.low - half, x.high + half
    return (math.log(low), math.log(high)) if x.log else (low, high)


def _to_unit(x: BaseDistribution, values: np.ndarray) -> np.ndarray:
    if isinstance(x, CategoricalDistribution):
        return values
    assert isinstance(x, FloatDistribution | IntDistribution)
    low, high = _ends(x)
    values = np.log(values) if x.log else values
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)


def _from_unit(x: BaseDistribution, u: np.ndarray) -> np.ndarray:
    if isinstance(x, CategoricalDistribution):
        return u
    assert isinstance(x, FloatDistribution | IntDistribution)
    low, high = _ends(x)
    values = low + u * (high - low)
    values = np.exp(values) if x.log else values
    if x.step:
        values = x.low + x.step * np.round((values - x.low) / x.step)
    return np.clip(values, x.low, x.high)
