"""The dense backbone of a federation: loaded or trained once on the public pool, then found by its content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tapfl.config import ModelOptions
from tapfl.data.sources import ImageSet
from tapfl.models.backbone import BackboneSpec, build, head_names, load_hub_weights, load_weights, spec_of, transform_of
from tapfl.seeds import numpy_generator
from tapfl.store import content_hash, read_tensors, write_tensors
from tapfl.training import train_dense


class DenseCache:
    """Dense backbones by key, shared by all runs of a machine; a device that has the key need not be sent weights."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "backbones"

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def holds(self, key: str) -> bool:
        return self.path(key).is_file()

    def load(self, key: str, spec: BackboneSpec) -> nn.Module:
        """Returns the backbone in evaluation mode, all weights frozen."""
        model = build(spec)
        model.load_state_dict(read_tensors(self.path(key)))
        return model.requires_grad_(False)

    def save(self, key: str, state: dict[str, torch.Tensor]) -> None:
        write_tensors(self.path(key), state)


def dense_key(options: ModelOptions, spec: BackboneSpec, pool: ImageSet, seed: int) -> str:
    """Returns the name of the backbone's content: everything its weights depend on."""
    files = [Path(name).read_bytes() for name in (options.weights, options.head_rows) if name and Path(name).is_file()]
    data = pool.images.tobytes() + pool.labels.tobytes()
    return content_hash(options.model_dump_json(), spec.model_dump_json(), data, str(seed), *files)


def dense_backbone(
    options: ModelOptions,
    pool: ImageSet,
    seed: int,
    cache: DenseCache,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, BackboneSpec, nn.Module]:
    """Returns (key, spec, model) of the backbone that the options name, from the cache if it was made before.

    Raises:
        ModelError: if the backbone is unknown or its weights do not fit.
    """
    spec = spec_of(options, pool.classes)
    key = dense_key(options, spec, pool, seed)
    if not cache.holds(key):
        torch.manual_seed(
            int(numpy_generator(seed, "backbone").integers(2**62))
        )  # timm initialises from the global one
        model = build(spec)
        rows = Path(options.head_rows) if options.head != "train" and options.head_rows else None
        if options.weights == "hub":
            load_hub_weights(model, spec, pool.classes, rows)
        elif options.weights:
            load_weights(model, Path(options.weights), pool.classes, rows)
        if not options.weights or "train" in options.head:
            heads = [p for name in head_names(model) for p in model.get_submodule(name).parameters()]
            train_dense(
                model,
                heads if options.weights else list(model.parameters()),
                transform_of(model)(pool.images),
                torch.from_numpy(pool.labels),
                epochs=options.epochs,
                batch=options.batch,
                learning_rate=options.learning_rate,
                generator=numpy_generator(seed, "dense"),
                progress=progress,
            )
        cache.save(key, model.state_dict())
    return key, spec, cache.load(key, spec)
