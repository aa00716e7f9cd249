"""The server's computations from mixtures to pruned models, as functions of the pool, the backbone and a mixture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from queue import SimpleQueue
from threading import Event, RLock
from typing import TypeVar

import numpy as np
from torch import Tensor, nn

from strategies.records import DeviceRecord
from tapfl.compute import HERE, Compute
from tapfl.config import MetricOptions, RunConfig
from tapfl.data.images import ImageSet
from tapfl.memo import Memo
from tapfl.models.backbone import BackboneSpec, spec_of
from tapfl.models.forward import transform_of
from tapfl.options import Scalar
from tapfl.progress import shown_on
from tapfl.pruning.basis import in_basis, turned_on_pool
from tapfl.pruning.criteria.criterion import PruningTask, Selection
from tapfl.pruning.criteria.registry import resolved
from tapfl.pruning.pipeline import Pruned, prune_model, pruning_task
from tapfl.pruning.pool import PoolTables
from tapfl.pruning.recovery import fine_tune_set, labels_of
from tapfl.pruning.tokens import select
from tapfl.seeds import numpy_generator, torch_generator
from tapfl.store import cache_folder
from tapfl.summary.metric_set import Projection, cached_features, effective_size, pick_metric_set
from tapfl.summary.mixture import GaussianSummary, fit_mixture

T = TypeVar("T")
R = TypeVar("R")

BUDGETS, SELECTIONS = 64, 256  # cached results; a selection (the kept units of all layers) has 90 kB for DeiT-T


@dataclass(frozen=True)
class PublicPool:
    """The public pool, described once per run for the plans of all devices."""

    images: ImageSet  # the public images
    points: np.ndarray  # their descriptors, float64 (n, d)
    mixture: GaussianSummary  # fitted to the descriptors
    projection: Projection  # from features to descriptors; devices use the same

    @cached_property
    def density(self) -> np.ndarray:
        """The log-likelihood of the points under the pool's own mixture, float64 (n,)."""
        return self.mixture.log_likelihood(self.points)

    def effective_size(self, summary: GaussianSummary | None, chosen: np.ndarray) -> float | None:
        """Returns the effective sample size of these images under the device's density ratios; None: no mixture."""
        if summary is None:
            return None
        return effective_size(summary.log_likelihood(self.points[chosen]) - self.density[chosen])


def describe_pool(config: RunConfig, images: ImageSet, model: nn.Module, compute: Compute = HERE) -> PublicPool:
    """Returns the pool with its descriptors and mixture."""
    spec, cache = spec_of(config.model, images.classes), cache_folder(config.cache)
    return pool_of(config, images, cached_features(model, spec, images, transform_of(model), cache, compute))


def pool_of(config: RunConfig, images: ImageSet, features: np.ndarray) -> PublicPool:
    """Returns the pool of images with these features, float32 (n, width).

    Projection and mixture are fitted to `summary.pool-sample` of the images; every image gets a descriptor.
    """
    options, chosen = config.summary, np.arange(len(features))
    if len(features) > options.pool_sample:
        order = numpy_generator(config.seed, "pool-sample").permutation(len(features))
        chosen = np.sort(order[: options.pool_sample])
    projection = Projection.fit(features[chosen], options.dim)
    points = projection(features)
    drawn = int(numpy_generator(config.seed, "pool").integers(2**31))
    return PublicPool(images, points, fit_mixture(points[chosen], options, drawn), projection)


def task_images(
    pool: PublicPool,
    summary: GaussianSummary | None,
    options: MetricOptions,
    seed: int,
    partition_id: int,
    size: int = 0,
) -> np.ndarray:
    """Returns the positions in the pool, int64, of the images chosen for a device, the best first.

    Args:
        summary: the device's mixture; None: the images are chosen as by the rule ``shared``, at random from the whole
            pool and the same for every device.
        size: number of images; 0: the size of the metric set.
    """
    options = options.model_copy(update={"size": size or options.size})
    if summary is None:  # under the pool's own mixture all images tie, and a rule would just take the first ones
        summary, options = pool.mixture, options.model_copy(update={"rule": "shared"})
    generator = numpy_generator(seed, "metric", *([] if options.rule == "shared" else [partition_id]))
    return pick_metric_set(summary, pool.density, pool.points, options, generator)


def alike(config: RunConfig, records: Iterable[DeviceRecord]) -> list[list[DeviceRecord]]:
    """Returns the devices in groups that get equal models: with `metric.rule = shared`, all with the same budget."""
    groups: dict[float | str, list[DeviceRecord]] = {}
    for record in records:
        key = record.profile.budget if config.metric.rule == "shared" else record.device
        groups.setdefault(key, []).append(record)
    return [*groups.values()]


def probed(config: RunConfig, budgets: Sequence[float | str], pool: PublicPool) -> RunConfig:
    """Returns the options of a run with `pruning.probe = auto` replaced by ``pool`` or ``own``.

    With ``pool``, the images of the pool pass through the backbone once for all devices, and about six times more for
    the layers under each different budget. With ``own``, the metric set of each device passes as often for that device
    alone. So ``pool`` is cheaper if metric sets · metric.size ≥ different budgets · images of the pool.

    Args:
        budgets: the budget of each metric set.
    """
    if config.pruning.probe != "auto":
        return config
    own, whole = len(budgets) * config.metric.size, len(set(budgets)) * len(pool.images)
    probe = "pool" if own >= whole else "own"
    return config.model_copy(update={"pruning": config.pruning.model_copy(update={"probe": probe})})


class Shared:
    """Results that the pruned models of all devices share, computed when they are first needed, and only once.

    Sharing changes no bit of a model. Images and activations are kept in memory only during the forward pass that
    needs them.

    Args:
        model: the dense backbone whose predictions are used, on the CPU.
        compute: where to compute, and where the pruned models are placed.
        new_head: the same backbone with the classifier of the devices, if that is a different one.
    """

    def __init__(
        self,
        config: RunConfig,
        pool: PublicPool,
        model: nn.Module,
        compute: Compute = HERE,
        new_head: nn.Module | None = None,
    ) -> None:
        self.config, self.pool, self._dense, self.compute = config, pool, model, compute
        self.new_head = None if new_head is None else compute.put(new_head)
        self.transform = transform_of(model)
        self._tasks, self._selections = Memo(BUDGETS), Memo(SELECTIONS)
        self._origin: Shared | None = None
        self._lock = RLock()  # held while hooks observe the model, or it is copied for another thread

    def for_thread(self) -> Shared:
        """Returns a copy for another thread with its own models, because criteria attach hooks to a model's layers."""
        other = Shared(self.config, self.pool, self._dense, self.compute)
        other.new_head, other._origin = copy.deepcopy(self.new_head), self
        return other

    @cached_property
    def model(self) -> nn.Module:
        """The model from which all pruned models are cut: the backbone in the basis of the options.

        The canonical basis is computed on the whole pool, never for one device: adapters are aggregated by index, so a
        dimension must mean the same on every device.
        """
        if self._origin is not None:
            with self._origin._lock:
                return copy.deepcopy(self._origin.model)
        dense, images = self.compute.put(self._dense), self.pool.images
        basis = resolved(self.config.pruning).basis
        return in_basis(dense, basis, lambda: turned_on_pool(dense, images, self.transform, self.config.seed))

    @cached_property
    def tables(self) -> PoolTables:
        """Measurements on all images of the pool, for ``pruning.probe = pool``; shared by all threads."""
        if self._origin is not None:
            with self._origin._lock:
                return self._origin.tables
        task = self._problem(np.arange(self.config.metric.batch), budget=1.0)
        return PoolTables(task, self._images, len(self.pool.images), cache_folder(self.config.cache), self._lock)

    def task(self, chosen: np.ndarray, budget: float | str) -> PruningTask:
        """Returns the pruning task of a device; what depends only on the backbone and the budget is measured once."""
        task = self._problem(chosen, budget)
        if self.config.pruning.probe != "pool":
            return task
        return replace(task, probe=partial(self.tables.importance, chosen), sums=partial(self.tables.sums, chosen))

    def _problem(self, chosen: np.ndarray, budget: float | str) -> PruningTask:
        config, head, compute, (inputs, labels) = self.config, self.new_head, self.compute, self._images(chosen)
        options, batch, seed = config.pruning, config.metric.batch, config.seed
        task: PruningTask = self._tasks.once(
            budget,
            lambda: pruning_task(self.model, inputs, budget, options, batch, seed=seed, new_head=head, compute=compute),
        )
        return replace(task, inputs=inputs, labels=labels, generator=torch_generator(seed, "criterion"))

    def _images(self, positions: np.ndarray) -> tuple[Tensor, Tensor | None]:
        images = self.pool.images.subset(positions)
        return self.compute.put(self.transform(images.read())), self.compute.put(labels_of(images, self.config.pruning))

    def selection(self, chosen: np.ndarray, budget: float | str) -> tuple[PruningTask, Selection]:
        """Returns the pruning task and the selection; equal metric sets with equal budgets are scored once.

        A selection that contains a trained model is not cached, because each would keep a whole model in memory.
        """
        task, key = self.task(chosen, budget), (chosen.tobytes(), budget)
        return task, self._selections.once(key, lambda: select(task), keep=lambda found: found.model is None)


def side_by_side(shared: Shared, make: Callable[[Shared, T], R], items: Sequence[T], at_once: int) -> Iterator[R]:
    """Yields `make(shared, item)` for each item, in order; threads compute `at_once` of them at a time.

    The results have the same bits as without threads, because no operation is split among several cores. If the caller
    stops early, the threads end at the next step that they report.
    """
    if at_once < 2:
        yield from (make(shared, item) for item in items)
        return
    ended, free = Event(), SimpleQueue[Shared]()
    for _ in range(at_once):
        free.put(shared.for_thread())

    def advance(*_: object) -> None:
        if ended.is_set():
            raise KeyboardInterrupt

    def made(item: T) -> R:
        own = free.get()
        try:
            with shown_on(lambda _: nullcontext(advance)):
                return make(own, item)
        finally:
            free.put(own)

    threads = ThreadPoolExecutor(at_once, "smaller models", shared.compute.prepare)
    try:
        yield from threads.map(made, items)
    finally:
        ended.set()
        threads.shutdown(cancel_futures=True)


def device_model(
    shared: Shared, spec: BackboneSpec, summary: GaussianSummary | None, partition_id: int, budget: float | str
) -> Pruned:
    """Returns the pruned model of a device and its plan, made with the public images chosen for it and its budget.

    Without a mixture the result is the generic plan for the budget, made with a sample of the whole pool.

    Raises:
        BudgetError: if this backbone cannot meet the budget.
    """
    config, pool, options = shared.config, shared.pool, shared.config.pruning
    images = partial(task_images, pool, summary, config.metric, config.seed, partition_id)
    chosen = images()
    task, selection = shared.selection(chosen, budget)
    provenance: dict[str, Scalar] = {
        "device": partition_id,
        "budget": budget,
        "metric-rule": config.metric.rule,
        "metric-size": config.metric.size,
        "tau": options.tau,
        "align": task.options.align,
    }
    fine_tune = fine_tune_set(lambda size: pool.images.subset(images(size)), shared.transform, options)
    return replace(prune_model(task, spec, fine_tune, provenance, config.seed, selection), metric_set=chosen)
