"""Records the steps of a round, and replays a step as one call instead of one call per operation.

A recorded step works on the same tensors as when it was recorded. So the images of a step are copied into the tensors
of the recording, and a method's state is changed in place (`Method.steady`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tapfl.compute import Recorder
from tapfl.training import tensors_in

WARM = 2  # steps of a shape before it is recorded; the first step of a round creates state such as the optimiser's
WORTH = 20  # smallest number of steps in a round for which recording pays; an estimate, not measured on a GPU

Step = Callable[[Any], Tensor]


class RecordedStep:
    """A step on a batch. Each batch shape is recorded after it has occurred `WARM` times.

    A round has at most two shapes, whose sizes differ by one (`tapfl.training.batches`), or a few if devices step
    together. A shape that rarely occurs is never recorded.

    Args:
        step: takes tensors; from its second call on, it applies the same operations to the same tensors.
    """

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._seen: Counter[object] = Counter()
        self._recorded: dict[object, tuple[Any, Callable[[], Tensor]]] = {}

    def __call__(self, batch: Any) -> Tensor:
        """Returns the loss of the step, detached."""
        tensors = tensors_in(batch)
        shape = tuple(tensor.shape for tensor in tensors)
        if shape not in self._recorded:
            self._seen[shape] += 1
            if self._seen[shape] <= WARM:
                return self._recorder.aside(lambda: self._step(batch).detach())
            recorded = tree_map_only(Tensor, torch.clone, batch)
            self._recorded[shape] = recorded, self._recorder.record(lambda: self._step(recorded).detach())
        recorded, replay = self._recorded[shape]
        for old, new in zip(tensors_in(recorded), tensors, strict=True):
            old.copy_(new)
        return replay().clone()
