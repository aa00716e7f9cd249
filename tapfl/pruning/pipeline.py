"""From a pruning problem to a smaller model: select, cut and compensate, recover; each part as the options say.

```
model ─ canonical basis ─► task ─ criterion ─► selection ─ compensation ─► smaller model ─ recovery ─► smaller model
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tapfl.config import PruningOptions
from tapfl.data.sources import ImageSet
from tapfl.data.transform import Transform
from tapfl.models.backbone import BackboneSpec
from tapfl.options import Scalar
from tapfl.progress import track
from tapfl.pruning.compensation import compensated
from tapfl.pruning.criteria.registry import criterion_of
from tapfl.pruning.criteria.task import PruningTask, Selection
from tapfl.pruning.lost_output import Felt, Known
from tapfl.pruning.plan import PruningPlan
from tapfl.pruning.planning import plan_of
from tapfl.pruning.recovery import fading_branches, recover, steps_left
from tapfl.pruning.sensitivity import sensitivities
from tapfl.seeds import numpy_generator, torch_generator
from tapfl.store import pack_tensors
from tapfl.training import predict

CHANGES = ("basis", "compensation", "recovery")  # what changes weights, unless it is `none`


@dataclass(frozen=True)
class FineTuneSet:
    """The public images of recovery.

    Attributes:
        inputs: positions -> images in the backbone's input format, so that not all need be in memory as floats.
        size: how many there are.
        labels: int64 (size,), or None: the dense model's predictions then.
    """

    inputs: Callable[[np.ndarray], Tensor]
    size: int
    labels: Tensor | None


@dataclass(frozen=True)
class Pruned:
    """A smaller model and its plan.

    Attributes:
        exact: whether `shrink` makes the same model of the dense weights and the plan alone, because no weight was
            changed: neither by the basis, nor by the criterion, compensation or recovery.
        metric_set: positions in the public pool, int64, of the images that it was measured on, where they are known.
    """

    model: nn.Module
    plan: PruningPlan
    exact: bool
    metric_set: np.ndarray | None = None

    def weights(self, always: bool = False) -> bytes:
        """Returns what travels with the plan: nothing where it is exact, else the model's weights as safetensors.

        Args:
            always: the weights in any case, for a device that is not to cut a backbone of its own.

        `tapfl.pruning.surgery.rebuild` makes the model of both.
        """
        return b"" if self.exact and not always else pack_tensors(self.model.state_dict())


def labels_of(images: ImageSet, options: PruningOptions) -> Tensor | None:
    """Returns the labels that the options allow to use, int64 (n,); None stands for the dense model's predictions."""
    return torch.from_numpy(images.labels) if options.labels == "public" else None


def fine_tune_set(pick: Callable[[int], ImageSet], transform: Transform, options: PruningOptions) -> FineTuneSet | None:
    """Returns `recovery-size` images; None where recovery is to use the metric set, or there is none.

    Args:
        pick: how many -> so many public images that look like the task; called only if they are needed.
    """
    if options.recovery == "none" or not options.recovery_size:
        return None
    chosen = pick(options.recovery_size)
    return FineTuneSet(lambda index: transform(chosen.images[index]), len(chosen), labels_of(chosen, options))


def select(task: PruningTask) -> Selection:
    """Returns the choice of the criterion that the task's options name."""
    return criterion_of(task.options.criterion)(task)


def cut(task: PruningTask, selection: Selection, seed: int, felt: Felt = None, known: Known = None) -> nn.Module:
    """Returns the smaller model of a selection, compensated as the task's options say.

    Args:
        felt: the `row_sensitivities` of the weights that are cut, where they are known.
        known: their `unit_moments`, likewise.
    """
    weights, how = selection.model or task.model, task.options.compensation
    felt = felt or row_sensitivities(task, weights, seed)
    return compensated(weights, selection.kept, task.layers, task.inputs, task.batch, how, felt, known)


def row_sensitivities(task: PruningTask, weights: nn.Module, seed: int) -> Felt:
    """Returns how much the prediction of a model feels each row, where the task's compensation asks for that."""
    if task.options.compensation == "none" or task.options.compensation_rows != "sensitivity":
        return None
    return sensitivities(weights, task.layers, task.inputs, task.batch, torch_generator(seed, "sensitivity"))


def recovered(
    task: PruningTask, selection: Selection, small: nn.Module, fine_tune: FineTuneSet | None, seed: int
) -> nn.Module:
    """Returns the smaller model after the recovery that the task's options ask for.

    Without a fine-tune set of its own, recovery is on the metric set.
    """
    steps = steps_left(task.options, selection)
    if task.options.recovery == "none" or not steps:
        return small
    images = fine_tune or FineTuneSet(lambda index: task.inputs[torch.from_numpy(index)], len(task.inputs), task.labels)
    return recover(
        small,
        images.inputs,
        _labels(task, images),
        task.options,
        numpy_generator(seed, "recovery"),
        steps=steps,
        teacher=task.model,
        fading=fading_branches(task.model, selection),
    )


def prune_model(
    task: PruningTask,
    spec: BackboneSpec,
    fine_tune: FineTuneSet | None = None,
    provenance: Mapping[str, Scalar] | None = None,
    seed: int = 0,
) -> Pruned:
    """Returns the smaller model and its plan: all of the above.

    Raises:
        BudgetError: if the budget cannot be met.
    """
    return prune_to(task, select(task), spec, fine_tune, provenance, seed)


def prune_to(
    task: PruningTask,
    selection: Selection,
    spec: BackboneSpec,
    fine_tune: FineTuneSet | None = None,
    provenance: Mapping[str, Scalar] | None = None,
    seed: int = 0,
) -> Pruned:
    """Returns the smaller model of a selection and its plan: what comes after the criterion."""
    small = recovered(task, selection, cut(task, selection, seed), fine_tune, seed)
    parts = {name: getattr(task.options, name) for name in ("criterion", "ratio", *CHANGES)}
    plan = plan_of(task, selection, spec, {**parts, "seed": seed, **(provenance or {})})
    changed = selection.model is not None or any(parts[name] != "none" for name in CHANGES)
    return Pruned(small, plan, exact=not changed)


def _labels(task: PruningTask, images: FineTuneSet) -> Tensor:
    if images.labels is not None:
        return images.labels
    parts = np.array_split(np.arange(images.size), -(-images.size // task.batch))
    return torch.cat([predict(task.model, images.inputs(part)).argmax(1) for part in track(parts, "labels")])
