"""Surgery: a plan applied to a backbone gives a smaller plain timm model, which can be saved and loaded alone."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from tapfl.errors import PlanError
from tapfl.models.backbone import build
from tapfl.models.units import prunable_layers, put
from tapfl.pruning.plan import PruningPlan
from tapfl.store import read_tensors, write_json, write_tensors

PLAN_FILE, WEIGHTS_FILE = "plan.json", "model.safetensors"


def shrink(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Returns a smaller copy of `model`, equal (fp32, 1e-5) to it with the dropped units masked to 0.

    Raises:
        PlanError: if the plan was made for a model of other layers or sizes.
    """
    layers = prunable_layers(model)
    if [(layer.name, layer.units) for layer in layers] != [(layer.name, layer.units) for layer in plan.layers]:
        raise PlanError(f"plan for {plan.backbone.name}: does not fit this model, whose layers differ in name or size")
    small = copy.deepcopy(model)
    for layer, part in zip(layers, plan.layers, strict=True):
        put(small, layer.name, layer.shrink(small.get_submodule(layer.name), part.index()))
    return small.eval()


def save_pruned(model: nn.Module, plan: PruningPlan, folder: Path | str) -> None:
    """Writes `plan.json` (with the checksum of the weights) and `model.safetensors` to `folder`."""
    folder = Path(folder)
    write_tensors(folder / WEIGHTS_FILE, model.state_dict())
    checksum = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    write_json(folder / PLAN_FILE, json.loads(plan.model_dump_json()) | {"sha256": checksum})


def load_plan(folder: Path | str) -> tuple[PruningPlan, str]:
    """Returns the plan in `folder` and the checksum of its weights. Raises PlanError if it is missing or damaged."""
    file = Path(folder) / PLAN_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        checksum = content.pop("sha256")
    except OSError as error:
        raise PlanError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise PlanError(f"{file}: is not a plan ({error!r})") from None
    return PruningPlan.from_json(json.dumps(content)), str(checksum)


def load_pruned(folder: Path | str) -> nn.Module:
    """Returns the pruned model of `folder`, rebuilt from the plan; neither dense weights nor pickle are needed.

    Raises:
        PlanError: if a file is missing, damaged, or not the one that belongs to the plan.
    """
    folder = Path(folder)
    plan, checksum = load_plan(folder)
    weights = folder / WEIGHTS_FILE
    state = read_tensors(weights)
    if hashlib.sha256(weights.read_bytes()).hexdigest() != checksum:
        raise PlanError(f"{weights}: is not the file that {PLAN_FILE} was written with (checksum differs)")
    model = shrink(build(plan.backbone), plan)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise PlanError(f"{weights}: does not fit its plan ({str(error).splitlines()[-1].strip()})") from None
    return model.requires_grad_(False)


def kept_units(plan: PruningPlan) -> dict[str, torch.Tensor]:
    """Returns the kept units (int64) of every layer of a plan, by name."""
    return {layer.name: layer.index() for layer in plan.layers}
