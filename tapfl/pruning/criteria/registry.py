"""The criteria by name: those of this folder, and those that users have; and what goes with each.

A criterion is a callable `PruningTask -> Selection`. A user's own is named ``module:function``; an installed package
offers one under a name by an entry point of the group ``tapfl.criteria``. A criterion that is made for other options
than the published ones says so by the decorator `recipe`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from tapfl.config import PruningOptions
from tapfl.errors import ConfigError
from tapfl.plugin import is_plugin, load_plugin

if TYPE_CHECKING:  # with torch, and a name that is none is refused before
    from tapfl.pruning.criteria.task import Criterion

ENTRY_POINTS = "tapfl.criteria"

# name -> module:function, imported when it is asked for
BUILT_IN = {
    "fisher": "tapfl.pruning.criteria.fisher:fisher",
    "fisher-global": "tapfl.pruning.criteria.fisher:fisher_global",
    "isomorphic": "tapfl.pruning.criteria.isomorphic:isomorphic",
    "lowrank-heads": "tapfl.pruning.criteria.lowrank_heads:lowrank_heads",
    "magnitude": "tapfl.pruning.criteria.magnitude:magnitude",
    "random": "tapfl.pruning.criteria.random_units:random_units",
    "savit": "tapfl.pruning.criteria.savit:savit",
    "tap+": "tapfl.pruning.criteria.tap_plus:tap_plus",
    "tap": "tapfl.pruning.criteria.tap:tap",
    "taylor": "tapfl.pruning.criteria.taylor:taylor",
    "taylor-global": "tapfl.pruning.criteria.taylor:taylor_global",
    "updp": "tapfl.pruning.criteria.updp:updp",
    "upop": "tapfl.pruning.criteria.upop:upop",
    "upop-oneshot": "tapfl.pruning.criteria.upop_oneshot:upop_oneshot",
    "wanda": "tapfl.pruning.criteria.wanda:wanda",
}

PUBLISHED = {"ratio": "adaptive", "basis": "none", "compensation": "none", "compensation_rows": "even"}


def criterion_names() -> list[str]:
    """Returns the names of all criteria that can be had, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def require_criterion(name: str) -> None:
    """Raises ConfigError if there is no criterion of that name; a user's own is looked for when it is needed."""
    if name in BUILT_IN or is_plugin(name):  # without a look at all that is installed, which takes milliseconds
        return
    if name not in (names := criterion_names()):
        raise ConfigError(
            f"pruning.criterion = {name!r}: there is no such criterion; accepted: {', '.join(names)}, "
            "or module:name for one of your own"
        )


def criterion_of(name: str) -> Criterion:
    """Returns the criterion of that name. Raises ConfigError if there is none."""
    require_criterion(name)
    if name in BUILT_IN:
        module, _, function = BUILT_IN[name].partition(":")
        criterion: Criterion = getattr(import_module(module), function)
        return criterion
    if is_plugin(name):
        found: Criterion = load_plugin("pruning.criterion", name)
        return found
    (point, *_) = entry_points(group=ENTRY_POINTS, name=name)
    offered: Criterion = point.load()
    return offered


def recipe(needs: tuple[str, ...] = (), **options: str) -> Callable[[Criterion], Criterion]:
    """Marks a criterion as made for these values of the options that `PUBLISHED` names, where they are `auto`.

    Args:
        needs: those of the options that it cannot do without; any other value is refused before anything starts.
    """

    def mark(criterion: Criterion) -> Criterion:
        criterion.recipe = options  # type: ignore[attr-defined]
        criterion.needs = needs  # type: ignore[attr-defined]
        return criterion

    return mark


def resolved(options: PruningOptions) -> PruningOptions:
    """Returns the options with every `auto` replaced by what the criterion is made for, or else by what is published.

    Raises:
        ConfigError: if there is no such criterion, or it cannot do with one of the options.
    """
    criterion = criterion_of(options.criterion)
    own = PUBLISHED | getattr(criterion, "recipe", {})
    for name in getattr(criterion, "needs", ()):
        if (value := getattr(options, name)) not in ("auto", own[name]):
            raise ConfigError(
                f"pruning.{name} = {value!r}: criterion {options.criterion} needs {own[name]!r}; accepted: auto"
            )
    return options.model_copy(update={name: own[name] for name in PUBLISHED if getattr(options, name) == "auto"})
