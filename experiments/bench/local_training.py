"""Models with random weights for the benchmarks, and a device's local training, as ours and as a loop by hand.

Neither Flower nor Ray is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfl.adapters import rules
from tapfl.adapters.layout import device_layout, gather_all, global_shapes
from tapfl.adapters.lora import AdaptedModel, interpolate
from tapfl.compute import Compute
from tapfl.config import AdapterOptions, PruningOptions, TrainOptions
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.forward import example_input
from tapfl.models.prunable import prunable_layers
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.method import Method
from tapfl.personalize.methods import FedAvg
from tapfl.personalize.together import LocalTask
from tapfl.pruning.pipeline import Pruned, prune_model, pruning_task
from tapfl.seeds import numpy_generator, torch_generator
from tapfl.training import Params, batches

RANK, SCALE, CLASSES, ALPHA = 8, 2.0, 20, 0.5
IMAGENET = 1000  # classes
RATE = TrainOptions().learning_rate
DIGITS = BackboneSpec(
    name="vit_tiny_patch16_224",
    args={"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4},
    num_classes=10,
)
METHODS: dict[str, Method[Any]] = {"fedavg": FedAvg(), "apfl": Apfl(ALPHA, "fixed")}


def spec_named(name: str, pixels: int = 224, classes: int = CLASSES) -> BackboneSpec:
    """Returns the spec of `digits`, or of a timm model for images with `pixels` pixels per side."""
    if name == "digits":
        return DIGITS
    return BackboneSpec(name=name, args={} if pixels == 224 else {"img_size": pixels}, num_classes=classes)


def specs(models: Sequence[str], sizes: Sequence[int], classes: int = CLASSES) -> Iterator[tuple[str, BackboneSpec]]:
    """Yields each model in each size: its name in a table, and its spec."""
    for name in models:
        for pixels in sizes[:1] if name == "digits" else sizes:
            shown = name if name == "digits" else f"{name.removesuffix('_patch16_224')} {pixels} px"
            yield shown, spec_named(name, pixels, classes)


def model_of(spec: BackboneSpec) -> nn.Module:
    """Returns a frozen model with random weights, which are the same in each call."""
    torch.manual_seed(0)
    return build(spec).requires_grad_(False)


def drawn(model: nn.Module, count: int, seed: int = 0) -> Tensor:
    """Returns random inputs of a model."""
    return torch.randn(example_input(model, count).shape, generator=torch.Generator().manual_seed(seed))


def with_adapters(dense: nn.Module, made: Pruned, compute: Compute, rank: int = RANK) -> tuple[AdaptedModel, Params]:
    """Returns a pruned model as a function of its adapters, and the initial adapters."""
    layers = prunable_layers(dense)
    shapes = global_shapes(dense, layers, max(rank, RANK))
    layout = device_layout(shapes, layers, made.plan, rank)
    whole = rules.initial(AdapterOptions(), shapes, layers, dense, torch_generator(0, "adapters"))
    adapted = AdaptedModel(compute.put(made.model), layout, SCALE, compute.reduced)
    return adapted, compute.put(gather_all(whole, layout))


@dataclass(frozen=True)
class Device:
    """A pruned model as a function of its adapters, the adapters before a round, and training images.

    Attributes:
        seed: seed of the order of the images.
        macs: MACs of the model; 0: not measured.
    """

    adapted: AdaptedModel
    start: Params
    inputs: Tensor
    labels: Tensor
    seed: int = 0
    macs: int = 0

    @classmethod
    def random(
        cls, spec: BackboneSpec, images: int, compute: Compute, budget: float = 0.5, rank: int = RANK, seed: int = 0
    ) -> Device:
        """Returns a device with random images, and a randomly pruned model with random weights."""
        dense, options = model_of(spec), PruningOptions(criterion="random", ratio="uniform")
        made = prune_model(pruning_task(dense, drawn(dense, 4), budget, options, batch=4, seed=seed), spec)
        inputs, labels = compute.put(drawn(dense, images, seed)), compute.put(torch.arange(images) % spec.num_classes)
        return cls(*with_adapters(dense, made, compute, rank), inputs, labels, seed, made.plan.cost.macs)

    def loss(self, params: Any, index: Any) -> Tensor:
        return self.adapted.losses(params, self.inputs[index], partial(F.cross_entropy, target=self.labels[index]))

    def order(self, step: int, epochs: int = 1) -> Sequence[Tensor]:
        """Returns the positions of the images of each step of a round, at most `step` at a time."""
        generator = numpy_generator(0, "train", self.seed)
        return [torch.from_numpy(batch) for batch in batches(len(self.labels), step, epochs, generator)]

    def task(self, method: str, step: int, epochs: int = 1) -> LocalTask:
        """Returns a round of local training that is not computed yet."""
        order = self.order(step, epochs)
        train = TrainOptions(batch=step, steps=len(order), learning_rate=RATE)
        data = ((self.inputs[index], self.labels[index]) for index in order)
        return LocalTask(METHODS[method], self.adapted, self.start, None, data, train, frozenset(self.start), 0)

    def round(self, method: str, step: int, epochs: int = 1) -> Params:
        """Returns w after a round of local training."""
        return self.task(method, step, epochs).alone().upload or {}

    def by_hand(self, method: str, step: int, epochs: int = 1) -> tuple[Params, Params]:
        """Returns w and v after the same round, in a straightforward loop; v is empty unless the method is APFL."""
        w = _leaves(self.start)
        v = _leaves(self.start) if method == "apfl" else {}
        adam = torch.optim.Adam(list(w.values()), lr=RATE, fused=True)
        own = torch.optim.Adam(list(v.values()), lr=ALPHA * RATE, fused=True) if v else None
        for index in self.order(step, epochs):
            adam.zero_grad()
            if own:
                own.zero_grad()
                fixed = {name: theta.detach() for name, theta in w.items()}
                self.loss(interpolate(v, fixed, ALPHA), index).backward()
                own.step()
            self.loss(w, index).backward()
            adam.step()
        return w, v


def _leaves(params: Params) -> Params:
    return {name: theta.clone().requires_grad_() for name, theta in params.items()}
