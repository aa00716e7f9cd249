"""Every option of a run: its type, its validation and its default. Defaults are defined nowhere else.

Options come from Flower's flat run-config (``"pruning.tau": 5.82``), from a TOML file with one table per section, and
from ``--set key=value``. All of them go through `RunConfig.from_flat`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from tapfl.config.federation import (
    LINEAR_RULES,
    METHODS,
    PERSONAL_HEAD,
    REFERENCES,
    RULES,
    AdapterOptions,
    ComputeOptions,
    FaultOptions,
    LogOptions,
    PersonalizeOptions,
    PrivacyOptions,
    TrainOptions,
)
from tapfl.config.round_zero import (
    NEW_HEADS,
    PROFILE_SETS,
    DataOptions,
    DeviceOptions,
    MetricOptions,
    ModelOptions,
    PruningOptions,
    SummaryOptions,
)
from tapfl.options import Count, Scalar, Section, flatten, nested, validated

INPUT_OPTIONS = ("data.source", "data.public", "model.weights", "model.head-rows", "devices.profiles")
PATH_OPTIONS = ("out", "cache", *INPUT_OPTIONS)
PLUGIN_OPTIONS = ("pruning.criterion", "adapters.rule", "personalize.method")
BUILT_IN = {  # values that are no paths, by option; `data` is an option of a node
    **dict.fromkeys(("data", "data.source", "data.public"), ("digits", "letters")),
    "model.weights": ("hub",),
    "devices.profiles": PROFILE_SETS,
}
# options, or prefixes of options, that do not affect results; they may change when a run is resumed
FREE_OPTIONS = (
    *("resume", "out", "cache", "node-timeout", "window"),
    *("data.cache-gb", "compute.cache-mb", "faults.", "log."),
)


class RunConfig(Section):
    """All options of a run."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random number of the run")
    out: str = Field("", description="folder of the run; empty: a new one, named by date and time")
    resume: bool = Field(False, description="continue the run in the folder `out`")
    cache: str = Field("", description="cache of trained backbones and decoded images; empty: TAPFL_CACHE or ~/.cache")
    node_timeout: float = Field(120.0, gt=0, description="seconds to wait for the nodes to connect")
    window: Count = Field(
        16, description="most requests in flight at once, or two per worker of the engine if that is more"
    )
    data: DataOptions = DataOptions()
    devices: DeviceOptions = DeviceOptions()
    model: ModelOptions = ModelOptions()
    summary: SummaryOptions = SummaryOptions()
    metric: MetricOptions = MetricOptions()
    pruning: PruningOptions = PruningOptions()
    adapters: AdapterOptions = AdapterOptions()
    train: TrainOptions = TrainOptions()
    personalize: PersonalizeOptions = PersonalizeOptions()
    compute: ComputeOptions = ComputeOptions()
    faults: FaultOptions = FaultOptions()
    privacy: PrivacyOptions = PrivacyOptions()
    log: LogOptions = LogOptions()

    @model_validator(mode="after")
    def _private_sums_are_linear(self) -> RunConfig:
        """Refuses rules that DP noise does not cover: it is for a sum of clipped updates with equal weights."""
        adapters, accepted = self.adapters, None
        if adapters.rule not in LINEAR_RULES:
            accepted = f"adapters.rule={adapters.rule}: accepted are fedit, ffa, rolora and embed_side (plain sums)"
        elif adapters.combine != "mean":
            accepted = f"adapters.combine={adapters.combine}: accepted is mean"
        if self.privacy.dp_clip and accepted:
            raise ValueError(f"privacy.dp-clip={self.privacy.dp_clip} cannot be combined with {accepted}")
        return self

    @model_validator(mode="after")
    def _methods_fit(self) -> RunConfig:
        method, train = self.personalize.method, self.train
        if method in PERSONAL_HEAD and self.adapters.head != "personal":
            raise ValueError(
                f"personalize.method={method} keeps the head on the device, which adapters.head={self.adapters.head} "
                "does not; accepted: adapters.head=personal"
            )
        if method == "fedala" and self.adapters.rule == "rolora":
            raise ValueError(
                "personalize.method=fedala cannot be combined with adapters.rule=rolora: the factor that a round does "
                "not train is the same in both models, so nothing is left to mix; accepted: the other rules"
            )
        if method == "fedrep" and (train.steps or self.personalize.head_epochs >= train.epochs):
            raise ValueError(
                f"personalize.head-epochs={self.personalize.head_epochs} must be fewer than "
                f"train.epochs={train.epochs}, with train.steps=0, got {train.steps}"
            )
        return self

    @model_validator(mode="after")
    def _changing_images_fit(self) -> RunConfig:
        if self.summary.refresh and not self.data.changing:
            raise ValueError(
                f"summary.refresh={self.summary.refresh} would fit the mixtures to the same images again; accepted: "
                "0, or data.changing=true"
            )
        if self.data.changing and "pooled" in {self.personalize.method, *self.personalize.reference_rates}:
            raise ValueError(
                "data.changing=true cannot be combined with pooled, which needs the images of all devices; accepted: "
                "another personalize.method and personalize.references"
            )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> RunConfig:
        """Refuses options that need the head or its class names on the server if these stay on the device."""
        model, personal = self.model, self.adapters.head == "personal"
        if model.head not in NEW_HEADS:
            return self
        if model.head == "prototypes" and not personal:
            raise ValueError(
                f"model.head=prototypes with adapters.head={self.adapters.head} would send the means of a device's "
                "classes to the server; accepted: adapters.head=personal, or model.head=new"
            )
        if self.adapters.start != "zero":
            raise ValueError(
                f"adapters.start={self.adapters.start} learns the dense model's predictions, which with "
                f"model.head={model.head} are not of the devices' classes; accepted: adapters.start=zero"
            )
        if model.head_rows and personal:
            raise ValueError(
                f"model.head-rows={model.head_rows} needs the names of the devices' classes, which are not sent "
                f"with model.head={model.head} and adapters.head=personal; accepted: head-rows='', or a shared head"
            )
        if personal and self.personalize.method == "pooled":
            raise ValueError(
                f"personalize.method=pooled needs one classifier for all devices; with model.head={model.head} and "
                "adapters.head=personal each has its own; accepted: a shared head, or another method"
            )
        if personal and (shared := {"dense+alone", "pooled"} & {*self.personalize.reference_rates}):
            raise ValueError(
                f"personalize.references: {', '.join(sorted(shared))} need one classifier for all devices; with "
                f"model.head={model.head} and adapters.head=personal each has its own; accepted: alone"
            )
        if model.weights and self.pruning.labels == "public":
            raise ValueError(
                f"pruning.labels=public has labels of the pool's classes, but with model.head={model.head} and "
                "model.weights the predictions are of the classes of the weights; accepted: pruning.labels=pseudo"
            )
        return self

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> RunConfig:
        """Returns the validated configuration from dotted options such as ``{"pruning.tau": 5.82}``.

        Raises:
            ConfigError: if options are unknown, of the wrong type or out of range. It names all of them.
        """
        return validated(cls, nested(flat))

    def flat(self) -> dict[str, Scalar]:
        """Returns all options with dotted names, the form of Flower's run-config."""
        return flatten(self.model_dump(by_alias=True))

    def paths(self) -> dict[str, str]:
        """Returns the options whose values name files or folders, with their values."""
        flat = self.flat()
        return {option: str(flat[option]) for option in PATH_OPTIONS if names_path(option, str(flat[option]))}


def binding(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the dotted options of a run that must not change when it is resumed.

    The number of rounds may change unless the learning rates depend on it. With `adapters.blocks`, the size of the
    cache determines what is computed once for all rounds and what in each batch; results may differ in the last bits.
    """
    free = {*FREE_OPTIONS, "train.rounds"}
    if flat.get("train.schedule", "constant") != "constant":
        free.discard("train.rounds")
    if flat.get("adapters.blocks"):
        free.discard("compute.cache-mb")
    return {k: v for k, v in flat.items() if not k.startswith(tuple(free))}


def is_built_in(option: str, value: object) -> bool:
    """Returns whether the value of one of `PATH_OPTIONS` is a built-in name, or empty."""
    return value in ("", *BUILT_IN.get(option, ()))


def names_path(option: str, value: str) -> bool:
    """Returns whether the value of one of `PATH_OPTIONS` is a path."""
    return not is_built_in(option, value) and not value.startswith("hf:")
