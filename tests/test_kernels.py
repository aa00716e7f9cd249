"""Number of kernels of a training step: on a GPU the step of a small model takes as long as launching them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.bench.adapters import Work, step_of
from tapfl.models.backbone import BackboneSpec
from tapfl.personalize.apfl import Apfl
from tapfl.personalize.methods import FedAvg

FREE = ("detach", "_unsafe_view", "_reshape_alias", "empty", "_record_function")  # these launch nothing


class Kernels(TorchDispatchMode):
    """Counts the calls that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not any(name in str(func) for name in FREE):
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def work() -> Work:
    torch.manual_seed(0)
    args = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 12}  # counts depend only on the depth
    return Work.of(BackboneSpec(name="deit_tiny_patch16_224", args=args, num_classes=10), rank=4, batch=4)


@pytest.mark.parametrize(("method", "at_most"), [(FedAvg(), 600), (Apfl(), 1260)], ids=["fedavg", "apfl"])
def test_a_step_of_deit_calls_few_kernels(method: Any, at_most: int, work: Work) -> None:
    step = step_of(work, method)
    step()  # the first one allocates the optimiser's state and changes α
    with Kernels() as kernels:
        step()
    assert kernels.calls.total() <= at_most, kernels.calls.most_common(8)
    assert kernels.calls["aten._local_scalar_dense.default"] == 0  # and waits for none
