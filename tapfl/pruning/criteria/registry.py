"""The criteria by name, and what `auto` means for each.

A plugin is named ``module:name``. An installed package can register a criterion under a plain name with an entry point
of the group ``tapfl.criteria``. Either is a `Criterion` or a function `PruningTask -> Selection`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from tapfl.config import PruningOptions
from tapfl.errors import ConfigError
from tapfl.plugin import is_plugin, load_plugin

if TYPE_CHECKING:  # importing it at run time would load torch before an unknown name is refused
    from tapfl.pruning.criteria.criterion import Criterion

ENTRY_POINTS = "tapfl.criteria"

# name -> module:value, imported when it is used
BUILT_IN = {
    "fisher": "tapfl.pruning.criteria.gradients:fisher",
    "fisher-global": "tapfl.pruning.criteria.gradients:fisher_global",
    "isomorphic": "tapfl.pruning.criteria.gradients:isomorphic",
    "lowrank-heads": "tapfl.pruning.criteria.norms:lowrank_heads",
    "magnitude": "tapfl.pruning.criteria.norms:magnitude",
    "random": "tapfl.pruning.criteria.norms:random_units",
    "savit": "tapfl.pruning.criteria.savit:savit",
    "tap+": "tapfl.pruning.criteria.tap:tap_plus",
    "tap": "tapfl.pruning.criteria.tap:tap",
    "taylor": "tapfl.pruning.criteria.gradients:taylor",
    "taylor-global": "tapfl.pruning.criteria.gradients:taylor_global",
    "updp": "tapfl.pruning.criteria.updp:updp",
    "upop": "tapfl.pruning.criteria.upop:upop",
    "upop-oneshot": "tapfl.pruning.criteria.upop:upop_oneshot",
    "wanda": "tapfl.pruning.criteria.norms:wanda",
}

# what `auto` means unless the criterion has another default
PUBLISHED = {"ratio": "adaptive", "basis": "none", "compensation": "none", "compensation_rows": "even"}


def criterion_names() -> list[str]:
    """Returns the names of all built-in and installed criteria, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def require_criterion(name: str) -> None:
    """Raises ConfigError if there is no criterion of that name. A plugin is not imported before it is used."""
    if name in BUILT_IN or is_plugin(name):  # searching all installed packages takes milliseconds
        return
    if name not in (names := criterion_names()):
        raise ConfigError(
            f"pruning.criterion = {name!r}: there is no such criterion; accepted: {', '.join(names)}, "
            "or module:name of a plugin"
        )


def criterion_of(name: str) -> Criterion:
    """Returns the criterion of that name. Raises ConfigError if there is none."""
    require_criterion(name)
    loaded: Any
    if name in BUILT_IN:
        module, _, value = BUILT_IN[name].partition(":")
        loaded = getattr(import_module(module), value)
    elif is_plugin(name):
        loaded = load_plugin("pruning.criterion", name)
    else:
        (point, *_) = entry_points(group=ENTRY_POINTS, name=name)
        loaded = point.load()
    from tapfl.pruning.criteria.criterion import Criterion

    return loaded if isinstance(loaded, Criterion) else Criterion(search=loaded)


def resolved(options: PruningOptions) -> PruningOptions:
    """Returns the options with every `auto` replaced by the criterion's default.

    Raises:
        ConfigError: if there is no such criterion, or it requires a different value of an option.
    """
    criterion = criterion_of(options.criterion)
    defaults = PUBLISHED | dict(criterion.defaults)
    for name in criterion.requires:
        if (value := getattr(options, name)) not in ("auto", defaults[name]):
            raise ConfigError(
                f"pruning.{name} = {value!r}: criterion {options.criterion} needs {defaults[name]!r}; accepted: auto"
            )
    return options.model_copy(update={name: defaults[name] for name in PUBLISHED if getattr(options, name) == "auto"})
