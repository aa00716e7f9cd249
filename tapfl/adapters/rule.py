"""The interface of an aggregation rule, and what it is given to make one value of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tapfl.adapters.layout import Part, Side, Update, positions, scatter_mean
from tapfl.training import Params

Combine = Callable[[Tensor, Sequence[Part]], Tensor]  # (previous θ, parts) -> θ, as `scatter_mean`
Step = Callable[[str, Tensor, Tensor, Tensor], Tensor]  # (name, previous θ, combined θ, held, bool) -> θ


@dataclass(frozen=True)
class Combination:
    """How the parts of a tensor become its next value: combined over holders, then a step of the server's optimiser.

    Without `step` the combined value is the next one.
    """

    combine: Combine = scatter_mean
    step: Step | None = None

    def __call__(self, name: str, previous: Tensor, parts: Sequence[Part]) -> Tensor:
        combined = self.combine(previous, parts)
        if self.step is None:
            return combined
        held = torch.zeros(previous.shape, dtype=torch.bool)
        for _, placement, _ in parts:
            held.view(-1)[positions(placement, previous.shape)] = True
        return self.step(name, previous, combined, held)


PLAIN = Combination()


class Aggregate(Protocol):
    """(global adapters, updates in order of partition ids, fresh adapters, combination) -> global adapters."""

    def __call__(
        self, previous: Params, updates: Sequence[Update], fresh: Params, combination: Combination = PLAIN
    ) -> Params: ...


@dataclass(frozen=True)
class Rule:
    """Which factors of a linear a rule sends, moves and averages, by their side. Heads are not a rule's affair.

    Attributes:
        aggregate: the server's part.
        random: the factor that starts random: A, as in LoRA, or the one on the embedding's side. The other is 0.
        down: sides that the server sends.
        up: round -> sides that a device uploads.
        trained: round -> sides that move on a device.
    """

    aggregate: Aggregate
    random: Literal["A", "embed"]
    down: frozenset[Side]
    up: Callable[[int], frozenset[Side]]
    trained: Callable[[int], frozenset[Side]]


EMBED: frozenset[Side] = frozenset({"embed"})
WIDTH: frozenset[Side] = frozenset({"width"})
BOTH = EMBED | WIDTH
