"""Steps of a round that are recorded and made again as one call, instead of a call for each of their operations.

A recorded step works on the tensors that it worked on when it was recorded. So the images of a step are copied into
those of the recording, and a method's state is changed in place (`Method.steady`).
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

WARM = 2  # steps of a shape before it is recorded: the first makes what a round keeps, such as an optimiser's state
WORTH = 20  # steps of a round from which a recording pays; an estimate, no GPU has measured it

Step = Callable[[Any], Tensor]


class RecordedStep:
    """A step on a batch, recorded for each shape of a batch once the shape has come `WARM` times.

    A round has at most two shapes, whose sizes differ by one (`tapfl.training.batches`), or a few where devices step
    together. A shape that comes seldom is never recorded.

    Args:
        step: takes tensors, and changes the same tensors in the same way each time from its second call on.
    """

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._seen: Counter[object] = Counter()
        self._recorded: dict[object, tuple[Any, Callable[[], Tensor]]] = {}

    def __call__(self, batch: Any) -> Tensor:
        """Returns the loss, as the step itself does; detached."""
        given = tensors_in(batch)
        shape = tuple(each.shape for each in given)
        if shape not in self._recorded:
            self._seen[shape] += 1
            if self._seen[shape] <= WARM:
                return self._recorder.aside(lambda: self._step(batch).detach())
            own = tree_map_only(Tensor, torch.clone, batch)
            self._recorded[shape] = own, self._recorder.record(lambda: self._step(own).detach())
        own, again = self._recorded[shape]
        for mine, new in zip(tensors_in(own), given, strict=True):
            mine.copy_(new)
        return again().clone()
