"""The interface of a personalisation method, one round of it on a device, and parameters in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tapfl.adapters.stack import LINE, flat, parts_of, shapes_of
from tapfl.compute import Recorder, home
from tapfl.config import TrainOptions
from tapfl.personalize.held_out import Losses
from tapfl.personalize.recorded import WORTH, RecordedStep
from tapfl.training import LARGEST, Objective, Params, diverged, largest, optimizer

S = TypeVar("S")
Names = frozenset[str]
TINY = 1e-30  # a float32
CLIPPED = 1e-6  # is added to a norm before it divides, as torch.nn.utils.clip_grad_norm_ does


@dataclass(frozen=True, eq=False)
class Personal:
    """A device's personal parameters v, which never leave it, and the weight α that they have in its model.

    Attributes:
        params: v, in the shapes of the device.
        alpha: α in [0, 1], float64: 0-d, or (L,) with one α a layer (`tapfl.adapters.lora.modules_of`).
    """

    params: Params
    alpha: Tensor

    @property
    def mean_alpha(self) -> float:
        """The mean of α over the layers."""
        return float(self.alpha.mean())


def wholly(params: Params) -> Personal:
    """Returns the personal parameters of a device that uses them alone, α = 1."""
    return Personal(params, torch.ones((), dtype=torch.float64))


@dataclass(frozen=True)
class LocalResult:
    """A round on one device: what is uploaded (None: nothing), what stays, and the mean loss over the steps."""

    upload: Params | None
    personal: Personal | None
    loss: float


class Method(Protocol, Generic[S]):
    """A method: three pure steps around its own state `S`, and the model that the device then uses.

    The defaults are those of a method with personal parameters v beside the shared w.

    Attributes:
        evaluates_after_training: the device uses the result of training on the w just received, so its accuracy is
            measured after the training of a round; otherwise before.
        has_local_state: the device keeps parameters from round to round.
        shares_adapters: the device uploads w.
        trains_on: `train`, the device's own training images, or `pooled`, those of all devices of a simulation.
        together: whether `init`, `step` and `final` do with a stack of devices what they do with each by itself. Its
            objective returns K losses, and its α is (K, 1) (`tapfl.adapters.stack`).
        steady: whether all steps of a round after its first do the same to the same tensors, whatever their values, so
            that a step can be recorded.
    """

    evaluates_after_training: ClassVar[bool] = False
    has_local_state: ClassVar[bool] = True
    shares_adapters: ClassVar[bool] = True
    trains_on: ClassVar[str] = "train"
    together: ClassVar[bool] = False
    steady: ClassVar[bool] = False

    @property
    def models_per_step(self) -> int:
        """Number of models that one step trains."""
        return 2 if self.shares_adapters and self.has_local_state else 1

    def init(self, received: Params, personal: Personal | None, train: TrainOptions, trained: Names) -> S:
        """Returns the state at the start of a round.

        Args:
            received: the device's whole w, its names always in the order of its layout.
            personal: what stayed after the device's last round; None in its first.
            train: its learning rate and its `steps` are those of this round.
            trained: the names that are trained in this round, in w and in v. All others keep their values in `received`
                and in `personal.params`, to the bit.
        """
        ...

    def step(self, state: S, objective: Objective, batch: object) -> Tensor:
        """Advances the state by one batch; returns the loss of the model that the device would use."""
        ...

    def final(self, state: S) -> tuple[Params | None, Personal | None]:
        """Returns what is uploaded and what stays."""
        ...

    def weigh(self, received: Params, personal: Personal, batches: Sequence[Losses]) -> Personal:
        """Returns `personal` with the α that suits the w just received, by the losses of some of the device's images.

        Args:
            batches: of `apfl`, images held out of all training; of `fedala`, a share of the training images.
        """
        return personal

    def inference(self, received: Params, personal: Personal | None) -> Params:
        """Returns the parameters of the model that the device uses, given what it received last: by default v."""
        return personal.params if personal else received


def local_round(
    method: Method[Any],
    objective: Objective,
    received: Params,
    personal: Personal | None,
    batches: Iterable[object],
    train: TrainOptions,
    trained: Names,
    recorder: Recorder | None = None,
) -> LocalResult:
    """Returns the result of a round on one device, a function of the arguments alone (see `Method.init`).

    Args:
        recorder: of steps, for as long as the round takes; batches are then tensors.

    Raises:
        ModelError: if training diverges: a loss is not finite, or a parameter exceeds LARGEST at the end.
    """
    state = method.init(received, personal, train, trained)
    step = step_of(method, state, objective, train, recorder)
    losses = home(torch.stack([step(batch).detach() for batch in batches]))
    return checked(method, train, *method.final(state), losses)


def step_of(
    method: Method[S], state: S, objective: Objective, train: TrainOptions, recorder: Recorder | None
) -> Callable[[Any], Tensor]:
    """Returns what advances the state by a batch, as `Method.step`: recorded, if it can be and that pays."""
    step = partial(method.step, state, objective)
    return RecordedStep(step, recorder) if recorder and method.steady and train.steps >= WORTH else step


def checked(
    method: Method[Any], train: TrainOptions, upload: Params | None, stays: Personal | None, losses: Tensor
) -> LocalResult:
    """Returns what a round gave, with the losses of its steps. Raises ModelError as `local_round`."""
    option = _rates(method, train)
    if not losses.isfinite().all():
        first = int(losses.isfinite().logical_not().nonzero()[0])
        raise diverged(option, "local training", first + 1, len(losses), f"its loss is {float(losses[first])}")
    kept = (stays.alpha, *stays.params.values()) if stays else ()
    if not (reached := largest((*(upload or {}).values(), *kept))) <= LARGEST:
        raise diverged(option, "local training", len(losses), len(losses), f"its parameters reach {reached:.3g}")
    return LocalResult(upload, stays, float(sum(losses)) / len(losses))


def _rates(method: Method[Any], train: TrainOptions) -> str:
    """Returns the learning rates of a round, as options; a schedule has scaled them."""
    now = " in this round" if train.warmup_rounds or train.schedule != "constant" else ""
    own = getattr(method, "learning_rate", 0.0)
    rates = {"train": train.learning_rate} | ({"personalize": own} if own else {})
    return ", ".join(f"{section}.learning-rate = {rate:g}{now}" for section, rate in rates.items())


@dataclass(frozen=True)
class Trainee:
    """Parameters in training, some of which may be constants of the round.

    Those that are trained lie one after the other in one vector, so that an optimiser's step, a clipped norm or a
    factor is a few calls, and not a few calls a tensor.

    Attributes:
        start: what they began as.
        params: all parameters, in the order in which they were passed.
        moving: those that are trained, as parts of `theta`; the others keep their values to the bit.
        theta: (P,); of stacked devices (K, P), see `tapfl.adapters.stack`.
        optimizer: over `theta`.
        most: L2 norm to which the gradient of a step is clipped, for each device by itself; 0: no clipping.
    """

    start: Params
    params: Params
    moving: Params
    theta: Tensor
    optimizer: torch.optim.Optimizer
    most: float = 0.0

    @classmethod
    def of(cls, start: Params, train: TrainOptions, trained: Names, learning_rate: float = 0.0) -> Trainee:
        """Returns copies of `start`, of which those named in `trained` are trained.

        Args:
            learning_rate: 0: that of `train`.
        """
        moved = {name: theta.detach() for name, theta in start.items() if name in trained}
        theta = flat(moved, LINE)
        moving = {name: part.requires_grad_() for name, part in parts_of(theta, shapes_of(moved), LINE).items()}
        params = {name: moving[name] if name in moving else fixed.detach().clone() for name, fixed in start.items()}
        # fused Adam rounds the last elements of a tensor in another way, so a single device keeps its tensors; it
        # takes no tensor that is not in one piece, as those of a stack
        whole = [theta] if theta.dim() == 2 else list(moving.values())
        rate = learning_rate or train.learning_rate
        return cls(start, params, moving, theta, optimizer(train, whole, rate, fused=True), train.clip_gradient)

    def gradients(self, loss: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of `moving` and of `others`; of stacked devices, each of its own of K losses."""
        return torch.autograd.grad(loss, [*self.moving.values(), *others], torch.ones_like(loss))

    def apply(self, gradients: Sequence[Tensor]) -> None:
        """Takes one step with these gradients of `moving`."""
        self._step(flat(dict(zip(self.moving, gradients, strict=True)), LINE))

    @torch.no_grad()
    def apply_scaled(self, gradients: Sequence[Tensor], factors: Tensor) -> None:
        """Takes one step with gradients that contain a factor in [0, 1], which shall act as the factor of the step.

        Adam divides a factor of the gradients out: its step would be the same for every factor. So the factor is taken
        out of the gradients, and the parameters go that part of the optimiser's step. With SGD this is the step as it
        would be anyway.

        Args:
            factors: one, or one for each element of `theta`.
        """
        before, factors = self.theta.clone(), factors.to(self.theta.dtype)
        # where the factor is 0 so is the gradient
        self._step(flat(dict(zip(self.moving, gradients, strict=True)), LINE) / factors.clamp(min=TINY))
        self.theta.copy_(torch.lerp(before, self.theta, factors))

    def values(self) -> Params:
        """Returns the current parameters as constants; they share memory with those in training."""
        return {name: parameter.detach() for name, parameter in self.params.items()}

    def _step(self, gradient: Tensor) -> None:
        if self.most:
            norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
            gradient *= (self.most / (norm + CLIPPED)).clamp(max=1.0)
        self.theta.grad = gradient
        for name, part in parts_of(gradient, shapes_of(self.moving), LINE).items():
            self.moving[name].grad = part
        self.optimizer.step()
