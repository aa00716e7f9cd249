"""Computes descriptors of images, and selects by them a device's metric set, which represents the device's task.

Descriptors φ(x) are pooled pre-logits features of the frozen backbone, centred and projected by the pool's PCA. The
metric set consists of public images that are similar to the device's own images, selected by one of these rules:

    top-likelihood     as published: largest log p_i(φ(x)). Mode-seeking: prefers the densest component
    density-ratio      ours: largest log p_i(φ(x)) - log p_pool(φ(x)): more likely for the device than for the pool
    component-quota    ours: n_k = round(π_k M) samples per component, the best by responsibility-weighted likelihood
    random             a control: drawn uniformly from the pool
    shared             as `random`; the caller draws with one seed for all devices
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from sklearn.decomposition import PCA
from torch import nn

from tapfl.compute import HERE, Compute
from tapfl.config import MetricOptions
from tapfl.data.images import ImageSet, forget, in_order
from tapfl.data.transform import Transform
from tapfl.errors import ConfigError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.forward import image_features
from tapfl.store import content_hash, whole_file
from tapfl.summary.mixture import GaussianSummary

AT_ONCE = 2**16  # number of images whose features are in memory at once
RULES: tuple[str, ...] = get_args(MetricOptions.model_fields["rule"].annotation)


@dataclass(frozen=True)
class Projection:
    """φ = (f - mean) · components. It is fitted only on the public pool, so it reveals nothing about other devices.

    Attributes:
        mean: float32 (features,).
        components: float32 (dim, features), orthonormal rows.
    """

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, dim: int) -> Projection:
        """Returns the projection to the first `dim` principal components of `features` (n, width), or all if fewer."""
        dim = min(dim, *features.shape)
        pca = PCA(n_components=dim, svd_solver="full").fit(features.astype(np.float64))
        return cls(pca.mean_.astype(np.float32), pca.components_.astype(np.float32))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Returns descriptors, float64 (n, dim)."""
        components = self.components.T.astype(np.float64)
        starts = range(0, max(len(features), 1), AT_ONCE)
        parts = [(np.asarray(features[i : i + AT_ONCE], np.float64) - self.mean) @ components for i in starts]
        forget(features)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def cached_features(
    model: nn.Module, spec: BackboneSpec, images: ImageSet, transform: Transform, cache: Path, compute: Compute = HERE
) -> np.ndarray:
    """Returns `image_features` of a set, memory-mapped from a file in `cache`, which is written if it does not exist.

    Args:
        spec: is part of the key, because equal weights can belong to different models, such as one with more heads.
    """
    seen = f"{spec.model_dump_json()} {transform} {images.shape}"
    key = content_hash(model.state_dict(), seen, *images.content(), *compute.marks)
    file = cache / "features" / f"{key}.npy"
    if not file.is_file():
        with whole_file(file) as temporary, compute.forward():
            _write_features(temporary, compute.put(model), images, transform)
    features: np.ndarray = np.load(file, mmap_mode="r")
    return features


def _write_features(file: Path, model: nn.Module, images: ImageSet, transform: Transform) -> None:
    written: np.ndarray | None = None
    for part in in_order(len(images), AT_ONCE):
        features = image_features(model, transform.batches(images.subset(part)), first=int(part[0]))
        if written is None:
            written = np.lib.format.open_memmap(file, "w+", np.float32, (len(images), features.shape[1]))
        written[part] = features


def pick_metric_set(
    device: GaussianSummary,
    pool: GaussianSummary | np.ndarray,
    points: np.ndarray,
    options: MetricOptions | None = None,
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Returns `options.size` distinct positions in the pool, int64, best first, by the rule of the options.

    Args:
        device: the device's mixture.
        pool: a mixture fitted on the pool's descriptors, or its log-likelihood at `points`, float64 (n,), which many
            devices can share.
        points: the pool's descriptors, float64 (n, d).

    Raises:
        ConfigError: if the pool has fewer images.
    """
    options, generator = options or MetricOptions(), generator or np.random.default_rng(0)
    if options.size > len(points):
        asked = f"metric.size or pruning.recovery-size = {options.size}"
        raise ConfigError(f"{asked}: the public pool has {len(points)} images; accepted: at most as many")
    if options.rule in ("random", "shared"):
        return generator.choice(len(points), options.size, replace=False)
    if options.rule == "component-quota":
        return _component_quota(device, points, options.size)
    scores = device.log_likelihood(points)
    if options.rule == "density-ratio":
        scores = scores - (pool.log_likelihood(points) if isinstance(pool, GaussianSummary) else pool)
    return _largest(scores, options.size)


def effective_size(log_ratios: np.ndarray) -> float:
    """Returns Kish's effective sample size (Σ w)² / Σ w² of importance weights w, between 1 and their number.

    With w = p_i / p_pool it measures how many of the images represent a device. It is small if the device's density is
    high at only a few of them and the others differ from its own images. It needs no labels.

    Args:
        log_ratios: log w, float64 (n,), n >= 1.
    """
    weights = np.exp(log_ratios - log_ratios.max())
    return float(weights.sum() ** 2 / (weights**2).sum())


def _component_quota(device: GaussianSummary, points: np.ndarray, size: int) -> np.ndarray:
    affinity = device.component_log_densities(points)  # log π_k N_k(x) = log p(x) + log r_k(x)
    exact = device.weights * size
    quota = np.floor(exact).astype(int)
    quota[np.argsort(-(exact - quota), kind="stable")[: size - quota.sum()]] += 1
    free = np.ones(len(points), dtype=bool)
    chosen: list[np.ndarray] = []
    for k in np.argsort(-device.weights, kind="stable"):
        taken = _largest(np.where(free, affinity[:, k], -np.inf), quota[k])
        free[taken] = False
        chosen.append(taken)
    return np.concatenate(chosen)


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:count]
