"""The federation that `tapfl bench simulation` measures, for all its variants: options, images, initial adapters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import tomli_w
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.adapters import rules
from tapfl.adapters.layout import global_shapes
from tapfl.config import RunConfig
from tapfl.data.federated import DeviceSplit, kept_partition, open_pool, open_private
from tapfl.data.images import ImageSet
from tapfl.models.backbone import BackboneSpec, spec_of
from tapfl.models.dense import DenseCache, dense_backbone
from tapfl.models.forward import input_transform
from tapfl.models.prunable import prunable_layers
from tapfl.options import read_toml
from tapfl.seeds import numpy_generator, torch_generator
from tapfl.store import cache_folder
from tapfl.training import Params, batches, optimizer

CLASSES, POOL, TEST_SHARE = 10, 128, 0.2
ROUND_LINE = '"kind": "round"'


@dataclass(frozen=True)
class FederationOptions:
    """Options of the benchmarks that run whole federations."""

    rounds: Annotated[int, typer.Option(min=2, help="rounds; the first counts as start-up")] = 5
    repeats: Annotated[int, typer.Option(min=1, help="turns; results are their medians")] = 3
    samples: Annotated[int, typer.Option(min=10, help="training images per device")] = 64
    batch: Annotated[int, typer.Option(min=1, help="images per step")] = 32
    model_args: Annotated[str, typer.Option(help="as model.args")] = (
        "img_size=32,patch_size=4,embed_dim=96,depth=6,num_heads=3"
    )
    workers: Annotated[int, typer.Option(min=1, help="worker processes, with one thread each")] = 2
    together: Annotated[
        str, typer.Option(help="as train.together; the loop by hand always trains one device after another")
    ] = "1"


@dataclass(frozen=True)
class Workload:
    """A federation of equal devices that keep the whole backbone, so that FedAvg is a plain weighted mean."""

    config: RunConfig
    backbone_key: str

    @classmethod
    def prepare(cls, folder: Path, devices: int, options: FederationOptions) -> Workload:
        """Writes images of random noise, the options as ``config.toml``, and a cache with the backbone to `folder`."""
        pixels = int(dict(part.split("=") for part in options.model_args.split(","))["img_size"])
        for name, count in (("pool", POOL), ("private", round(devices * options.samples / (1 - TEST_SHARE)))):
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
                "model.args": options.model_args,
                "model.epochs": 1,
                "summary.max-components": 1,
                "metric.rule": "random",
                "metric.size": 64,
                "pruning.criterion": "random",
                "pruning.ratio": "uniform",
                "adapters.rule": "fedit",
                "adapters.head": "mean",
                "train.rounds": options.rounds,
                "train.epochs": 1,
                "train.batch": options.batch,
                "train.together": options.together,
                "personalize.method": "fedavg",
            }
        )
        pool = open_pool(config.data, input_transform(config.model), config.seed, cache_folder(config.cache))
        key, _, _ = dense_backbone(config.model, pool, config.seed, DenseCache(cache_folder(config.cache)))
        (folder / "config.toml").write_text(tomli_w.dumps(config.flat()))
        (folder / "backbone").write_text(key)
        return cls(config, key)

    @classmethod
    @cache
    def read(cls, folder: str) -> Workload:
        """Returns the workload that `prepare` wrote to a folder; a process reads it only once."""
        config = RunConfig.from_flat(read_toml(Path(folder) / "config.toml"))
        return cls(config, (Path(folder) / "backbone").read_text())

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
        """Returns (inputs, labels) of the `train` or `test` part of a device; kept in memory."""
        if (device, name) not in self._parts:
            private, splits = self._private
            chosen = private.subset(getattr(splits[device], name))
            inputs = input_transform(self.config.model)(chosen.read())
            self._parts[device, name] = inputs, torch.from_numpy(chosen.labels)
        return self._parts[device, name]

    def train(self, model: nn.Module, params: list[Tensor], round: int, device: int) -> tuple[float, int]:
        """Trains `params` of `model` in place for a device's round; returns the mean loss and the number of samples."""
        options = self.config.train
        inputs, labels = self.part(device, "train")
        stepper = optimizer(options, params, options.learning_rate)
        order = numpy_generator(self.config.seed, "train", round, device)
        losses = []
        for batch in batches(len(labels), options.batch, options.epochs, order):
            index = torch.from_numpy(batch)
            loss = F.cross_entropy(model(inputs[index]), labels[index])
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            losses.append(loss.item())
        return sum(losses) / len(losses), len(labels)

    @cached_property
    def _parts(self) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def _private(self) -> tuple[ImageSet, list[DeviceSplit]]:
        config = self.config
        cache = cache_folder(config.cache)
        private = open_private(config.data, input_transform(config.model), config.seed, cache)
        return private, kept_partition(private, config.data, config.devices.count, config.seed, cache)


def note_round(out: Path, round: int) -> None:
    """Appends the line that marks the end of a round, as `tapfl run` does in its metrics."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "round", "round": round}) + "\n")
