"""What a worker process keeps between messages, keyed by content: any entry can be dropped at any time.

Kept in an importable module, because Ray pickles by value what lives in `__main__`, and its caches would be empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tapfl.adapters.layout import Layout, device_layout, global_shapes
from tapfl.adapters.lora import AdaptedModel
from tapfl.config import RunConfig
from tapfl.data.federated import open_private
from tapfl.data.partition import DeviceSplit, partition
from tapfl.data.sources import ImageSet
from tapfl.memo import Memo
from tapfl.models.backbone import BackboneSpec, build, input_transform
from tapfl.models.dense import DenseCache
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer
from tapfl.pruning.surgery import load_plan, load_pruned
from tapfl.store import cache_folder

MODEL_BYTES = 512 * 2**20  # a worker's devices' models; one that is not held is read again


@lru_cache(maxsize=4)
def private_images(config: RunConfig) -> ImageSet:
    """Returns the private images of the federation that `config` describes."""
    return open_private(config.data, input_transform(config.model), config.seed, cache_folder(config.cache))


@lru_cache(maxsize=4)
def splits(config: RunConfig, devices: int) -> list[DeviceSplit]:
    """Returns who holds which of them."""
    return partition(private_images(config).labels, config.data, devices, config.seed)


@lru_cache(maxsize=256)
def part(config: RunConfig, devices: int, partition_id: int, name: str) -> tuple[Tensor, Tensor]:
    """Returns (inputs, labels) of the `train` or `test` part of one device, ready for its model."""
    chosen = private_images(config).subset(getattr(splits(config, devices)[partition_id], name))
    return input_transform(config.model)(chosen.images), torch.from_numpy(chosen.labels)


@lru_cache(maxsize=2)
def dense(cache: Path, key: str, spec: str) -> nn.Module:
    """Returns the dense backbone with this key; `spec` is a BackboneSpec as JSON."""
    return DenseCache(cache).load(key, BackboneSpec.model_validate_json(spec))


@lru_cache(maxsize=2)
def skeleton(spec: str) -> tuple[nn.Module, list[PrunableLayer]]:
    """Returns a backbone to cut, whatever its weights, and its layers; `spec` is a BackboneSpec as JSON."""
    model = build(BackboneSpec.model_validate_json(spec)).requires_grad_(False)
    return model, prunable_layers(model)


@dataclass(frozen=True)
class PrunedDevice:
    """A device's own model: where its adapters lie, the model as a function of them, and the bytes of its weights."""

    layout: Layout
    adapted: AdaptedModel
    nbytes: int


_models = Memo(MODEL_BYTES, lambda device: device.nbytes)


def pruned(folder: Path, rank: int, scale: float) -> PrunedDevice:
    """Returns the model in a device's storage. Raises PlanError if it is missing or damaged."""
    plan, checksum = load_plan(folder)

    def make() -> PrunedDevice:
        dense, layers = skeleton(plan.backbone.model_dump_json())
        layout = device_layout(global_shapes(dense, layers, rank), layers, plan, rank)
        model = load_pruned(folder, dense)
        nbytes = sum(parameter.nbytes for parameter in model.parameters())
        return PrunedDevice(layout, AdaptedModel(model, layout, scale), nbytes)

    device: PrunedDevice = _models.once((folder, checksum, rank, scale), make)
    return device
