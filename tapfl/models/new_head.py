"""A new classifier for the classes that the devices report, in place of the one in the backbone's weights.

With ``model.head = new`` or ``prototypes``, the public pool may have other classes than the devices, or none. Two heads
then share one backbone. The *old* head comes with the weights or is trained on the pool's own classes. It never leaves
the server; scores, layer importance and distillation use its predictions. The *new* head has one row for each class of
the devices. Devices get it, train it and share it. It starts at 0, or from the rows of the old head that
`model.head-rows` names, or on each device from the means of its own classes (`fill_with_prototypes`). These means stay
on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tapfl.config import ModelOptions
from tapfl.errors import ModelError
from tapfl.models.backbone import LARGEST_ARGUMENT, BackboneSpec, build
from tapfl.models.dense import DenseCache
from tapfl.models.forward import head_names
from tapfl.models.units import put
from tapfl.models.weights import head_tensors, read_head_rows, take_rows
from tapfl.store import content_hash

NEVER = -100.0  # far below the logits of other classes, which are of the order of 1

Dense = tuple[str, BackboneSpec, nn.Module]  # key in the cache, description, model


def numbered(classes: Sequence[str]) -> list[str]:
    """Returns numbers that a device reports in place of its class names, if its classifier is personal."""
    return sorted(map(str, range(len(classes))))


def agreed_classes(names: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Returns the distinct classes of all devices, sorted by name."""
    return tuple(sorted({name for own in names for name in own}))


def with_new_head(options: ModelOptions, old: Dense, classes: Sequence[str], cache: DenseCache) -> Dense:
    """Returns the backbone with a new classifier of `classes`, which is cached under a key of its own.

    Raises:
        ModelError: if there are too many classes, or `model.head-rows` does not name a row of the old head for each.
    """
    if len(classes) > LARGEST_ARGUMENT:
        raise ModelError(f"the devices name {len(classes)} classes; accepted: at most {LARGEST_ARGUMENT}")
    key, spec, model = old
    spec = spec.model_copy(update={"num_classes": len(classes)})
    key = content_hash(key, spec.model_dump_json(), *(classes if options.head_rows else ()))
    if not cache.holds(key):
        fresh, state = build(spec), dict(model.state_dict())
        heads = head_tensors(fresh)
        if options.head_rows:
            rows = Path(options.head_rows)
            take_rows(state, heads, read_head_rows(rows, tuple(classes)), rows, "the head of model.weights")
        else:
            state |= {name: torch.zeros_like(fresh.get_parameter(name)) for name in heads}
        cache.save(key, state)
    return key, spec, cache.load(key, spec)


def put_head(model: nn.Module, source: nn.Module) -> nn.Module:
    """Returns a copy of `model`, pruned or not, with the classifier of `source`, which has the same feature width."""
    model = copy.deepcopy(model)
    for name in head_names(source):
        put(model, name, copy.deepcopy(source.get_submodule(name)))
    model.num_classes = source.num_classes
    return model


def fill_with_prototypes(model: nn.Module, features: np.ndarray, labels: np.ndarray) -> nn.Module:
    """Returns a copy of `model` that assigns an image to the class with the nearest mean.

    Its logits are -‖f - m_c‖² / 2τ up to a constant that is the same for all classes. m_c is the mean of the features f
    of class c, and τ the mean squared distance of an image to the mean of its class (weight imprinting, Qi et al. 2018,
    arXiv 1712.07136, without normalising the features). A class without images is never predicted.

    Args:
        features: of the device's own images before the head, float32 (n, width).
        labels: int64 (n,).
    """
    model = copy.deepcopy(model)
    heads: list[nn.Linear] = [model.get_submodule(name) for name in head_names(model)]  # type: ignore[misc]
    centre = features.mean(axis=0, dtype=np.float64)
    means = np.zeros((heads[0].out_features, features.shape[1]))
    for label in np.unique(labels):
        means[label] = features[labels == label].mean(axis=0, dtype=np.float64) - centre
    spread = np.mean(np.sum((features - centre - means[labels]) ** 2, axis=1))
    weight = means / max(float(spread), 1e-12)
    bias = -weight @ centre - (weight * means).sum(axis=1) / 2
    bias[np.setdiff1d(np.arange(len(bias)), labels)] = NEVER
    for head in heads:
        head.weight.data.copy_(torch.from_numpy(weight))
        head.bias.data.copy_(torch.from_numpy(bias))
    return model
