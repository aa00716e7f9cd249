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
TINY = 1e-30  # smallest divisor; representable in float32
CLIPPED = 1e-6  # added to a norm before dividing by it, as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, eq=False)
class Personal:
    """A device's private model v, which never leaves it, and its weight α in the device's personal model.

    Attributes:
        params: v, in the shapes of the device.
        alpha: α in [0, 1], float64: 0-d, or (L,) with one α per layer (`tapfl.adapters.lora.modules_of`).
    """

    params: Params
    alpha: Tensor

    @property
    def mean_alpha(self) -> float:
        """The mean of α over the layers."""
        return float(self.alpha.mean())


def wholly(params: Params) -> Personal:
    """Returns `params` as the private model of a device that uses only this model, α = 1."""
    return Personal(params, torch.ones((), dtype=torch.float64, device=next(iter(params.values())).device))


@dataclass(frozen=True)
class LocalResult:
    """The result of a round on one device.

    Attributes:
        upload: the parameters to upload; None: nothing is uploaded.
        personal: what the device keeps.
        loss: mean over the steps.
    """

    upload: Params | None
    personal: Personal | None
    loss: float


class Method(Protocol, Generic[S]):
    """A personalisation method: `init`, `step` and `final` of a round with a state `S`, and the model used afterwards.

    The defaults are those of a method with a private model v in addition to the shared w.

    Attributes:
        evaluates_after_training: whether the device uses the result of training the w just received. Its accuracy is
            then measured after the training of a round, otherwise before.
        has_local_state: whether the device keeps parameters from round to round.
        shares_adapters: whether the device uploads w.
        trains_on: `train`, the device's own training images, or `pooled`, those of all devices of a simulation.
        together: whether `init`, `step` and `final` work on a stack of devices (`tapfl.adapters.stack`) and give the
            same results as for each device alone. The objective of a stack returns K losses, and its α is (K, 1).
        steady: whether all steps of a round after the first apply the same operations to the same tensors, whatever
            their values, so that a step can be recorded.
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
            received: the device's whole w, with its names in the order of its layout.
            personal: what the device kept after its last round; None in its first.
            train: training options, with the learning rate and the `steps` of this round.
            trained: names of the tensors that are trained in this round, in w and in v. All others keep their values in
                `received` and `personal.params` to the bit.
        """
        ...

    def step(self, state: S, objective: Objective, batch: object) -> Tensor:
        """Takes one training step on a batch. Returns the loss of the model that the device uses."""
        ...

    def final(self, state: S) -> tuple[Params | None, Personal | None]:
        """Returns (what is uploaded, what the device keeps)."""
        ...

    def weigh(self, received: Params, personal: Personal, batches: Sequence[Losses]) -> Personal:
        """Returns `personal` with α chosen for the w just received, by the losses on some of the device's images.

        Args:
            batches: for `apfl`, images held out from all training; for `fedala`, a fraction of the training images.
        """
        return personal

    def inference(self, received: Params, personal: Personal | None) -> Params:
        """Returns the parameters of the model that the device uses, given what it received last; by default, v."""
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
    """Returns the result of a round on one device. It depends only on the arguments (see `Method.init`).

    Args:
        recorder: records steps during this round; None: steps are not recorded.

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
    """Returns a function that takes one step on a batch, as `Method.step`, recorded if possible and worthwhile."""
    step = partial(method.step, state, objective)
    return RecordedStep(step, recorder) if recorder and method.steady and train.steps >= WORTH else step


def checked(
    method: Method[Any], train: TrainOptions, upload: Params | None, personal: Personal | None, losses: Tensor
) -> LocalResult:
    """Returns the result of a round, given the losses of its steps. Raises ModelError as `local_round` does."""
    option = _rates(method, train)
    if not losses.isfinite().all():
        first = int(losses.isfinite().logical_not().nonzero()[0])
        raise diverged(option, "local training", first + 1, len(losses), f"its loss is {float(losses[first])}")
    kept = (personal.alpha, *personal.params.values()) if personal else ()
    if not (reached := largest((*(upload or {}).values(), *kept))) <= LARGEST:
        raise diverged(option, "local training", len(losses), len(losses), f"its parameters reach {reached:.3g}")
    return LocalResult(upload, personal, float(sum(losses)) / len(losses))


def _rates(method: Method[Any], train: TrainOptions) -> str:
    """Returns the learning rates of a round, already scaled by the schedule, as text for an error message."""
    now = " in this round" if train.warmup_rounds or train.schedule != "constant" else ""
    own = getattr(method, "learning_rate", 0.0)
    rates = {"train": train.learning_rate} | ({"personalize": own} if own else {})
    return ", ".join(f"{section}.learning-rate = {rate:g}{now}" for section, rate in rates.items())


@dataclass(frozen=True)
class Trainee:
    """Parameters in training, some of which may be constant in this round.

    The trained parameters are stored in one vector. An optimiser step, a clipped norm or a scaling then takes a few
    calls in all, instead of a few calls per tensor.

    Attributes:
        start: initial values.
        params: all parameters, in the order in which they were passed.
        moving: the trained parameters, as views of `theta`. The others keep their values to the bit.
        theta: all trained parameters (P,); for stacked devices (K, P), see `tapfl.adapters.stack`.
        optimizer: of `theta`.
        most: L2 norm to which the gradient of a step is clipped, separately for each device; 0: no clipping.
    """

    start: Params
    params: Params
    moving: Params
    theta: Tensor
    optimizer: torch.optim.Optimizer
    most: float = 0.0

    @classmethod
    def of(cls, start: Params, train: TrainOptions, trained: Names, learning_rate: float = 0.0) -> Trainee:
        """Returns copies of `start`, ready to train those named in `trained`.

        Args:
            learning_rate: 0 means that of `train`.
        """
        moved = {name: theta.detach() for name, theta in start.items() if name in trained}
        theta = flat(moved, LINE)
        moving = {name: part.requires_grad_() for name, part in parts_of(theta, shapes_of(moved), LINE).items()}
        params = {name: moving[name] if name in moving else fixed.detach().clone() for name, fixed in start.items()}
        # fused Adam rounds the last elements of a tensor differently, so a single device passes its separate tensors;
        # those of a stack are not contiguous, which fused Adam does not accept
        whole = [theta] if theta.dim() == 2 else list(moving.values())
        rate = learning_rate or train.learning_rate
        return cls(start, params, moving, theta, optimizer(train, whole, rate, fused=True), train.clip_gradient)

    def gradients(self, loss: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of `moving` and `others`; with stacked devices, each device's of its own loss."""
        return torch.autograd.grad(loss, [*self.moving.values(), *others], torch.ones_like(loss))

    def apply(self, gradients: Sequence[Tensor]) -> None:
        """Takes one step with these gradients of `moving`."""
        self._step(flat(dict(zip(self.moving, gradients, strict=True)), LINE))

    @torch.no_grad()
    def apply_scaled(self, gradients: Sequence[Tensor], factors: Tensor) -> None:
        """Takes one step with gradients that contain a factor in [0, 1], and scales the step by this factor.

        Adam normalises its gradients, so its step would be the same for every factor. The factor is therefore divided
        out of the gradients, and the optimiser's step is multiplied by it. With SGD this does not change the step.

        Args:
            factors: one number, or one for each element of `theta`.
        """
        before, factors = self.theta.clone(), factors.to(self.theta.dtype)
        # where the factor is 0, the gradient is 0 as well
        self._step(flat(dict(zip(self.moving, gradients, strict=True)), LINE) / factors.clamp(min=TINY))
        self.theta.copy_(torch.lerp(before, self.theta, factors))

    def values(self) -> Params:
        """Returns the current parameters, detached; they share memory with those in training."""
        return {name: parameter.detach() for name, parameter in self.params.items()}

    def _step(self, gradient: Tensor) -> None:
        if self.most:
            norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
            gradient *= (self.most / (norm + CLIPPED)).clamp(max=1.0)
        self.theta.grad = gradient
        for name, part in parts_of(gradient, shapes_of(self.moving), LINE).items():
            self.moving[name].grad = part
        self.optimizer.step()
