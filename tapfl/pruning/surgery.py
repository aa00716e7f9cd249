"""Surgery: cuts a backbone by a plan into a smaller plain timm model, and saves and loads such models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor, nn

from tapfl.errors import ModelError, PlanError, TapflError, message_of
from tapfl.models.backbone import BackboneSpec, outline
from tapfl.models.merging import merging
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer, put
from tapfl.pruning.basis import carried_energy
from tapfl.pruning.plan import PLAN_FILE, PruningPlan, load_plan, read_plan, signed
from tapfl.store import read_tensors, sha256_of, unpack_tensors, whole_folder, write_json, write_tensors

WEIGHTS_FILE = "model.safetensors"


def shrink(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Returns a smaller copy of `model` whose outputs equal (fp32, 1e-5) those of `model` with dropped units set to 0.

    It merges tokens if the plan does.

    Raises:
        PlanError: if the plan was made for a model with other layers or sizes. It names the first that differs.
    """
    return _cut(model, prunable_layers(model), plan)


def _cut(model: nn.Module, layers: Sequence[PrunableLayer], plan: PruningPlan) -> nn.Module:
    """Returns `shrink(model, plan)`; `layers` are the prunable layers of the model."""
    actual = {layer.name: f"{layer.kind} of {layer.units} units" for layer in layers}
    expected = {layer.name: f"{layer.kind} of {layer.units} units" for layer in plan.layers}
    if list(actual.items()) != list(expected.items()):
        names = (name for name in [*expected, *actual] if actual.get(name) != expected.get(name))
        name = next(names, "the order of layers")
        raise PlanError(
            f"plan for {plan.backbone.name}: does not fit this model ({name}: expected "
            f"{expected.get(name, 'none')}, found {actual.get(name, 'none')})"
        )
    branches = [model.get_submodule(layer.name) for layer in layers]
    small = copy.deepcopy(model, {id(branch): branch for branch in branches})  # most weights, and all are replaced
    for layer, branch, part in zip(layers, branches, plan.layers, strict=True):
        put(small, layer.name, layer.shrink(branch, part.index()))
    try:
        return merging(small, plan.tokens).eval()
    except ModelError as error:
        raise PlanError(f"plan for {plan.backbone.name}: does not fit this model ({error})") from None


def apply_plan(plan: PruningPlan | Path | str, model: nn.Module) -> nn.Module:
    """Returns `model` cut by a plan.

    A plan holds only positions of units. Weights that were changed after cutting are not carried over (see
    `provenance["compensation"]`).

    Args:
        plan: the plan, the folder of a pruned model, or a file that holds a plan.

    Raises:
        PlanError: if it does not fit the model, or was made in the canonical basis and the model is not in it.
    """
    plan = plan if isinstance(plan, PruningPlan) else read_plan(plan)
    if plan.provenance.get("basis") == "canonical" and carried_energy(model) is None:
        raise PlanError(
            f"plan for {plan.backbone.name}: was made in the canonical basis of the heads, and these weights are not "
            "in it; prune them again, or load the pruned model itself"
        )
    return shrink(model, plan)


def save_pruned(model: nn.Module, plan: PruningPlan, folder: Path | str, replace: bool = False) -> None:
    """Writes `plan.json` and `model.safetensors` to a new `folder`: both completely, or neither.

    Args:
        replace: replace a pruned model that is in the folder. If the process is killed meanwhile, the folder may be
            missing, but it never mixes the old and the new model.

    Raises:
        PlanError: if the folder exists (with `replace`: if it holds anything but a pruned model), if it cannot be
            written, or if the model does not match the plan or is not finite.
    """
    folder, state = Path(folder), model.state_dict()
    _check_state(state, _skeleton(plan, len(state)).state_dict(), "model to be saved")
    try:
        existing = {file.name for file in folder.iterdir()} if folder.exists() else set()
        if existing and not (replace and existing <= {PLAN_FILE, WEIGHTS_FILE}):
            accepted = "a new folder, or that of a pruned model alone" if replace else "a folder that does not"
            raise PlanError(f"{folder}: exists already, with {min(existing)} in it; give {accepted}")
        with whole_folder(folder, replace) as new:
            about = {"plan": plan.checksum}  # one key: safetensors writes several in no fixed order
            write_tensors(new / WEIGHTS_FILE, state, about)
            write_json(new / PLAN_FILE, signed(plan, sha256_of(new / WEIGHTS_FILE)))
    except OSError as error:
        raise PlanError(f"{folder}: cannot be written ({error.strerror})") from None


def load_pruned(folder: Path | str, dense: nn.Module | None = None) -> nn.Module:
    """Returns the pruned model of `folder`, rebuilt from its plan and weights, without dense weights and pickle.

    Args:
        dense: a model of the plan's backbone with any weights, if one exists. Cutting it is faster than building one.

    Raises:
        PlanError: if a file is missing, damaged, edited, or does not belong to the plan.
    """
    folder = Path(folder)
    plan, checksum = load_plan(folder)
    weights = folder / WEIGHTS_FILE
    state = read_tensors(weights)
    if sha256_of(weights) != checksum:
        raise PlanError(f"{weights}: is not the file that {PLAN_FILE} was written with (checksum differs)")
    try:
        model = _skeleton(plan, len(state)) if dense is None else shrink(dense, plan)
    except (ModelError, PlanError) as error:
        raise PlanError(f"{folder / PLAN_FILE}: {error}") from None
    return _filled(model, state, f"{weights}: does not fit its plan")


def rebuild(plan: PruningPlan, weights: bytes) -> nn.Module:
    """Returns the pruned model from a plan and its weights, the content of a safetensors file.

    Raises:
        PlanError: if the weights are damaged, not finite, or not those of the plan's model. It names the first tensor.
    """
    source = f"weights for {plan.backbone.name}"
    state = unpack_tensors(weights, source)
    return _filled(_skeleton(plan, len(state)), state, f"{source}: do not fit their plan")


def smaller_model(plan: PruningPlan, weights: bytes, dense: Callable[[], nn.Module]) -> nn.Module:
    """Returns the pruned model from a message: rebuilt from its weights, or if it has none, `dense` cut by the plan.

    Raises:
        PlanError: as for `rebuild` and `shrink`.
    """
    return rebuild(plan, weights) if weights else shrink(dense(), plan)


def require_fitting(plan: PruningPlan) -> None:
    """Raises TapflError if the plan's backbone does not exist or has other layers. No weights are allocated."""
    _skeleton(plan, 64 * len(plan.layers))


def _skeleton(plan: PruningPlan, tensors: int) -> nn.Module:
    """Returns the pruned model on torch's meta device, which allocates no memory for its weights.

    Args:
        tensors: number of weight tensors of the pruned model; the dense model can have a few more in each layer.
    """
    spec = plan.backbone
    try:
        return _cut(*_outline(spec.model_dump_json(), 2 * tensors + 8 * len(plan.layers) + 64), plan)
    except TapflError:
        raise
    except Exception as error:  # spec.args may describe layers that no supported family has
        raise PlanError(f"{spec.name} cannot be cut by the plan, with {spec.args} ({message_of(error)})") from None


@lru_cache(maxsize=8)  # all plans of a run share one backbone, and building its outline takes longer than cutting it
def _outline(spec_as_json: str, tensors: int) -> tuple[nn.Module, list[PrunableLayer]]:
    model = outline(BackboneSpec.from_json(spec_as_json), tensors)
    return model, prunable_layers(model)


def _filled(skeleton: nn.Module, state: Mapping[str, Tensor], what: str) -> nn.Module:
    """Returns the skeleton filled with weights. Raises PlanError, beginning with `what`, if they do not fit."""
    _check_state(state, skeleton.state_dict(), what)
    model = skeleton.to_empty(device="cpu")
    for module in model.modules():
        fill_buffers = getattr(module, "init_non_persistent_buffers", None)  # timm's buffers that no file holds
        if callable(fill_buffers):
            fill_buffers()
    model.load_state_dict(state)
    return model.requires_grad_(False)


def _check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raises PlanError, beginning with `what`, if a tensor is missing, not finite, or of a wrong shape or type."""
    for name in [*expected, *state]:
        want, got = (list(tensors[name].shape) if name in tensors else "none" for tensors in (expected, state))
        if want != got:
            raise PlanError(f"{what} ({name}: expected {want}, found {got})")
        tensor, like = state[name], expected[name]
        if tensor.dtype != like.dtype and not (tensor.is_floating_point() and like.is_floating_point()):
            raise PlanError(f"{what} ({name}: expected {like.dtype}, found {tensor.dtype})")
        if not bool(tensor.isfinite().all()):
            raise PlanError(f"{what} ({name}: holds values that are not finite)")
