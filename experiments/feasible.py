"""Checks the options of a run against its data, weights and backbone, and logs the images that were found."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from flwr.common.logger import log
from torch import nn

from strategies.fleet import reason_for_single
from strategies.loggers import require_loggers
from tapfl.adapters.layout import global_shapes, last_blocks
from tapfl.adapters.rules import rule_of
from tapfl.compute import Compute
from tapfl.config import NEW_HEADS, PruningOptions, RunConfig
from tapfl.data.changing import device_folders, identified, split_changing
from tapfl.data.federated import (
    DeviceSplit,
    check_pool,
    found,
    kept_partition,
    open_pool,
    open_private,
    require_enough,
)
from tapfl.data.images import ImageSet
from tapfl.errors import ConfigError, DataError, ModelError
from tapfl.models.backbone import build
from tapfl.models.cost import measure_cost
from tapfl.models.dense import DenseCache, dense_key, dense_spec, layers_of
from tapfl.models.forward import input_transform
from tapfl.models.merging import Schedule
from tapfl.models.new_head import agreed_classes, numbered
from tapfl.models.units import PrunableLayer
from tapfl.models.weights import fill_weights, read_head_rows
from tapfl.personalize.methods import method_of
from tapfl.privacy import require_accountant
from tapfl.profiles import max_rank, profiles_of
from tapfl.pruning.allocate import allocate
from tapfl.pruning.budget import Budget
from tapfl.pruning.cost_table import cost_table
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.recovery import labels_of
from tapfl.pruning.tokens import SHARES, costs_under, schedule_of, stream_of
from tapfl.pruning.unit_shape import aligned, candidates
from tapfl.store import cache_folder


def check(config: RunConfig) -> None:
    """Logs the images found in the data sources, and checks everything that would otherwise fail later in the run.

    Args:
        config: with absolute paths and the number of devices.

    Raises:
        TapflError: the first problem, as one line.
    """
    Compute.of(config.compute)
    resolved(config.pruning)
    rule_of(config.adapters)
    method_of(config.personalize, config.adapters, config.personalize.from_round)
    reason_for_single(config)
    if config.privacy.dp_noise:
        require_accountant()
    cache = cache_folder(config.cache)
    transform = input_transform(config.model)
    public = open_pool(config.data, transform, config.seed, cache)
    labels_of(public, resolved(config.pruning))
    transform(public.read(range(1)))
    parts = f", in multiples of metric.batch = {config.metric.batch}, which can be lowered"
    for name, size, also in (
        ("metric.size", config.metric.size, parts),
        ("pruning.recovery-size", config.pruning.recovery_size, ""),
    ):
        if size > len(public):
            has = f"the public pool has {len(public)} images"
            raise DataError(f"{name} = {size}: {has}; accepted: at most {len(public)}{also}")
    if config.data.changing and config.resume:  # a device that has too few images by now does not take part
        require_loggers(config.log)
        return
    private = open_private(config.data, transform, config.seed, cache)
    new_head = config.model.head in NEW_HEADS
    check_pool(config.data, public, private, other_classes=new_head or config.data.changing)
    if not new_head:
        _check_backbone(config, public, ())
    if config.data.changing:
        splits = _splits_of_folders(config, public, private)
    else:
        splits = kept_partition(private, config.data, config.devices.count, config.seed, cache)  # late: fills the cache
    if new_head:
        held = [private.subset(split.train).held for split in splits]
        reported = map(numbered, held) if config.adapters.head == "personal" else held
        _check_backbone(config, public, agreed_classes(reported))
    require_loggers(config.log)  # last, because this check may create an empty database
    for line in found(config.data, public, private):
        log(logging.INFO, "%s", line)


def _splits_of_folders(config: RunConfig, public: ImageSet, private: ImageSet) -> list[DeviceSplit]:
    """Returns the split of each device whose images may change; images of classes not in the pool are left out.

    Raises:
        TapflError: as `device_folders`, or if `devices.count` is not the number of folders, or a device has too few
            images to start.
    """
    count, options, splits = len(device_folders(config.data)), config.data, []
    if config.devices.count != count:
        raise ConfigError(f"devices.count = {config.devices.count}: data.source has {count} folders; accepted: {count}")
    known = np.array([config.model.head in NEW_HEADS or name in public.classes for name in private.classes])
    images = identified(private, cache_folder(config.cache))
    for i in range(count):
        own = np.flatnonzero((private.owners == i) & known[private.labels])
        split = split_changing(images.subset(own), options, config.seed)
        require_enough(split, options, i)
        splits.append(DeviceSplit(own[split.train], own[split.test]))
    return splits


def devices_of(config: RunConfig) -> int:
    """Returns the number of devices, for a partition that determines it.

    Raises:
        TapflError: as `open_private` and `partition`.
    """
    if config.data.changing:
        return len(device_folders(config.data))
    cache = cache_folder(config.cache)
    private = open_private(config.data, input_transform(config.model), config.seed, cache)
    return len(kept_partition(private, config.data, 0, config.seed, cache))


def _check_backbone(config: RunConfig, public: ImageSet, classes: tuple[str, ...]) -> None:
    """Checks the options against the backbone; `classes` are the devices' classes, for a new head."""
    options, new = config.model, config.model.head in NEW_HEADS
    if not options.weights and ("rows" in options.head or (new and options.head_rows)):
        raise ConfigError(f"model.head = {options.head!r}: takes rows of the head of model.weights, which is empty")
    spec = dense_spec(options, public)
    model = build(spec)
    key = dense_key(options, spec, public, config.seed, Compute.of(config.compute))
    if not DenseCache(cache_folder(config.cache)).holds(key):
        for note in fill_weights(model, options, spec, public.classes):
            log(logging.INFO, "%s", note)
    if new and options.head_rows:
        _require_rows(Path(options.head_rows), classes, spec.num_classes)
    layers = layers_of(model, options)
    dense = build(spec.model_copy(update={"num_classes": len(classes)})) if new else model
    last_blocks(layers, config.adapters.blocks)
    widest = max(max(shape) for shape in global_shapes(model, layers, rank=1).values())
    if (rank := max_rank(config.devices)) > widest:
        raise ConfigError(f"rank {rank} (devices.ranks): the widest layer has {widest} units; accepted: ≤ {widest}")
    budgets = sorted({profile.budget for profile in profiles_of(config.devices)})
    require_budgets(dense, layers, config.pruning, map(Budget.parse, budgets))


def require_budgets(
    model: nn.Module, layers: Sequence[PrunableLayer], options: PruningOptions, budgets: Iterable[Budget]
) -> None:
    """Checks that even widths of a backbone can meet each budget, and that it can merge tokens if that is asked for.

    Its weights do not matter. A budget that limits latency is not checked, because that needs a measurement.

    Raises:
        BudgetError: if no widths meet a budget.
        ConfigError: if tokens are to be merged, and the backbone cannot.
    """
    options, cost = aligned(resolved(options), layers), measure_cost(model)
    schedule: Schedule = ()
    if options.tokens != "none":
        share = options.token_share if options.tokens == "merge" else min(SHARES)
        schedule = schedule_of(stream_of(model, options), share)
    for budget in budgets:
        if budget.measured:
            continue
        seen, table = costs_under(model, layers, cost_table(layers, cost, budget), schedule)
        shapes = [candidates(n, table.branches[n.name], options.unit_shape, options.align) for n in seen]
        allocate(shapes, np.ones(len(layers)), table, options)


def _require_rows(file: Path, classes: tuple[str, ...], available: int) -> None:
    if (largest := max(read_head_rows(file, classes))) >= available:
        raise ModelError(f"model.head-rows = {str(file)!r}: row {largest} is not in the head, which has {available}")
