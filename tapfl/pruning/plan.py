"""The pruning plan: which units of which layers stay. If no weights changed, the server sends a device only this."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from torch import Tensor

from tapfl.errors import PlanError
from tapfl.models.backbone import LARGEST_ARGUMENT, BackboneSpec
from tapfl.models.cost import Cost
from tapfl.options import Scalar

PLAN_FILE = "plan.json"


class LayerPlan(BaseModel):
    """One prunable layer: the sorted positions of the units that stay, of `units` in all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(max_length=200, pattern=r"^[\w.]+$")  # a module's path
    kind: Literal["attention", "ffn"]
    units: int
    kept: tuple[int, ...]
    importance: float | None = None

    def index(self) -> Tensor:
        """Returns `kept` as int64."""
        return torch.tensor(self.kept, dtype=torch.int64)


class PruningPlan(BaseModel):
    """The kept units of a backbone, its cost before and after, and the provenance.

    Attributes:
        tokens: number of tokens that each block merges (`tapfl.models.merging`). It is empty, and not written to JSON,
            if no block merges any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: BackboneSpec
    layers: tuple[LayerPlan, ...]
    dense: Cost
    cost: Cost
    tokens: tuple[Annotated[int, Field(ge=0, le=LARGEST_ARGUMENT)], ...] = Field((), max_length=LARGEST_ARGUMENT)
    provenance: dict[str, Scalar] = {}

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "plan") -> PruningPlan:
        """Returns the plan of a file or a message. Raises PlanError, naming `source` and the first wrong field."""
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))[:100] or "plan"
            where = where if where.isprintable() else repr(where)
            raise PlanError(f"{source}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
        if wrong := next(plan._faults(), None):
            raise PlanError(f"{source}: {wrong}")
        return plan

    @model_serializer(mode="wrap")
    def _without_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = write(self)
        return content if self.tokens else {key: value for key, value in content.items() if key != "tokens"}

    def content(self) -> dict[str, Any]:
        """Returns the plan as a dict of JSON values."""
        content: dict[str, Any] = json.loads(self.model_dump_json())
        return content

    @property
    def checksum(self) -> str:
        """64 hex digits that identify the plan by its content."""
        return checksum_of(self.content())

    def layer(self, name: str) -> LayerPlan:
        """Returns the plan of one layer. Raises PlanError if there is none."""
        if layer := next((layer for layer in self.layers if layer.name == name), None):
            return layer
        raise PlanError(f"plan: has no layer {name}")

    def _faults(self) -> Iterator[str]:
        """Yields what is wrong with the plan, whatever its backbone."""
        if not self.backbone.name.isprintable():
            yield f"backbone.name: {self.backbone.name!r:.100} is not a model's name"
        names: set[str] = set()
        for position, layer in enumerate(self.layers):
            if layer.name in names:
                yield f"layers.{position}: {layer.name} occurs twice"
            names.add(layer.name)
            rising = all(a < b for a, b in zip(layer.kept, layer.kept[1:], strict=False))
            if layer.kept and not (rising and layer.kept[0] >= 0 and layer.kept[-1] < layer.units):
                accepted = f"must be sorted, unique and lie in 0..{layer.units - 1}"
                yield f"layers.{position}.kept: kept units of {layer.name} {accepted}"


def checksum_of(content: Mapping[str, Any]) -> str:
    """Returns a checksum of JSON content (64 hex digits) that does not depend on the order of keys or on whitespace."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def signed(plan: PruningPlan, weights: str) -> dict[str, Any]:
    """Returns the content of `plan.json`: the plan, its checksum, and the SHA-256 of the weights saved with it."""
    return plan.content() | {"checksum": plan.checksum, "sha256": weights}


def read_plan(path: Path | str) -> PruningPlan:
    """Returns the plan from a pruned model's folder, from its `plan.json`, or from a run's `plans/NN.json`.

    Raises:
        PlanError: if it is missing or damaged, or was edited after it was written.
    """
    return load_plan(path, saved=False)[0]


def load_plan(path: Path | str, saved: bool = True) -> tuple[PruningPlan, str]:
    """Returns the plan and the SHA-256 of the weights that it was saved with, or an empty string without weights.

    Raises:
        PlanError: as for `read_plan`; with `saved`, also if it is not the signed plan of a saved model.
    """
    path = Path(path)
    file = path / PLAN_FILE if path.is_dir() or saved else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise PlanError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{file}: is not a plan ({error})") from None
    if not isinstance(content, dict):
        raise PlanError(f"{file}: is not a plan (a JSON object is expected)")
    for key in ("checksum", "sha256") if saved else ():
        if not isinstance(content.get(key), str):
            raise PlanError(f"{file}: is not the plan of a saved model (it has no {key!r})")
    own, weights = content.pop("checksum", None), content.pop("sha256", "")
    plan = PruningPlan.from_json(json.dumps(content), str(file))
    if own is not None and own != checksum_of(content):
        raise PlanError(f"{file}: was edited or damaged since it was written (its checksum differs)")
    return plan, str(weights)


def require_device(plan: PruningPlan, device: int, subject: str) -> None:
    """Raises PlanError, with a message that begins with `subject`, if the plan belongs to another device."""
    if (own := plan.provenance.get("device", device)) != device:
        raise PlanError(f"{subject} of device {own}, not of {device}")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")
