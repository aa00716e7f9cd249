"""Adapters: a round's aggregation on the server, and a step of APFL.

Aggregation: every rule, with robust combinations and server optimisers. Devices have the default budgets and ranks in
turn, plans of random units that meet the budget, and random adapters, because the time depends on shapes and indices,
not on values. `flex` picks the smaller of two forms of a linear layer's mean product, Σ r_i thin factors or the dense
matrix; here each form is also measured on all layers.

APFL: a step against common implementations, stock peft and copies of whole models. All variants take turns on the same
random inputs with the same Adam, on one thread, with dense backbones of random weights. The unit is two steps of stock
peft, one for the shared adapters and one for the personal ones. *Frozen* is the lower bound for any method that trains
adapters in two models: two forward and backward passes through the backbone, without adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bench.local_training import IMAGENET, SCALE, model_of, spec_named, specs
from experiments.bench.timing import Counts, Models, Repeats, Row, Sizes, peak_process_bytes, side_by_side
from tapfl.adapters import flex, rules
from tapfl.adapters.layout import (
    LORA_A,
    LORA_B,
    Placement,
    Update,
    device_layout,
    gather_all,
    global_shapes,
    last_blocks,
)
from tapfl.adapters.lora import AdaptedModel, modules_of
from tapfl.adapters.peft_format import peft_name
from tapfl.compute import HERE
from tapfl.config import AdapterOptions, DeviceOptions, PrivacyOptions, PruningOptions, TrainOptions
from tapfl.models.backbone import BackboneSpec, build
from tapfl.models.forward import example_input, head_names
from tapfl.models.prunable import prunable_layers
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.methods import FedAvg
from tapfl.pruning.criteria.norms import random_units
from tapfl.pruning.pipeline import plan_of, pruning_task
from tapfl.seeds import numpy_generator, torch_generator
from tapfl.training import Params

VARIANTS: dict[str, AdapterOptions] = {
    "fedit": AdapterOptions(rule="fedit"),
    "hetlora": AdapterOptions(rule="hetlora"),
    "fedit, clip": AdapterOptions(rule="fedit", clip=1.0),
    "fedit, adam": AdapterOptions(rule="fedit", server="adam"),
    "fedit, median": AdapterOptions(rule="fedit", combine="median"),
    "fedit, trimmed mean": AdapterOptions(rule="fedit", combine="trimmed-mean"),
    "ffa": AdapterOptions(rule="ffa"),
    "rolora": AdapterOptions(rule="rolora"),
    "embed_side": AdapterOptions(rule="embed_side"),
    "flex": AdapterOptions(rule="flex"),
    "flex, adam": AdapterOptions(rule="flex", server="adam"),
}
ROBUST_PRODUCTS: dict[str, AdapterOptions] = {
    "flex, median": AdapterOptions(rule="flex", combine="median"),
    "flex, trimmed mean": AdapterOptions(rule="flex", combine="trimmed-mean"),
}
THIN, DENSE = "flex SVDs, all thin", "flex SVDs, all dense"


@dataclass(frozen=True)
class Round:
    """One round: the global adapters, and the updates of the devices."""

    params: Params
    updates: Sequence[Update]

    def aggregate(self, options: AdapterOptions) -> Params:
        """Returns the global adapters after the round."""
        generator = numpy_generator(0, "bench aggregate")
        state = rules.ServerState(self.params)
        return rules.aggregate(options, PrivacyOptions(), state, self.updates, self.params, 1, generator).params

    def stacked(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the stacked factors B, A of every linear layer, whose product is the mean product."""
        for a in self.params:
            if a.endswith(LORA_A):
                b = a.removesuffix(LORA_A) + LORA_B
                yield flex.stacked_mean(self.params[b], self.params[a], self.updates, b, a)


def aggregate(
    devices: Counts = [10, 100],
    model: Annotated[str, typer.Option(help="timm name")] = "deit_small_patch16_224",
    repeats: Repeats = 3,
    robust_products: Annotated[bool, typer.Option(help="also medians and trimmed means of products (slow)")] = True,
) -> Iterator[Row]:
    """Aggregation on the server by every rule: CPU seconds and memory per round; of flex also each of its two forms."""
    spec = spec_named(model, classes=IMAGENET)
    chosen = VARIANTS | (ROBUST_PRODUCTS if robust_products else {})
    for count in devices:
        yield from rows_of(random_round(spec, count), chosen, repeats)


def rows_of(round: Round, variants: dict[str, AdapterOptions], repeats: int) -> Iterator[Row]:
    """Yields a row for each rule; those of the two forms of flex have the number of elements of the largest layer."""
    torch.set_num_threads(1)
    work: dict[str, Callable[[], object]] = {
        name: partial(round.aggregate, options) for name, options in variants.items()
    }
    work[THIN] = lambda: [flex.thin_svd(B, A) for B, A in round.stacked()]
    work[DENSE] = lambda: [torch.linalg.svd(B @ A, full_matrices=False) for B, A in round.stacked()]
    sizes = {
        THIN: max(B.numel() + A.numel() for B, A in round.stacked()),
        DENSE: max(len(B) * A.shape[1] for B, A in round.stacked()),
    }
    seconds = side_by_side(work, repeats)
    for name in work:
        grown = peak_process_bytes(work[name])
        yield {
            "devices": str(len(round.updates)),
            "aggregation": name,
            "s": f"{seconds[name]:.2f}",
            "peak MB": "?" if grown is None else f"{grown / 1e6:.0f}",
            "largest form": f"{sizes[name] / 1e3:.0f} k" if name in sizes else "",
        }


def random_round(spec: BackboneSpec, devices: int) -> Round:
    """Returns random adapters of the largest default rank, and updates close to them from different devices."""
    model = model_of(spec)
    layers, defaults = prunable_layers(model), DeviceOptions()
    shapes = global_shapes(model, layers, max(defaults.ranks))
    options = PruningOptions(criterion="random", ratio="uniform", align=1)
    tasks = [pruning_task(model, example_input(model, 1), budget, options, batch=1) for budget in defaults.budgets]
    generator = torch_generator(0, "bench aggregate")

    def noise(shape: Sequence[int]) -> Tensor:
        return 0.1 * torch.randn(tuple(shape), generator=generator)

    params: Params = {name: noise(shape) for name, shape in shapes.items()}
    updates = []
    for i in range(devices):
        task, rank = tasks[i % len(tasks)], defaults.ranks[i % len(defaults.ranks)]
        chosen = random_units(replace(task, generator=torch_generator(0, "bench aggregate", i)))
        layout = device_layout(shapes, layers, plan_of(task, chosen, spec, small=model), rank)
        own = {name: theta + noise(theta.shape) for name, theta in gather_all(params, layout).items()}
        updates.append(Update(own, layout, 100.0 + i))
    return Round(params, updates)


CLASSES = 100
TRAIN = TrainOptions()


@dataclass(frozen=True)
class Work:
    """A frozen backbone, adapters for it, and a batch."""

    model: nn.Module
    params: Params
    inputs: Tensor
    labels: Tensor

    @classmethod
    def of(cls, spec: BackboneSpec, rank: int, batch: int, blocks: int = 0) -> Work:
        model = build(spec).requires_grad_(False).eval()
        layers, generator = last_blocks(prunable_layers(model), blocks), torch.Generator().manual_seed(0)
        params = rules.initial(AdapterOptions(), global_shapes(model, layers, rank), layers, model, generator)
        inputs = torch.randn(example_input(model, batch).shape)
        return cls(model, params, inputs, torch.randint(spec.num_classes, (batch,)))

    def adapted(self) -> AdaptedModel:
        layout = {name: Placement(tuple(map(torch.arange, theta.shape))) for name, theta in self.params.items()}
        return AdaptedModel(self.model, layout, SCALE)

    def loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        return F.cross_entropy(model(self.inputs), self.labels)


class PeftStep:
    """Training steps of a stock peft model, which starts from the adapters of `work`."""

    def __init__(self, work: Work) -> None:
        from peft import LoraConfig, get_peft_model

        self.work = work
        rank = next(len(theta) for name, theta in work.params.items() if name.endswith(LORA_A))
        config = LoraConfig(
            r=rank,
            lora_alpha=SCALE * rank,  # peft divides by r
            target_modules=modules_of(name for name in work.params if name.endswith(LORA_A)),
            modules_to_save=list(head_names(work.model)),
        )
        self.model: Any = get_peft_model(copy.deepcopy(work.model), config).eval()
        named = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        trained = {name.replace(".modules_to_save", "").replace(".default", ""): p for name, p in named}
        self.trained = {name: trained[peft_name(name)] for name in work.params}
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(work.params[name])
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=TRAIN.learning_rate)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.work.loss(self.model)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class DeepCopies:
    """APFL as it is commonly built: each step interpolates all parameters of two whole models in a deep copy."""

    def __init__(self, work: Work, alpha: float) -> None:
        self.w, self.v, self.alpha = PeftStep(work), PeftStep(work), alpha

    def __call__(self) -> None:
        between = copy.deepcopy(self.v.model)
        with torch.no_grad():
            for mixed, shared in zip(between.parameters(), self.w.model.parameters(), strict=True):
                mixed.mul_(self.alpha).add_(shared, alpha=1 - self.alpha)
        self.v.work.loss(between).backward()
        for own, mixed in zip(self.v.model.parameters(), between.parameters(), strict=True):
            own.grad = None if mixed.grad is None else self.alpha * mixed.grad
        self.v.optimizer.step()
        self.w()


def frozen_passes(work: Work) -> Callable[[], None]:
    """Returns a function that only does two forward and backward passes through the backbone."""
    model = copy.deepcopy(work.model)
    model.get_submodule(modules_of(work.params)[0]).register_forward_hook(
        lambda module, args, output: output.requires_grad_()
    )

    def run() -> None:
        for _ in range(2):
            work.loss(model).backward()

    return run


def step_of(work: Work, method: Apfl | FedAvg, kept: bool = False) -> Callable[[], Tensor]:
    """Returns our training step; each call is the next step of the same round.

    Args:
        kept: whether the activations that enter the first adapter have been computed before.
    """
    adapted, inputs = work.adapted(), work.inputs
    if kept:
        adapted, inputs = adapted.beyond, adapted.before(inputs)
    state: Any = method.init(work.params, None, TRAIN, frozenset(work.params))
    loss = partial(F.cross_entropy, target=work.labels)
    return lambda: method.step(state, lambda params, batch: adapted.losses(params, inputs, loss), None).detach()


def apfl(
    model: Models = ["digits"],
    size: Sizes = [64],
    batch: Annotated[int, typer.Option(min=2, help="images per step")] = 16,
    rank: Annotated[int, typer.Option(min=1, help="rank of every adapter")] = 8,
    blocks: Annotated[
        int, typer.Option(min=0, help="as adapters.blocks; above 0, steps from kept activations are measured too")
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, help="steps per turn")] = 4,
    repeats: Repeats = 5,
) -> Iterator[Row]:
    """A step of APFL relative to two steps of stock peft, with deep copies and the lower bound; one thread, Adam."""
    HERE.prepare()
    for name, spec in specs(model, size, CLASSES):
        torch.manual_seed(0)
        shares = _shares(Work.of(spec, rank, batch, blocks), steps, repeats, blocks > 0)
        row = {"model": name, "batch": str(batch), "two peft ms": f"{shares.pop('two peft') * 1e3:.1f}"}
        yield row | {variant: f"{share:.2f}" for variant, share in shares.items()}


def _shares(work: Work, steps: int, repeats: int, kept: bool) -> dict[str, float]:
    """Returns the seconds of two peft steps, and the time of each other variant relative to them."""
    both = PeftStep(work), PeftStep(work)
    variants: dict[str, Callable[[], object]] = {
        "two peft": lambda: [step() for step in both],
        "one peft": PeftStep(work),
        "deep copies": DeepCopies(work, 0.5),
        "frozen": frozen_passes(work),
        "FedAvg": step_of(work, FedAvg()),
        "APFL": step_of(work, Apfl()),
        "α moves": step_of(work, Apfl(update="step")),
    }
    if kept:
        variants |= {"FedAvg, kept": step_of(work, FedAvg(), kept), "APFL, kept": step_of(work, Apfl(), kept)}
    for run in variants.values():
        run()  # the first step allocates the optimiser's state and changes α
    seconds = side_by_side({name: partial(_repeat, run, steps) for name, run in variants.items()}, repeats)
    unit = seconds.pop("two peft")
    return {"two peft": unit / steps} | {name: taken / unit for name, taken in seconds.items()}


def _repeat(run: Callable[[], object], steps: int) -> None:
    for _ in range(steps):
        run()
