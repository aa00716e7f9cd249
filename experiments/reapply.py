"""A plan that was made before, applied to other weights of the same backbone; no metric set is needed."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from experiments.inspection import pruned_folder
from tapfl.config import ModelOptions
from tapfl.errors import ConfigError, ModelError
from tapfl.models.backbone import BackboneSpec, build, spec_of
from tapfl.models.weights import load_hub_weights, load_weights
from tapfl.pruning.plan import read_plan
from tapfl.pruning.surgery import apply_plan, save_pruned
from tapfl.store import content_hash

REFITTED = ("compensation", "recovery")  # provenance of weights that a plan does not carry


def reapply(source: Path, options: ModelOptions, names_backbone: bool, out: Path) -> list[str]:
    """Cuts the weights that `options` name as the plan in `source` says, and saves them to `out`; returns warnings.

    Args:
        source: a pruned model's folder, a device's folder of a run, or a file that holds a plan.
        names_backbone: whether `options` name a backbone by intent, which then must be that of the plan.

    Raises:
        TapflError: if the weights or the plan do not fit; nothing is written then.
    """
    if out.exists():
        raise ConfigError(f"out = {str(out)!r}: exists already; give a folder that does not")
    plan = read_plan(pruned_folder(source))
    classes = tuple(map(str, range(plan.backbone.num_classes)))
    given = spec_of(options, classes)
    if names_backbone and given != plan.backbone:
        raise ConfigError(
            f"model.name = {given.name!r} with {given.args}: the plan is for {plan.backbone.name} "
            f"with {plan.backbone.args}; leave model.name and model.args out"
        )
    model = _with_weights(plan.backbone, options, classes)
    small = apply_plan(plan, model)
    warnings = [
        f"the plan's own weights were refitted ({key} = {plan.provenance[key]}), which no plan carries"
        for key in REFITTED
        if plan.provenance.get(key, "none") not in ("none", "", False)
    ]
    kept = {key: value for key, value in plan.provenance.items() if key not in REFITTED}
    provenance = kept | {"plan": plan.checksum[:16], "weights": content_hash(model.state_dict())}
    save_pruned(small, plan.model_copy(update={"provenance": provenance}), out)
    return warnings


def _with_weights(spec: BackboneSpec, options: ModelOptions, classes: tuple[str, ...]) -> nn.Module:
    """Returns the backbone with the weights that the options name, their head included: nothing is trained here."""
    if not options.weights:
        raise ConfigError("model.weights = '': --plan needs the weights it is applied to; a .safetensors file, or hub")
    if options.head_rows:
        raise ConfigError(
            f"model.head-rows = {options.head_rows!r}: a plan knows the number of classes, not their names"
        )
    model = build(spec)
    if options.weights != "hub":
        load_weights(model, Path(options.weights), classes, None, needs_head=True)
        return model
    theirs = getattr(model, "pretrained_cfg", {}).get("num_classes")
    if theirs != spec.num_classes:
        raise ModelError(f"model.weights = 'hub': their head has {theirs} classes, the plan's {spec.num_classes}")
    load_hub_weights(model, spec, classes, None)
    return model
