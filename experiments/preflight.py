"""The check of a run before anything starts: options against data, weights and backbone. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from strategies.checkpoint import require_same_options
from strategies.loggers.feed import require_loggers
from tapfl.config import RunConfig
from tapfl.data.federated import check_classes, open_pool, open_private
from tapfl.data.partition import partition
from tapfl.data.sources import ImageSet
from tapfl.errors import ConfigError, DataError
from tapfl.models.backbone import build, input_transform, spec_of
from tapfl.models.cost import measure_cost
from tapfl.models.dense import DenseCache, dense_key, fill_weights
from tapfl.models.prunable import prunable_layers
from tapfl.privacy import require_accountant
from tapfl.profiles import profiles_of
from tapfl.progress import stage
from tapfl.pruning.allocate import allocate
from tapfl.pruning.budget import Budget
from tapfl.pruning.cost_table import cost_table
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.unit_shape import aligned, ladder
from tapfl.store import RunFolder, cache_folder

DEFAULT_DEVICES = 10


def resolve_run(options: Mapping[str, Any], out: Path, resume: bool) -> RunConfig:
    """Returns a run as it will be carried out in the folder `out`, after its check; writes nothing.

    Args:
        options: dotted; above the defaults, and above those of the run that goes on.
        resume: the folder holds a run to go on with.

    Raises:
        TapflError: in one line, for whatever would keep the run from its end.
    """
    kept = RunFolder(out).config() if resume else {"devices.count": DEFAULT_DEVICES}
    config = absolute_paths(RunConfig.from_flat({**kept, **options, "out": str(out), "resume": resume}))
    with stage("checking"):
        check(config)
    return config


def absolute_paths(config: RunConfig) -> RunConfig:
    """Returns the configuration with every path made absolute: server and devices run in folders of their own."""
    absolute = {option: str(Path(value).expanduser().absolute()) for option, value in config.paths().items()}
    return RunConfig.from_flat(config.flat() | absolute)


def check(config: RunConfig) -> None:
    """Raises a TapflError, in one line, for what would only be found out later.

    Args:
        config: with absolute paths and the number of devices.
    """
    if config.resume:
        require_same_options(RunFolder(Path(config.out)), config)
    elif config.out and Path(config.out).exists():
        raise ConfigError(
            f"out = {config.out!r}: exists already; give a folder that does not, or go on with --resume {config.out}"
        )
    resolved(config.pruning)
    if config.privacy.dp_noise:
        require_accountant()
    cache = cache_folder(config.cache)
    transform = input_transform(config.model)
    public = open_pool(config.data, transform, config.seed, cache)
    private = open_private(config.data, transform, config.seed, cache)
    check_classes(config.data, public, private)
    transform(public.images[:1])
    partition(private.labels, config.data, config.devices.count, config.seed)
    for name, size in (("metric.size", config.metric.size), ("pruning.recovery-size", config.pruning.recovery_size)):
        if size > len(public):
            raise DataError(f"{name} = {size}: the public pool has {len(public)} images")
    _check_backbone(config, public)
    require_loggers(config.log)  # last: it may make an empty database


def _check_backbone(config: RunConfig, public: ImageSet) -> None:
    options = config.model
    if options.head != "train" and not options.weights:
        raise ConfigError(f"model.head = {options.head!r}: takes rows of the head of model.weights, which is empty")
    spec = spec_of(options, public.classes)
    model = build(spec)
    key = dense_key(options, spec, public, config.seed)
    if not DenseCache(cache_folder(config.cache)).holds(key):
        fill_weights(model, options, spec, public.classes)
    layers = prunable_layers(model)
    pruning, cost = aligned(resolved(config.pruning), layers), measure_cost(model)
    for budget in sorted({profile.budget for profile in profiles_of(config.devices)}):
        table = cost_table(layers, cost, Budget.parse(budget))
        ladders = [ladder(n, table.branches[n.name], pruning.unit_shape, pruning.align) for n in layers]
        allocate(ladders, np.ones(len(layers)), table, pruning)
