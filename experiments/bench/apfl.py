"""A step of APFL with LoRA against the ways in which it is commonly built: stock peft, and copies of whole models.

All take turns on the same noise with the same Adam, on one thread, dense backbones with random weights. The unit is
two steps of stock peft, one for the shared adapters and one for the personal ones. *Frozen* is the floor for whatever
trains adapters in two models: two passes forward and backward through the backbone, with no adapters at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bench.side_by_side import side_by_side
from tapfl.adapters import rules
from tapfl.adapters.layout import LORA_A, LORA_B, Placement, global_shapes
from tapfl.adapters.lora import AdaptedModel, modules_of
from tapfl.config import AdapterOptions, RunConfig, TrainOptions
from tapfl.models.backbone import BackboneSpec, build, spec_of
from tapfl.models.forward import example_input, head_names
from tapfl.models.prunable import prunable_layers
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.methods import FedAvg
from tapfl.training import Params

SCALE, CLASSES = 2.0, 100
TRAIN = TrainOptions()


@dataclass(frozen=True)
class Work:
    """A frozen backbone, adapters for it, and a batch."""

    model: nn.Module
    params: Params
    inputs: Tensor
    labels: Tensor

    @classmethod
    def of(cls, spec: BackboneSpec, rank: int, batch: int) -> Work:
        model = build(spec).requires_grad_(False).eval()
        layers, generator = prunable_layers(model), torch.Generator().manual_seed(0)
        params = rules.initial(AdapterOptions(), global_shapes(model, layers, rank), layers, model, generator)
        inputs = torch.randn(example_input(model, batch).shape)
        return cls(model, params, inputs, torch.randint(spec.num_classes, (batch,)))

    def adapted(self) -> AdaptedModel:
        layout = {name: Placement(tuple(map(torch.arange, theta.shape))) for name, theta in self.params.items()}
        return AdaptedModel(self.model, layout, SCALE)

    def loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        return F.cross_entropy(model(self.inputs), self.labels)


class PeftStep:
    """Steps of one stock peft model, from the adapters of the work."""

    def __init__(self, work: Work) -> None:
        from peft import LoraConfig, get_peft_model

        self.work = work
        rank = next(len(theta) for name, theta in work.params.items() if name.endswith(LORA_A))
        linears = modules_of(name for name in work.params if name.endswith(LORA_A))
        config = LoraConfig(
            r=rank,
            lora_alpha=SCALE * rank,  # type: ignore[arg-type]  # peft divides by r
            target_modules=linears,
            modules_to_save=list(head_names(work.model)),
        )
        self.model: Any = get_peft_model(copy.deepcopy(work.model), config).eval()
        trained = {_plain(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, theta in work.params.items():
                trained[name].copy_(theta)
        self.trained = {name: trained[name] for name in work.params}
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=TRAIN.learning_rate)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.work.loss(self.model)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class DeepCopies:
    """APFL as it is commonly built: each step mixes all parameters of two whole models in a third, a deep copy."""

    def __init__(self, work: Work, alpha: float) -> None:
        self.w, self.v, self.alpha = PeftStep(work), PeftStep(work), alpha

    def __call__(self) -> None:
        mixture = copy.deepcopy(self.v.model)
        with torch.no_grad():
            for mixed, shared in zip(mixture.parameters(), self.w.model.parameters(), strict=True):
                mixed.mul_(self.alpha).add_(shared, alpha=1 - self.alpha)
        self.v.work.loss(mixture).backward()
        for own, mixed in zip(self.v.model.parameters(), mixture.parameters(), strict=True):
            own.grad = None if mixed.grad is None else self.alpha * mixed.grad
        self.v.optimizer.step()
        self.w()


def frozen_passes(work: Work) -> Callable[[], None]:
    """Returns two passes forward and backward through the backbone and nothing else."""
    model = copy.deepcopy(work.model)
    model.get_submodule(modules_of(work.params)[0]).register_forward_hook(
        lambda module, args, output: output.requires_grad_()
    )

    def run() -> None:
        for _ in range(2):
            work.loss(model).backward()

    return run


def step_of(work: Work, method: Apfl | FedAvg) -> Callable[[], Tensor]:
    """Returns a step of ours, of which every call is the next one of the same round."""
    adapted = work.adapted()
    state: Any = method.init(work.params, None, TRAIN, frozenset(work.params))
    return lambda: method.step(state, lambda params, batch: work.loss(lambda x: adapted(params, x)), None).detach()


def bench_apfl(name: str, image_size: int, batch: int, rank: int, steps: int, repeats: int) -> Mapping[str, str]:
    """Returns a row for `digits` or one of timm's names: CPU ms of two peft steps, and the others' share of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name == "digits":
        spec = spec_of(RunConfig().model, tuple("0123456789"))
    else:
        spec = BackboneSpec(name=name, args={"img_size": image_size}, num_classes=CLASSES)
    work = Work.of(spec, rank, batch)
    w, v = PeftStep(work), PeftStep(work)

    def both() -> None:
        w()
        v()

    variants: dict[str, Callable[[], object]] = {
        "two peft": both,
        "one peft": PeftStep(work),
        "deep copies": DeepCopies(work, 0.5),
        "frozen": frozen_passes(work),
        "FedAvg": step_of(work, FedAvg()),
        "APFL": step_of(work, Apfl()),
        "α moves": step_of(work, Apfl(update="step")),
    }
    for run in variants.values():
        run()  # the first step allocates the optimizer's state, and moves α
    seconds = side_by_side({name: _times(run, steps) for name, run in variants.items()}, repeats)
    unit = seconds.pop("two peft")
    return {
        "model": "digits" if name == "digits" else f"{name.removesuffix('_patch16_224')} {image_size} px",
        "batch": str(batch),
        "two peft ms": f"{unit / steps * 1e3:.1f}",
        **{variant: f"{taken / unit:.2f}" for variant, taken in seconds.items()},
    }


def _times(run: Callable[[], object], steps: int) -> Callable[[], None]:
    def all_steps() -> None:
        for _ in range(steps):
            run()

    return all_steps


def _plain(name: str) -> str:
    """The name of one of peft's parameters as ours: no prefix, no adapter's name, no `.weight` after a factor."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if name.endswith((f"{LORA_A}.weight", f"{LORA_B}.weight")) else name
