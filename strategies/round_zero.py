"""The server's work between the summaries and the plans; pure functions of its pool, its backbone and a mixture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from torch import nn

from tapfl.config import RunConfig, Scalar
from tapfl.data.sources import ImageSet
from tapfl.memo import Memo
from tapfl.models.backbone import BackboneSpec, transform_of
from tapfl.models.units import prunable_layers
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.pruning.pipeline import select
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.planning import plan_of, pruning_task
from tapfl.pruning.pool_probe import PoolProbe
from tapfl.seeds import numpy_generator, torch_generator
from tapfl.store import cache_folder
from tapfl.summary.descriptors import Projection, cached_features
from tapfl.summary.metric_set import pick_metric_set
from tapfl.summary.mixture import GaussianSummary, fit_mixture

BUDGETS, SELECTIONS = 64, 256  # results that are kept; a selection is the kept units of every layer, 90 kB for DeiT-T


@dataclass(frozen=True)
class PublicPool:
    """The pool as every device's plan needs it; computed once a run.

    Attributes:
        images: the public images.
        points: their descriptors, float64 (n, d).
        mixture: a mixture fitted on all of them.
        projection: from features to descriptors; devices use the same.
    """

    images: ImageSet
    points: np.ndarray
    mixture: GaussianSummary
    projection: Projection


def describe_pool(config: RunConfig, images: ImageSet, model: nn.Module) -> PublicPool:
    """Returns the pool with its descriptors and mixture."""
    features = cached_features(model, images, transform_of(model), cache_folder(config.cache))
    projection = Projection.fit(features, config.summary.dim)
    points = projection(features)
    drawn = int(numpy_generator(config.seed, "pool").integers(2**31))
    return PublicPool(images, points, fit_mixture(points, config.summary, drawn), projection)


class Shared:
    """What the plans of all devices have in common: computed when it is first needed, and once.

    It changes no plan, not by a bit, and holds little: no images and no activations beyond those of the pass at hand.
    """

    def __init__(self, config: RunConfig, pool: PublicPool, model: nn.Module) -> None:
        self.config, self.pool, self.model = config, pool, model
        self.transform = transform_of(model)
        self._tasks, self._selections = Memo(BUDGETS), Memo(SELECTIONS)

    @cached_property
    def density(self) -> np.ndarray:
        """The log-likelihood of the pool's points under the pool's own mixture, float64 (n,)."""
        return self.pool.mixture.log_likelihood(self.pool.points)

    @cached_property
    def probe(self) -> PoolProbe:
        """What the pool says of the layers, for ``pruning.probe = pool``."""
        config, images = self.config, self.pool.images.images
        layers = prunable_layers(self.model)
        return PoolProbe(
            self.model, layers, lambda: self.transform.batches(images), config.pruning, config.metric.batch
        )

    def task(self, chosen: np.ndarray, budget: float) -> PruningTask:
        """Returns the problem of a device; what depends on the backbone and the budget alone is measured once."""
        config = self.config
        inputs = self.transform(self.pool.images.images[chosen])
        task: PruningTask = self._tasks.once(
            budget,
            lambda: pruning_task(self.model, inputs, budget, config.pruning, config.metric.batch, seed=config.seed),
        )
        return replace(
            task,
            inputs=inputs,
            generator=torch_generator(config.seed, "criterion"),
            pool_probe=partial(self.probe.importance, chosen=chosen) if config.pruning.probe == "pool" else None,
        )

    def selection(self, chosen: np.ndarray, budget: float) -> tuple[PruningTask, Selection]:
        """Returns the problem and its answer; equal metric sets under equal budgets are scored once."""
        task = self.task(chosen, budget)
        return task, self._selections.once((chosen.tobytes(), budget), lambda: select(task))


def device_plan(
    config: RunConfig,
    pool: PublicPool,
    spec: BackboneSpec,
    model: nn.Module,
    summary: GaussianSummary,
    partition_id: int,
    budget: float,
    shared: Shared | None = None,
) -> PruningPlan:
    """Returns the plan of one device: its metric set, the importance measured on it, its budget.

    Args:
        shared: of the same configuration, pool and model; without it, all is computed for this device alone.

    Raises:
        BudgetError: if this backbone cannot meet the budget.
    """
    shared = shared or Shared(config, pool, model)
    generator = numpy_generator(config.seed, "metric", partition_id)
    chosen = pick_metric_set(summary, shared.density, pool.points, config.metric, generator)
    task, selection = shared.selection(chosen, budget)
    provenance: dict[str, Scalar] = {
        "device": partition_id,
        "budget": budget,
        "metric-rule": config.metric.rule,
        "metric-size": config.metric.size,
        "criterion": config.pruning.criterion,
        "ratio": config.pruning.ratio,
        "tau": config.pruning.tau,
        "align": config.pruning.align,
        "seed": config.seed,
    }
    return plan_of(task, selection, spec, provenance)
