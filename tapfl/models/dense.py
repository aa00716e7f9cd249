"""The dense backbone of a federation: loaded from a file or timm's hub, or trained, and then cached by content."""

from __future__ import annotations

import copy
import fcntl
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tapfl.compute import HERE, Compute
from tapfl.config import NEW_HEADS, ModelOptions
from tapfl.data.images import ImageSet
from tapfl.errors import ModelError
from tapfl.models.backbone import BackboneSpec, build, spec_of
from tapfl.models.forward import head_names, image_features, transform_of
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer
from tapfl.models.weights import fill_weights, rows_in_weights
from tapfl.progress import stage
from tapfl.seeds import numpy_generator
from tapfl.store import Pieces, content_hash, read_tensors, write_bytes, write_tensors
from tapfl.training import train_dense

BATCH = 64  # images in a minibatch when the backbone is trained


class DenseCache:
    """A folder of dense backbones by key, shared by all runs on a machine.

    A device that has a backbone in its cache need not be sent the weights.
    """

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "backbones"

    def path(self, key: str) -> Path:
        """Returns the file of a backbone. Raises ModelError if the key, which may come over the wire, is not valid."""
        if not re.fullmatch(r"[0-9a-f]{16}", key):
            raise ModelError(f"backbone key {key!r:.40}: must be 16 hex digits")
        return self.folder / f"{key}.safetensors"

    def holds(self, key: str) -> bool:
        return self.path(key).is_file()

    def load(self, key: str, spec: BackboneSpec) -> nn.Module:
        """Returns the backbone in evaluation mode, with all weights frozen."""
        model = build(spec)
        model.load_state_dict(read_tensors(self.path(key)))
        return model.requires_grad_(False)

    @contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Holds a lock so that only one run on this machine makes the backbone `key`; other runs wait for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / f".backbone-{key}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with stage("waiting for another run to make the backbone"):
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def save(self, key: str, state: dict[str, torch.Tensor]) -> None:
        write_tensors(self.path(key), state)

    def receive(self, key: str, weights: bytes) -> None:
        """Stores weights that came over the wire, as safetensors. Raises ModelError if the key is not valid."""
        write_bytes(self.path(key), weights)


def dense_key(options: ModelOptions, spec: BackboneSpec, pool: ImageSet, seed: int, compute: Compute = HERE) -> str:
    """Returns a hash of everything that the backbone's weights depend on."""
    files = [Path(name).read_bytes() for name in (options.weights, options.head_rows) if name and Path(name).is_file()]
    data: list[str | bytes | Pieces] = [str(pool.shape).encode(), *pool.content(), pool.labels.tobytes()]
    return content_hash(
        options.model_dump_json(), spec.model_dump_json(), str(seed), *data, *pool.classes, *files, *compute.marks
    )


def dense_spec(options: ModelOptions, pool: ImageSet) -> BackboneSpec:
    """Returns the spec of the backbone that is scored and cut. Usually its outputs are the classes of the pool.

    With a new head (`tapfl.models.new_head`) its outputs are those of the head in the weights, whatever their classes.

    Raises:
        ModelError: if the head needs labels of the pool, and the pool has none.
    """
    spec, head = spec_of(options, pool.classes), options.head
    if head in NEW_HEADS and (rows := rows_in_weights(options)):
        return spec.model_copy(update={"num_classes": rows})
    if pool.classes:
        return spec
    accepted = "accepted: a pool with labels, or model.head = 'new' with model.weights that have a head"
    if head == "rows":
        raise ModelError(f"model.head = 'rows': its classes are those of the pool, which has no labels; {accepted}")
    what = "the classifier is" if options.weights else "model.weights = '' and the backbone is"
    raise ModelError(f"model.head = {head!r}: {what} trained on the labels of the pool, which has none; {accepted}")


def dense_backbone(
    options: ModelOptions, pool: ImageSet, seed: int, cache: DenseCache, compute: Compute = HERE
) -> tuple[str, BackboneSpec, nn.Module]:
    """Returns (key, spec, model) of the backbone that the options name. The model is on the CPU.

    It is taken from the cache if it is there, and otherwise made and cached.

    Args:
        compute: the device to train on.

    Raises:
        ModelError: if the backbone is unknown, cannot be pruned, or its weights do not fit.
    """
    spec = dense_spec(options, pool)
    key = dense_key(options, spec, pool, seed, compute)
    if not cache.holds(key):
        with cache.making(key):
            if not cache.holds(key):  # another run may have made it meanwhile
                cache.save(key, _make(options, spec, pool, seed, compute).state_dict())
    return key, spec, cache.load(key, spec)


def layers_of(model: nn.Module, options: ModelOptions) -> list[PrunableLayer]:
    """Returns `prunable_layers` of a model. Raises ModelError, naming the options, if it cannot be pruned."""
    try:
        return prunable_layers(model)
    except ModelError as error:
        raise ModelError(f"model.name = {options.name!r} with model.args = {options.args!r:.200}: {error}") from None


def _make(options: ModelOptions, spec: BackboneSpec, pool: ImageSet, seed: int, compute: Compute) -> nn.Module:
    initial = int(numpy_generator(seed, "backbone").integers(2**62))
    model = build(spec, seed=initial)
    layers_of(model, options)  # raises before training if the model cannot be pruned
    fill_weights(model, options, spec, pool.classes, initial)
    train = partial(
        train_dense,
        labels=compute.put(torch.from_numpy(pool.labels)),
        epochs=options.epochs,
        batch=BATCH,
        learning_rate=options.learning_rate,
        generator=numpy_generator(seed, "dense"),
        name="dense backbone",
    )
    transform, model = transform_of(model), compute.put(model)
    if not options.weights:
        train(model, inputs=lambda index: compute.put(transform(pool.read(index))))
    elif "train" in options.head or (options.head in NEW_HEADS and not rows_in_weights(options)):
        features = image_features(model, transform.batches(pool))
        _train_head(model, compute.put(torch.from_numpy(features)), train)
    return model


def _train_head(model: nn.Module, features: Tensor, train: Callable[..., None]) -> None:
    """Trains the classifier on precomputed features. Both heads of a distilled DeiT get the same weights."""
    heads = [model.get_submodule(name) for name in head_names(model)]
    trained = copy.deepcopy(heads[0])
    train(trained, inputs=lambda index: features[torch.from_numpy(index)])
    for head in heads:
        head.load_state_dict(trained.state_dict())
