"""Descriptors φ(x): pooled pre-logits features of the frozen backbone, centred and projected by the pool's PCA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import nn

from tapfl.data.sources import ImageSet
from tapfl.data.transform import Transform
from tapfl.models.forward import image_features
from tapfl.store import content_hash, read_tensors, write_tensors


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
        return (features.astype(np.float64) - self.mean) @ self.components.T.astype(np.float64)


def cached_features(model: nn.Module, images: ImageSet, transform: Transform, cache: Path) -> np.ndarray:
    """Returns `image_features` of a whole set, from `cache` if the same model has seen the same images before."""
    seen = f"{transform} {images.images.shape}"
    key = content_hash(model.state_dict(), seen, np.ascontiguousarray(images.images).tobytes())
    file = cache / "features" / f"{key}.safetensors"
    if file.is_file():
        return read_tensors(file)["features"].numpy()
    found = image_features(model, transform.batches(images.images))
    write_tensors(file, {"features": torch.from_numpy(found)})
    return found
