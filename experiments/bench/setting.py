"""The federation that `tapfl bench simulation` measures, as its variants see it: options, images, first adapters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tomli_w
import torch
from torch import Tensor, nn

from tapfl.adapters import rules
from tapfl.adapters.layout import global_shapes
from tapfl.config import RunConfig, read_toml
from tapfl.data.federated import open_pool, open_private
from tapfl.data.partition import partition
from tapfl.models.backbone import BackboneSpec, spec_of
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.models.forward import input_transform
from tapfl.models.prunable import prunable_layers
from tapfl.seeds import numpy_generator, torch_generator
from tapfl.store import cache_folder
from tapfl.training import Params

CLASSES, POOL, TEST_SHARE = 10, 128, 0.2
ROUND_LINE = '"kind": "round"'


@dataclass
class Setting:
    """A federation of equal devices that keep the whole backbone, so that FedAvg over it is a plain mean."""

    config: RunConfig
    backbone_key: str

    @classmethod
    def prepare(cls, folder: Path, devices: int, rounds: int, samples: int, model_args: str, batch: int) -> Setting:
        """Writes images of noise and the options to `folder`, and the backbone to a cache in it."""
        pixels = int(dict(part.split("=") for part in model_args.split(","))["img_size"])
        for name, count in (("pool", POOL), ("private", round(devices * samples / (1 - TEST_SHARE)))):
            images = numpy_generator(0, name).integers(0, 256, (count, pixels, pixels, 3), dtype=np.uint8)
            np.savez(folder / f"{name}.npz", images=images, labels=np.arange(count) % CLASSES)
        config = RunConfig.from_flat(
            {
                "cache": str(folder / "cache"),
                "data.source": str(folder / "private.npz"),
                "data.public": str(folder / "pool.npz"),
                "data.partition": "iid",
                "data.test-share": TEST_SHARE,
                "devices.count": devices,
                "devices.budgets": 1.0,
                "devices.ranks": 8,
                "model.args": model_args,
                "model.epochs": 1,
                "summary.max-components": 1,
                "metric.rule": "random",
                "metric.size": 64,
                "pruning.criterion": "random",
                "pruning.ratio": "uniform",
                "adapters.rule": "fedit",
                "adapters.head": "mean",
                "train.rounds": rounds,
                "train.epochs": 1,
                "train.batch": batch,
                "personalize.method": "fedavg",
            }
        )
        pool = open_pool(config.data, input_transform(config.model), config.seed, cache_folder(config.cache))
        key, _, _ = dense_backbone(config.model, pool, config.seed, DenseCache(cache_folder(config.cache)))
        (folder / "config.toml").write_text(tomli_w.dumps(config.flat()))
        (folder / "backbone").write_text(key)
        return cls(config, key)

    @classmethod
    def read(cls, file: Path) -> Setting:
        """Returns what `prepare` left in the folder of `file`."""
        return cls(RunConfig.from_flat(read_toml(file)), (file.parent / "backbone").read_text())

    @property
    def spec(self) -> BackboneSpec:
        return spec_of(self.config.model, tuple(map(str, range(CLASSES))))

    @property
    def rank(self) -> int:
        return self.config.devices.ranks[0]

    def dense(self) -> nn.Module:
        """Returns the backbone, frozen."""
        return DenseCache(cache_folder(self.config.cache)).load(self.backbone_key, self.spec)

    def initial(self) -> Params:
        """Returns the adapters before the first round."""
        model = self.dense()
        layers = prunable_layers(model)
        shapes, generator = global_shapes(model, layers, self.rank), torch_generator(self.config.seed, "adapters")
        return rules.initial(self.config.adapters, shapes, layers, model, generator)

    def part(self, device: int, name: str) -> tuple[Tensor, Tensor]:
        """Returns (inputs, labels) of the `train` or `test` part of a device; kept, because images do not change."""
        if (device, name) not in self._parts:
            private, splits = self._private
            chosen = private.subset(getattr(splits[device], name))
            inputs = input_transform(self.config.model)(chosen.images)
            self._parts[device, name] = inputs, torch.from_numpy(chosen.labels)
        return self._parts[device, name]

    @cached_property
    def _parts(self) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def _private(self):  # type: ignore[no-untyped-def]
        config = self.config
        private = open_private(config.data, input_transform(config.model), config.seed, cache_folder(config.cache))
        return private, partition(private.labels, config.data, config.devices.count, config.seed)

    @staticmethod
    def note_round(out: Path, round: int) -> None:
        """Adds the line by which a round's end is seen, as `tapfl run` does in its metrics."""
        out.mkdir(parents=True, exist_ok=True)
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "round", "round": round}) + "\n")
