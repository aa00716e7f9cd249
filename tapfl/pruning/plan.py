"""The pruning plan: which units of which layers stay. It is all that the server has to send."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from tapfl.config import Scalar
from tapfl.errors import PlanError
from tapfl.models.backbone import BackboneSpec
from tapfl.models.cost import Cost


class LayerPlan(BaseModel):
    """One prunable layer: the sorted positions of the units that stay, of `units` in all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["attention", "ffn"]
    units: int
    kept: tuple[int, ...]
    importance: float | None = None

    def index(self) -> Tensor:
        """Returns `kept` as int64."""
        return torch.tensor(self.kept, dtype=torch.int64)


class PruningPlan(BaseModel):
    """What stays of a backbone, what that costs, and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: BackboneSpec
    layers: tuple[LayerPlan, ...]
    dense: Cost
    cost: Cost
    provenance: dict[str, Scalar] = {}

    @classmethod
    def from_json(cls, text: str | bytes) -> PruningPlan:
        """Raises PlanError, naming the first field that is off."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "plan"
            raise PlanError(f"plan: {where}: {first['msg']}") from None

    def layer(self, name: str) -> LayerPlan:
        """Returns the plan of one layer. Raises PlanError if it has none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise PlanError(f"plan: says nothing of {name}")

    @property
    def widths(self) -> dict[str, int]:
        return {layer.name: len(layer.kept) for layer in self.layers}
