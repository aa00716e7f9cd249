"""Every option of a run: typed, validated once, and the only place with defaults.

The same options arrive from three sides: Flower's flat run-config (``"pruning.tau": 5.82``), a TOML file with one table
a section, and ``--set key=value``. All of them go through `from_flat`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tapfl.errors import ConfigError

Scalar = bool | int | float | str

PATH_OPTIONS = ("out", "cache", "data.source", "data.public", "model.weights", "model.head-rows", "devices.profiles")
PROFILE_SETS = ("equal", "tiers", "mobile")
NOT_PATHS = ("", "digits", "hub", *PROFILE_SETS)
# options, or the beginnings of their names, that change no result: a run that goes on may have others
FREE_OPTIONS = ("resume", "out", "cache", "node-timeout", "window", "faults.", "log.")
PLUGIN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:name, in the place of a built-in name (`tapfl.plugin`)
LINEAR_RULES = ("fedit", "ffa", "rolora", "embed_side")  # sums of what devices sent, which noise can cover
RULES = (*LINEAR_RULES, "hetlora", "flex")
METHODS = ("apfl", "ditto", "local", "fedavg", "fedavg+finetune")


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _split(value: object) -> object:
    """Flower's run-config has no lists: ``"0.3,0.5"`` stands for one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


def _join(values: tuple[object, ...]) -> str:
    return ",".join(str(value) for value in values)


def _not_all_zero(weights: tuple[float, ...]) -> tuple[float, ...]:
    if not any(weights):
        raise ValueError("one of them at least must be above 0")
    return weights


def _one_of(names: tuple[str, ...]) -> AfterValidator:
    """Accepts these names, and ``module:name`` for one of the user's own."""

    def check(value: str) -> str:
        if value not in names and not PLUGIN.fullmatch(value):
            raise ValueError(f"must be one of {', '.join(names)}, or module:name for one of your own")
        return value

    return AfterValidator(check)


Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Weight = Annotated[float, Field(ge=0)]
AnyShares = Annotated[tuple[Share, ...], BeforeValidator(_split), PlainSerializer(_join)]
Shares = Annotated[AnyShares, Field(min_length=1)]
TermWeights = Annotated[
    tuple[Weight, Weight, Weight], BeforeValidator(_split), PlainSerializer(_join), AfterValidator(_not_all_zero)
]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_split), PlainSerializer(_join), Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        alias_generator=_kebab, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_boolean(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("is not a switch, true and false are not accepted")
        return value


S = TypeVar("S", bound=Section)


class DataOptions(Section):
    """Which images there are, and who holds them."""

    source: str = Field("digits", min_length=1, description="`digits`, an .npz file, an image folder, or `hf:NAME`")
    public: str = Field("", description="a second source for the public pool; empty: a share of `source`")
    public_share: float = Field(0.5, gt=0, lt=1, description="share of `source` that is the public pool")
    test_share: float = Field(0.3, gt=0, lt=1, description="share of a device's images that is its test part")
    evaluate: Literal["test", "validation"] = Field(
        "test", description="`validation`: a `test-share` of the training part instead; the test part is not touched"
    )
    image_size: int = Field(
        0, ge=0, le=2**16, description="pixels a side at which images are kept; 0: what the backbone takes"
    )
    partition: Literal["pathological", "class-blocks", "dirichlet", "iid", "shard"] = Field(
        "pathological", description="flwr-datasets partitioner of the private images; `class-blocks` are disjoint"
    )
    classes_per_device: Count = Field(3, description="for `pathological` and `class-blocks`")
    shards_per_device: Count = Field(3, description="for `shard`")
    dirichlet_alpha: float = Field(0.3, gt=0, description="for `dirichlet`; smaller is more uneven")


class DeviceOptions(Section):
    """How many devices there are, what each can do, and who comes to a round; lists are dealt out in turn."""

    count: int = Field(0, ge=0, description="0: as many as there are nodes")
    budgets: Shares = Field((0.3, 0.5, 0.7), description="share of the dense model's MACs that a device can afford")
    ranks: Counts = Field((4, 6, 8), description="LoRA rank that goes with each budget")
    profiles: str = Field(
        "", description=f"TOML file of profiles, in place of budgets and ranks, or one of {', '.join(PROFILE_SETS)}"
    )
    participation: Share = Field(1.0, description="share of the available devices that is asked in a round")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance that a device which was asked is lost in that round")
    deadline: float = Field(0.0, ge=0, description="simulated seconds after which a round goes on without; 0: none")

    @model_validator(mode="after")
    def _paired(self) -> DeviceOptions:
        if len(self.budgets) != len(self.ranks):
            raise ValueError(f"budgets and ranks go in pairs, got {len(self.budgets)} and {len(self.ranks)} of them")
        return self


class ModelOptions(Section):
    """The dense backbone, before anything is pruned."""

    name: str = Field("vit_tiny_patch16_224", description="any timm ViT, DeiT, PiT or Swin")
    args: str = Field(
        "img_size=8,patch_size=2,in_chans=1,embed_dim=64,depth=4,num_heads=4,class_token=False,global_pool=avg",
        description="arguments for timm's constructor, key=value; 2/2 is the tuple (2, 2)",
    )
    weights: str = Field("", description="empty: trained from scratch; `hub`: timm's hub; else a .safetensors file")
    head: Literal["train", "rows", "rows+train"] = Field(
        "train", description="head trained on the public pool, taken row by row from the weights, or both"
    )
    head_rows: str = Field("", description="JSON file: class name -> row of the head of `weights`, for head=rows")
    epochs: Count = Field(60, description="epochs on the public pool (all weights from scratch; the head alone else)")
    learning_rate: float = Field(3e-3, gt=0)
    batch: Count = Field(64)


class SummaryOptions(Section):
    """The Gaussian mixture that stands for a device's images."""

    dim: Count = Field(32, description="descriptor length after the PCA of the pool")
    covariance: Literal["diag", "full"] = "diag"
    max_components: Count = Field(10, description="the number is chosen by BIC, from 1 to this")
    min_support: float = Field(5.0, ge=2, description="samples that a component must stand for before it is uploaded")
    clip: float = Field(0.0, ge=0, description="norm to which a device's descriptors are shortened; 0: as they are")
    noise: float = Field(
        0.0, ge=0, description="noise on a device's moments, over what one image can change of them; docs/privacy.md"
    )

    @model_validator(mode="after")
    def _noise_has_a_scale(self) -> SummaryOptions:
        if self.noise and not self.clip:
            raise ValueError(f"noise={self.noise} needs clip above 0, the norm that bounds what one image can change")
        return self


class MetricOptions(Section):
    """The public images on which a device's task is measured."""

    rule: Literal["density-ratio", "component-quota", "top-likelihood", "random"] = "density-ratio"
    size: Count = Field(256)
    batch: Annotated[int, Field(ge=4)] = Field(64, description="images a scoring batch; `size` must hold at least one")

    @model_validator(mode="after")
    def _whole_batches(self) -> MetricOptions:
        if self.size % self.batch:
            raise ValueError(f"size={self.size} must be a multiple of batch={self.batch}")
        return self


class PruningOptions(Section):
    """How importance becomes widths."""

    criterion: str = Field("tap", description="what decides which units stay: one of `tapfl criteria`, or an own one")
    ratio: Literal["auto", "adaptive", "uniform", "power"] = Field(
        "auto", description="layer weights: softmax(KL/tau), all equal, or KL^gamma; auto: the criterion's own"
    )
    tau: float = Field(5.82, gt=0, description="temperature of the layer softmax")
    gamma: float = Field(0.25, ge=0, description="exponent of ratio=power, which knows no scale")
    basis: Literal["auto", "none", "canonical"] = Field(
        "auto", description="basis of the heads before anything is scored; auto: the criterion's own"
    )
    compensation: Literal["auto", "none", "one-pass", "sequential"] = Field(
        "auto", description="kept units take over what they can of what goes; auto: the criterion's own"
    )
    compensation_rows: Literal["auto", "even", "sensitivity"] = Field(
        "auto", description="tokens count alike, or by how much the prediction feels them; auto: the criterion's own"
    )
    align: int = Field(0, ge=0, description="widths are multiples of this; 0: 8, or 4 where heads have under 32 dims")
    floor: float = Field(0.05, ge=0, lt=1, description="least share of a layer that is kept")
    unit_shape: Literal["head-dims", "heads", "both"] = Field(
        "head-dims",
        description="what goes of an attention: dims, as many of every head; whole heads; or the better of both",
    )
    ffn_terms: TermWeights = Field(
        (0.1, 0.1, 0.8), description="weights of relevance, 1 - redundancy and activeness in the FFN score of `tap`"
    )
    attention_terms: TermWeights = Field((0.8, 0.1, 0.1), description="the same for attentions")
    chunk: Count = Field(128, description="channels that the composite score takes at once; fewer need less memory")
    probe: Literal["own", "pool"] = Field(
        "own", description="layer importance by masks of the device's own metric set, or of the pool, once for all"
    )
    labels: Literal["pseudo", "public"] = Field(
        "pseudo", description="labels of the public images: the dense model's predictions, or the pool's own"
    )
    send: Literal["auto", "weights"] = Field(
        "auto",
        description="of its model a device gets the plan, and the weights where they are not just the backbone's; "
        "`weights`: always",
    )
    recovery: Literal["none", "fine-tune", "distill"] = Field(
        "none", description="training after surgery: none, cross-entropy, or that and the dense model's soft targets"
    )
    recovery_steps: int = Field(100, ge=0, description="gradient steps; those of a criterion's own search are deducted")
    recovery_batch: Count = 32
    recovery_learning_rate: float = Field(1e-4, gt=0, description="of Adam, constant")
    recovery_size: int = Field(0, ge=0, description="images of the fine-tune set; 0: the metric set itself")
    distill_temperature: float = Field(4.0, gt=0, description="T, by which both models' logits are divided")
    distill_share: Share = Field(0.9, description="share of the soft targets in the loss of `distill`")


class AdapterOptions(Section):
    """What is shared after round zero, and how the server makes one of many."""

    rule: Annotated[str, _one_of(RULES)] = Field(
        "flex",
        description=f"which factors of a linear travel, what of them is combined: {', '.join(RULES)}, or an own one",
    )
    scale: float = Field(2.0, gt=0, description="s = lora_alpha / rank, the same for every rank")
    head: Literal["class-rows", "mean", "personal"] = Field(
        "class-rows", description="a class's row is averaged over the devices that hold it, over all, or stays at home"
    )
    combine: Literal["mean", "median", "trimmed-mean"] = Field(
        "mean", description="how the values that the holders of a coordinate sent become one"
    )
    trim: float = Field(0.1, ge=0, lt=0.5, description="share that `trimmed-mean` cuts off at each end")
    clip: float = Field(0.0, ge=0, description="L2 norm to which each device's update is clipped; 0: not at all")
    server: Literal["none", "momentum", "adam"] = Field(
        "none", description="what the server makes of a round's change: takes it, FedAvgM, FedAdam"
    )
    server_learning_rate: float = Field(0.0, ge=0, description="η of `server`; 0: 1 for momentum, 0.01 for adam")
    server_momentum: float = Field(0.9, ge=0, lt=1, description="β of FedAvgM, β₁ of FedAdam")
    server_beta2: float = Field(0.99, ge=0, lt=1, description="β₂ of FedAdam")
    server_epsilon: float = Field(1e-3, gt=0, description="τ of FedAdam, its degree of adaptivity")

    @model_validator(mode="after")
    def _hetlora_has_weights(self) -> AdapterOptions:
        if self.rule == "hetlora" and self.combine != "mean":
            raise ValueError(f"rule=hetlora computes weights, which combine={self.combine} ignores; accepted: mean")
        return self


class TrainOptions(Section):
    """Local work of a round."""

    rounds: Count = 10
    epochs: Count = Field(3, description="local epochs a round")
    batch: Count = 16
    learning_rate: float = Field(3e-3, gt=0)
    optimizer: Literal["adam", "sgd"] = "adam"


class PersonalizeOptions(Section):
    """What a device keeps for itself."""

    method: Annotated[str, _one_of(METHODS)] = Field("apfl", description=f"{', '.join(METHODS)}, or an own one")
    alpha: float = Field(0.5, ge=0, le=1, description="share of the personal part at the start, for `apfl`")
    alpha_update: Literal["round", "step", "fixed"] = Field(
        "round", description="α moves at the first step of a round, at every step, or never"
    )
    alpha_per: Literal["device", "layer"] = Field("device", description="one α, or one for every linear and head")
    alpha_learning_rate: float = Field(0.1, ge=0)
    ditto_lambda: float = Field(
        0.1, ge=0, description="how strongly `ditto` pulls the personal weights to the shared ones; 0: not at all"
    )


class FaultOptions(Section):
    """What a run puts up with before it stops."""

    min_success: Share = Field(0.5, description="share of the devices asked that must come through, else the run stops")
    retries: int = Field(3, ge=0, description="how often a message is sent again whose worker was lost")
    device_timeout: float = Field(900.0, gt=0, description="seconds that a device may work on one message")
    exchange_timeout: float = Field(3600.0, gt=0, description="seconds to wait for all the replies of a round")


class PrivacyOptions(Section):
    """Client-level differential privacy of the adapters: the Gaussian mechanism on each round's sum of updates."""

    dp_clip: float = Field(0.0, ge=0, description="L2 norm to which a device's whole update is clipped; 0: no privacy")
    dp_noise: float = Field(0.0, ge=0, description="noise multiplier z: standard deviation of the sum, in clips")
    dp_delta: float = Field(1e-5, gt=0, lt=1, description="δ at which ε is reported")

    @model_validator(mode="after")
    def _noise_has_a_scale(self) -> PrivacyOptions:
        if self.dp_noise and not self.dp_clip:
            raise ValueError(f"dp-noise={self.dp_noise} is counted in clips and needs dp-clip above 0, got 0")
        return self


class LogOptions(Section):
    """Where the numbers of metrics.jsonl go besides; docs/logging.md."""

    tensorboard: bool = Field(False, description="event files in the run's folder; needs tapfl[tensorboard]")
    mlflow: str = Field(
        "",
        description="tracking URI, as http://HOST:PORT or sqlite:////FOLDER/mlflow.db; empty: off; needs tapfl[mlflow]",
    )
    mlflow_experiment: str = Field("tapfl", min_length=1, description="MLflow experiment, made if it is not there")

    @model_validator(mode="after")
    def _uri_can_be_told(self) -> LogOptions:
        """The URI stands in config.json and goes to the devices with the other options, and a run has no one folder."""
        uri = urlsplit(self.mlflow)
        if uri.password or "password" in parse_qs(uri.query):
            raise ValueError(
                "mlflow holds a password, which would be written to config.json and sent to the devices; accepted: "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        if uri.scheme.startswith("sqlite") and not uri.path.startswith("//"):
            raise ValueError(f"mlflow={self.mlflow} must be absolute: sqlite:////FOLDER/mlflow.db, with four slashes")
        return self


class RunConfig(Section):
    """All options of a run."""

    seed: int = Field(0, ge=0, lt=2**63)
    out: str = Field("", description="the run's folder; empty: a new one, named by date and time")
    resume: bool = Field(False, description="go on with the run whose folder `out` is")
    cache: str = Field("", description="cache of trained backbones and decoded images; empty: TAPFL_CACHE or ~/.cache")
    node_timeout: float = Field(120.0, gt=0, description="seconds to wait for the nodes to be there")
    window: Count = Field(16, description="messages in flight at once")
    data: DataOptions = DataOptions()
    devices: DeviceOptions = DeviceOptions()
    model: ModelOptions = ModelOptions()
    summary: SummaryOptions = SummaryOptions()
    metric: MetricOptions = MetricOptions()
    pruning: PruningOptions = PruningOptions()
    adapters: AdapterOptions = AdapterOptions()
    train: TrainOptions = TrainOptions()
    personalize: PersonalizeOptions = PersonalizeOptions()
    faults: FaultOptions = FaultOptions()
    privacy: PrivacyOptions = PrivacyOptions()
    log: LogOptions = LogOptions()

    @model_validator(mode="after")
    def _private_sums_are_linear(self) -> RunConfig:
        """The noise covers a sum of clipped updates, each counted once: whatever is not such a sum is refused."""
        adapters, accepted = self.adapters, None
        if adapters.rule not in LINEAR_RULES:
            accepted = f"adapters.rule={adapters.rule}: accepted are fedit, ffa, rolora and embed_side (plain sums)"
        elif adapters.combine != "mean":
            accepted = f"adapters.combine={adapters.combine}: accepted is mean"
        if self.privacy.dp_clip and accepted:
            raise ValueError(f"privacy.dp-clip={self.privacy.dp_clip} does not go with {accepted}")
        return self

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> RunConfig:
        """Returns the validated configuration of dotted options such as ``{"pruning.tau": 5.82}``.

        Raises:
            ConfigError: naming every option that is unknown, of the wrong type or out of range.
        """
        nested: dict[str, Any] = {}
        for key, value in flat.items():
            table, _, option = key.rpartition(".")
            section = nested.setdefault(table, {}) if table else nested
            if isinstance(section, dict):  # else a whole section was given a value, which is refused below
                section[option] = value
        return validated(cls, nested)

    def flat(self) -> dict[str, Scalar]:
        """Returns all options with dotted names, as Flower's run-config has them."""
        return flatten(self.model_dump(by_alias=True))

    def paths(self) -> dict[str, str]:
        """Returns the options that name a file or a folder, with their values."""
        flat = self.flat()
        values = {option: str(flat[option]) for option in PATH_OPTIONS}
        return {k: v for k, v in values.items() if names_path(v)}


def validated(model: type[S], tables: Mapping[str, Any]) -> S:
    """Returns nested tables as a `model`. Raises ConfigError, naming every option that is not valid."""
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(dict(e), model) for e in error.errors())) from None


def binding(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a run's dotted options that must stay as they are when it goes on; it may get more rounds."""
    return {k: v for k, v in flat.items() if not k.startswith(FREE_OPTIONS) and k != "train.rounds"}


def names_path(value: str) -> bool:
    """Says whether the value of an option that can name a file or a folder does name one."""
    return value not in NOT_PATHS and not value.startswith("hf:")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested tables as one table with dotted names; lists become comma-separated text."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _join(tuple(value)) if isinstance(value, list | tuple) else value
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the options of a TOML file with dotted names. Raises ConfigError if it is not there or not TOML."""
    return flatten(read_toml_tables(path))


def read_toml_tables(path: Path, option: str = "--config") -> dict[str, Any]:
    """Returns the tables of a TOML file as they are. Raises ConfigError as `read_toml`, naming `option`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # of thousands of digits or brackets too
        raise ConfigError(f"{option} {path}: is not TOML ({error})") from None


def parse_assignment(text: str) -> tuple[str, Scalar]:
    """Returns key and value of ``key=value``; the value is read as JSON where it is a number or a boolean.

    Raises:
        ConfigError: if there is no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: must have the form key=value, such as train.rounds=5")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):  # of thousands of digits or brackets too
        parsed = value
    return key.strip(), parsed if isinstance(parsed, bool | int | float) else value


def _explain(error: dict[str, Any], root: type[BaseModel]) -> str:
    """One line for one of pydantic's errors: the option as the user writes it, the value, what is accepted."""
    path = [str(part) for part in error["loc"] if not isinstance(part, int)]
    option = ".".join(_kebab(part) for part in path) or "configuration"
    if error["type"] == "extra_forbidden":
        said = option if option.isprintable() else repr(option)
        return f"{said}: is not an option; accepted here: {', '.join(_siblings(root, path[:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    shown = "" if isinstance(value, dict | Section) else f" = {value!r:.200}"
    return f"{option}{shown}: {message[0].lower()}{message[1:]}"


def _siblings(section: type[BaseModel], tables: list[str]) -> list[str]:
    for table in tables:
        annotation = section.model_fields[table].annotation
        (section,) = get_args(annotation)[:1] or (annotation,)  # of a list of tables what each of them is
    return [_kebab(name) for name in section.model_fields]
