"""Checks the options of a run against its data, weights and backbone, and logs which images there are."""

from __future__ import annotations

import logging

import numpy as np
from flwr.common.logger import log

from strategies.loggers import require_loggers
from tapfl.adapters.rules import rule_of
from tapfl.compute import Compute
from tapfl.config import RunConfig
from tapfl.data.federated import check_classes, found, kept_partition, open_pool, open_private
from tapfl.data.images import ImageSet
from tapfl.errors import ConfigError, DataError
from tapfl.models.backbone import build, spec_of
from tapfl.models.cost import measure_cost
from tapfl.models.dense import DenseCache, dense_key, fill_weights, layers_of
from tapfl.models.forward import input_transform
from tapfl.personalize.methods import method_of
from tapfl.privacy import require_accountant
from tapfl.profiles import profiles_of
from tapfl.pruning.allocate import allocate
from tapfl.pruning.budget import Budget
from tapfl.pruning.cost_table import cost_table
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.unit_shape import aligned, candidates
from tapfl.store import cache_folder


def check(config: RunConfig) -> None:
    """Logs what was found in the data sources, and checks all that would otherwise fail later in the run.

    Args:
        config: with absolute paths and the number of devices.

    Raises:
        TapflError: in one line.
    """
    Compute.of(config.compute)
    resolved(config.pruning)
    rule_of(config.adapters)
    method_of(config.personalize, config.adapters, config.personalize.from_round)
    if config.privacy.dp_noise:
        require_accountant()
    cache = cache_folder(config.cache)
    transform = input_transform(config.model)
    public = open_pool(config.data, transform, config.seed, cache)
    private = open_private(config.data, transform, config.seed, cache)
    check_classes(config.data, public, private)
    transform(public.read(range(1)))
    kept_partition(private, config.data, config.devices.count, config.seed, cache)
    for name, size in (("metric.size", config.metric.size), ("pruning.recovery-size", config.pruning.recovery_size)):
        if size > len(public):
            raise DataError(f"{name} = {size}: the public pool has {len(public)} images")
    _check_backbone(config, public)
    require_loggers(config.log)  # the last check: it may make an empty database
    for line in found(config.data, public, private):
        log(logging.INFO, "%s", line)


def devices_of(config: RunConfig) -> int:
    """Returns how many devices the partition makes of the private images, where it says that itself.

    Raises:
        TapflError: as `open_private` and `partition`.
    """
    cache = cache_folder(config.cache)
    private = open_private(config.data, input_transform(config.model), config.seed, cache)
    return len(kept_partition(private, config.data, 0, config.seed, cache))


def _check_backbone(config: RunConfig, public: ImageSet) -> None:
    options = config.model
    if options.head != "train" and not options.weights:
        raise ConfigError(f"model.head = {options.head!r}: takes rows of the head of model.weights, which is empty")
    spec = spec_of(options, public.classes)
    model = build(spec)
    key = dense_key(options, spec, public, config.seed, Compute.of(config.compute))
    if not DenseCache(cache_folder(config.cache)).holds(key):
        fill_weights(model, options, spec, public.classes)
    layers = layers_of(model, options)
    pruning, cost = aligned(resolved(config.pruning), layers), measure_cost(model)
    for budget in sorted({profile.budget for profile in profiles_of(config.devices)}):
        table = cost_table(layers, cost, Budget.parse(budget))
        shapes = [candidates(n, table.branches[n.name], pruning.unit_shape, pruning.align) for n in layers]
        allocate(shapes, np.ones(len(layers)), table, pruning)
