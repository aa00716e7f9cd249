"""From features of images to descriptors, and by descriptors to the metric set, on which a device's task is measured.

Descriptors φ(x) are pooled pre-logits features of the frozen backbone, centred and projected by the pool's PCA. The
metric set are the public images that look like a device's own, by one of these rules:

    top-likelihood     as published: largest log p_i(φ(x)). Mode-seeking: it crowds into the densest component
    density-ratio      ours: largest log p_i(φ(x)) - log p_pool(φ(x)): more the device's than the pool's
    component-quota    ours: n_k = round(π_k M) samples a component, the best by responsibility-weighted likelihood
    random             a control: drawn evenly from the pool
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from torch import nn

from tapfl.compute import HERE, Compute
from tapfl.config import MetricOptions
from tapfl.data.images import ImageSet, forget, in_order
from tapfl.data.transform import Transform
from tapfl.errors import DataError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.forward import image_features
from tapfl.store import content_hash, whole_file
from tapfl.summary.mixture import GaussianSummary

AT_ONCE = 2**16  # images whose features are in memory together
RULES = ("top-likelihood", "density-ratio", "component-quota", "random")


@dataclass(frozen=True)
class Projection:
    """φ = (f - mean) · components; fitted on the public pool alone, so it tells a device nothing of another.

    Attributes:
        mean: float32 (features,).
        components: float32 (dim, features), orthonormal rows.
    """

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, dim: int) -> Projection:
        """Returns the projection of (n, features) to the first `dim` principal components, or as many as there are."""
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
    """Returns `image_features` of a whole set, mapped from `cache`, where they are written if they are not there.

    The same weights are another model under another `spec`, such as one with more heads.
    """
    seen = f"{spec.model_dump_json()} {transform} {images.shape}"
    key = content_hash(model.state_dict(), seen, *images.content(), *compute.marks)
    file = cache / "features" / f"{key}.npy"
    if not file.is_file():
        with whole_file(file) as temporary, compute.forward():
            _write_features(temporary, compute.put(model), images, transform)
    found: np.ndarray = np.load(file, mmap_mode="r")
    return found


def _write_features(file: Path, model: nn.Module, images: ImageSet, transform: Transform) -> None:
    written: np.ndarray | None = None
    for part in in_order(len(images), AT_ONCE):
        found = image_features(model, transform.batches(images.subset(part)), first=int(part[0]))
        if written is None:
            written = np.lib.format.open_memmap(file, "w+", np.float32, (len(images), found.shape[1]))
        written[part] = found


def pick_metric_set(
    device: GaussianSummary,
    pool: GaussianSummary | np.ndarray,
    points: np.ndarray,
    options: MetricOptions | None = None,
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Returns `options.size` different positions in the pool, int64, best first, by the rule of the options.

    Args:
        device: the device's mixture.
        pool: a mixture fitted on all of the pool's descriptors, or, where many devices share it, its log-likelihood at
            `points`, float64 (n,).
        points: the pool's descriptors, float64 (n, d).

    Raises:
        DataError: if the pool is smaller than the metric set that is asked for.
    """
    options, generator = options or MetricOptions(), generator or np.random.default_rng(0)
    if options.size > len(points):
        raise DataError(f"metric.size = {options.size}: the public pool has {len(points)} images")
    if options.rule == "random":
        return generator.choice(len(points), options.size, replace=False)
    if options.rule == "component-quota":
        return _component_quota(device, points, options.size)
    worth = device.log_likelihood(points)
    if options.rule == "density-ratio":
        worth = worth - (pool.log_likelihood(points) if isinstance(pool, GaussianSummary) else pool)
    return _largest(worth, options.size)


def effective_size(log_ratios: np.ndarray) -> float:
    """Returns Kish's effective sample size (Σ w)² / Σ w² of importance weights w, from 1 to their number.

    With w = p_i / p_pool it says how many of the images stand for a device: few, if it is on a few that its density
    rests, and the others are unlike its own. It needs no labels.

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
