"""Every option of a run: typed, validated once, and the only place with defaults.

The same options come from three sides: Flower's flat run-config (``"pruning.tau": 5.82``), a TOML file with one table
a section, and ``--set key=value``. All of them go through `RunConfig.from_flat`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, model_validator

from tapfl.options import (
    Count,
    Counts,
    Levels,
    Scalar,
    Section,
    Share,
    Shares,
    TermWeights,
    flatten,
    nested,
    one_of,
    validated,
)

INPUT_OPTIONS = ("data.source", "data.public", "model.weights", "model.head-rows", "devices.profiles")
PATH_OPTIONS = ("out", "cache", *INPUT_OPTIONS)
PLUGIN_OPTIONS = ("pruning.criterion", "adapters.rule", "personalize.method")
PROFILE_SETS = ("equal", "tiers", "mobile")
NOT_PATHS = ("", "digits", "hub", *PROFILE_SETS)
# options, or beginnings of their names, that do not change a result: a resumed run may have other values
FREE_OPTIONS = ("resume", "out", "cache", "node-timeout", "window", "faults.", "log.")
LINEAR_RULES = ("fedit", "ffa", "rolora", "embed_side")  # plain sums of uploads, which the noise of DP can cover
RULES = (*LINEAR_RULES, "hetlora", "flex")
PERSONAL_HEAD = ("fedper", "fedrep")  # methods in which the classifier stays on the device
METHODS = (
    *("apfl", "ditto", "local", "fedavg", "fedavg+finetune", "fedprox", "pfedme", "perfedavg", "fedala"),
    *PERSONAL_HEAD,
)
RATE = 1e30  # the largest learning rate: Adam's steps with larger ones are no float32


class DataOptions(Section):
    """The images, and how they are divided among the devices."""

    source: str = Field("digits", min_length=1, description="`digits`, an .npz file, an image folder, or `hf:NAME`")
    public: str = Field("", description="second source, for the public pool; empty: the pool is a share of `source`")
    public_share: float = Field(0.5, gt=0, lt=1, description="share of `source` that becomes the public pool")
    test_share: float = Field(0.3, gt=0, lt=1, description="share of a device's images used for testing")
    evaluate: Literal["test", "validation"] = Field(
        "test", description="`validation`: evaluate on a `test-share` of the training images, not on the test images"
    )
    partition: Literal["pathological", "class-blocks", "dirichlet", "iid", "shard"] = Field(
        "pathological", description="partitioner of the private images; `class-blocks`: disjoint sets of classes"
    )
    classes_per_device: Count = Field(3, description="classes of each device, for `pathological` and `class-blocks`")
    shards_per_device: Count = Field(3, description="shards of each device, for `shard`")
    dirichlet_alpha: float = Field(0.3, gt=0, description="concentration of `dirichlet`; smaller is more uneven")


class DeviceOptions(Section):
    """The devices: their number, what each can do, and who takes part in a round. Lists are assigned cyclically."""

    count: int = Field(0, ge=0, description="number of devices; 0: one for each node")
    budgets: Shares = Field((0.3, 0.5, 0.7), description="largest share of the dense model's MACs a device can run")
    ranks: Counts = Field((4, 6, 8), description="LoRA rank of the devices with the budget at the same position")
    profiles: str = Field("", description=f"TOML file that replaces budgets and ranks, or {', '.join(PROFILE_SETS)}")
    participation: Share = Field(1.0, description="share of the available devices that are sampled in a round")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that a sampled device fails in that round")
    deadline: float = Field(0.0, ge=0, description="simulated seconds after which a round ends; 0: no deadline")

    @model_validator(mode="after")
    def _paired(self) -> DeviceOptions:
        if len(self.budgets) != len(self.ranks):
            raise ValueError(f"budgets and ranks must be equally many, got {len(self.budgets)} and {len(self.ranks)}")
        return self


class ModelOptions(Section):
    """The dense backbone before pruning."""

    name: str = Field("vit_tiny_patch16_224", description="name of a timm ViT, DeiT, PiT or Swin")
    args: str = Field(
        "img_size=8,patch_size=2,in_chans=1,embed_dim=64,depth=4,num_heads=4,class_token=False,global_pool=avg",
        description="arguments of timm's constructor, key=value; 2/2 is the tuple (2, 2)",
    )
    weights: str = Field("", description="empty: train from scratch; `hub`: timm's pretrained; or a .safetensors file")
    head: Literal["train", "rows", "rows+train"] = Field(
        "train", description="classifier: trained on the public pool, taken from rows of the head in `weights`, or both"
    )
    head_rows: str = Field("", description="JSON file, class name -> row of the head in `weights`, for `rows`")
    mean: Levels = Field((), description="mean of each channel in the training of `weights`, or one; empty: timm's")
    std: Levels = Field((), description="standard deviation of each channel, or one; empty: timm's")
    crop_pct: float = Field(0.0, ge=0, le=1, description="share of the scaled image's side that is used; 0: timm's")
    crop_mode: Literal["auto", "center", "squash", "border"] = Field(
        "auto", description="scales the shorter side, both, or the longer side; auto: timm's"
    )
    interpolation: Literal["auto", "bicubic", "bilinear", "lanczos", "nearest"] = Field(
        "auto", description="how images are resized; auto: timm's"
    )
    epochs: Count = Field(60, description="epochs on the public pool (with `weights`, of the head alone)")
    learning_rate: float = Field(3e-3, gt=0, le=RATE, description="learning rate on the public pool (AdamW, one cycle)")


class SummaryOptions(Section):
    """The Gaussian mixture that describes a device's images to the server."""

    dim: Count = Field(32, description="dimension of the descriptors after a PCA fitted on the public pool")
    covariance: Literal["diag", "full"] = Field("diag", description="covariances of the components")
    max_components: Count = Field(10, description="largest number of components; BIC chooses the number")
    min_support: float = Field(5.0, ge=2, description="smallest number of images that an uploaded component describes")
    clip: float = Field(0.0, ge=0, description="norm to which a device's descriptors are clipped; 0: no clipping")
    noise: float = Field(0.0, ge=0, description="noise on a device's moments, over their sensitivity; docs/privacy.md")

    @model_validator(mode="after")
    def _noise_has_a_scale(self) -> SummaryOptions:
        if self.noise and not self.clip:
            raise ValueError(f"noise={self.noise} needs clip above 0: the norm that bounds the influence of one image")
        return self


class MetricOptions(Section):
    """The metric set: public images chosen for a device, on which importance is measured."""

    rule: Literal["density-ratio", "component-quota", "top-likelihood", "random"] = Field(
        "density-ratio", description="how public images are chosen by a device's mixture"
    )
    size: Count = Field(256, description="number of images; a multiple of `batch`")
    batch: Annotated[int, Field(ge=4)] = Field(64, description="images in one batch when units are scored")

    @model_validator(mode="after")
    def _whole_batches(self) -> MetricOptions:
        if self.size % self.batch:
            raise ValueError(f"size={self.size} must be a multiple of batch={self.batch}")
        return self


class PruningOptions(Section):
    """How units are scored, how many each layer keeps, and what happens after the cut.

    `auto` stands for the value with which the criterion was published.
    """

    criterion: str = Field(
        "tap", description="criterion that chooses the units: a name of `tapfl criteria`, or module:name of a plugin"
    )
    ratio: Literal["auto", "adaptive", "uniform", "power"] = Field(
        "auto", description="layer weights: softmax(KL/tau), all equal, or KL^gamma; auto: the criterion's choice"
    )
    tau: float = Field(5.82, gt=0, description="temperature τ in w = softmax(KL/τ), for ratio=adaptive")
    gamma: float = Field(0.25, ge=0, description="γ in w ∝ KL^γ, for ratio=power; unaffected by the scale of KL")
    basis: Literal["auto", "none", "canonical"] = Field(
        "auto", description="basis of the attention heads before scoring; auto: the criterion's choice"
    )
    compensation: Literal["auto", "none", "one-pass", "sequential"] = Field(
        "auto", description="kept units are refitted to replace the removed ones; auto: the criterion's choice"
    )
    compensation_rows: Literal["auto", "even", "sensitivity"] = Field(
        "auto",
        description="tokens in compensation: equal, or by Fisher sensitivity; auto: the criterion's choice",
    )
    align: int = Field(0, ge=0, description="widths are multiples of this; 0: 8, or 4 if heads have under 32 dims")
    floor: float = Field(0.05, ge=0, lt=1, description="smallest share of its units that a layer keeps")
    unit_shape: Literal["head-dims", "heads", "both"] = Field(
        "head-dims", description="attention units: as many dims of every head, whole heads, or the better of both"
    )
    ffn_terms: TermWeights = Field(
        (0.1, 0.1, 0.8), description="weights of relevance, 1 - redundancy and activeness in the FFN score of `tap`"
    )
    attention_terms: TermWeights = Field(
        (0.8, 0.1, 0.1), description="weights of the same three terms in the attention score of `tap`"
    )
    probe: Literal["own", "pool"] = Field(
        "own", description="images that layer importance is measured on: the device's metric set, or the pool, once"
    )
    labels: Literal["pseudo", "public"] = Field(
        "pseudo", description="labels of the metric set: predicted by the dense model, or the true public labels"
    )
    send: Literal["auto", "weights"] = Field(
        "auto",
        description="auto: send the plan, and the weights only if they are not the backbone's; `weights`: always",
    )
    recovery: Literal["none", "fine-tune", "distill"] = Field(
        "none", description="training after pruning: none, cross-entropy, or cross-entropy and distillation"
    )
    recovery_steps: int = Field(100, ge=0, description="gradient steps, less those of the criterion's own training")
    recovery_batch: Count = Field(32, description="images in a minibatch of recovery")
    recovery_learning_rate: float = Field(1e-4, gt=0, le=RATE, description="learning rate of recovery (Adam, constant)")
    recovery_size: int = Field(0, ge=0, description="public images used for recovery; 0: the metric set")


class AdapterOptions(Section):
    """The LoRA adapters, and how the server aggregates them."""

    rule: Annotated[str, one_of(RULES)] = Field(
        "flex", description=f"aggregation rule: {', '.join(RULES)}, or module:name of a plugin"
    )
    scale: float = Field(2.0, gt=0, description="s = lora_alpha / rank, the same for every rank")
    head: Literal["class-rows", "mean", "personal"] = Field(
        "class-rows",
        description="classifier: each class's row averaged over the devices that hold the class, averaged over all, "
        "or kept on the device",
    )
    combine: Literal["mean", "median", "trimmed-mean"] = Field(
        "mean", description="how the values of a coordinate are aggregated over the devices that hold it"
    )
    trim: float = Field(0.1, ge=0, lt=0.5, description="share of values that `trimmed-mean` removes at each end")
    clip: float = Field(0.0, ge=0, description="L2 norm to which each device's update is clipped; 0: no clipping")
    server: Literal["none", "momentum", "adam"] = Field(
        "none", description="server optimiser: none, FedAvgM (`momentum`) or FedAdam (`adam`)"
    )
    server_learning_rate: float = Field(
        0.0, ge=0, le=RATE, description="learning rate η of the server optimiser; 0: 1 for momentum, 0.01 for adam"
    )
    server_momentum: float = Field(0.9, ge=0, lt=1, description="β of FedAvgM, β₁ of FedAdam")
    server_epsilon: float = Field(1e-3, gt=0, description="τ of FedAdam, its degree of adaptivity")

    @model_validator(mode="after")
    def _hetlora_has_weights(self) -> AdapterOptions:
        if self.rule == "hetlora" and self.combine != "mean":
            raise ValueError(f"rule=hetlora computes weights, which combine={self.combine} ignores; accepted: mean")
        return self


class TrainOptions(Section):
    """Local training on the devices."""

    rounds: Count = Field(10, description="federated rounds")
    epochs: Count = Field(3, description="local epochs in each round")
    steps: int = Field(0, ge=0, le=10**9, description="local steps in each round; 0: as many as `epochs` takes")
    batch: Count = Field(16, description="images in a minibatch")
    learning_rate: float = Field(3e-3, gt=0, le=RATE, description="learning rate of local training")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="optimiser of local training, new in each round"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of `sgd`")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of `sgd` and `adamw`")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="learning rates over the rounds: constant, or falling towards 0 after the last"
    )
    warmup_rounds: int = Field(0, ge=0, description="first rounds, in which the learning rates rise linearly")
    clip_gradient: float = Field(0.0, ge=0, description="L2 norm to which the gradient of a step is clipped; 0: none")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of a label that is spread over all classes")
    augment: Literal["none", "flip", "crop"] = Field(
        "none", description="random changes of training images: left-right flips, or also crops of at least half"
    )
    evaluate_every: Count = Field(1, description="devices evaluate after every so many rounds, and after the last")

    @model_validator(mode="after")
    def _fit_the_optimizer(self) -> TrainOptions:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum={self.momentum} is ignored by optimizer={self.optimizer}; accepted: sgd")
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError(f"weight-decay={self.weight_decay} is ignored by optimizer=adam; accepted: sgd, adamw")
        if self.warmup_rounds >= self.rounds:
            raise ValueError(f"warmup-rounds={self.warmup_rounds} must be fewer than rounds={self.rounds}")
        return self


class PersonalizeOptions(Section):
    """The personal part of a device's model."""

    method: Annotated[str, one_of(METHODS)] = Field(
        "apfl", description=f"personalisation method: {', '.join(METHODS)}, or module:name of a plugin"
    )
    from_round: Count = Field(
        5, description="round in which personal parameters begin, as the shared ones, for `apfl` and `ditto`"
    )
    learning_rate: float = Field(
        0.0, ge=0, le=RATE, description="learning rate of the personal model; 0: that of `train`; `fedavg` has none"
    )
    alpha: float = Field(0.5, ge=0, le=1, description="initial weight α of the personal model, for `apfl`")
    alpha_on: Literal["held-out", "train"] = Field(
        "held-out",
        description="images that α is learnt on: some that nothing is trained on, or a minibatch (published)",
    )
    held_out_share: float = Field(0.25, gt=0, lt=1, description="share of a device's training images that is held out")
    alpha_update: Literal["round", "step", "fixed"] = Field(
        "round", description="when α is updated: once a round, at every step (with alpha-on=train), or never"
    )
    alpha_per: Literal["device", "layer"] = Field(
        "device", description="one α for the device, or (with alpha-on=train) one for each adapted linear and the head"
    )
    alpha_learning_rate: float = Field(0.1, ge=0, le=RATE, description="learning rate of α, with alpha-on=train")
    alone: bool = Field(
        False, description="for comparison, devices also train adapters that never leave them, from the pruned model"
    )
    alone_learning_rate: float = Field(0.0, ge=0, description="learning rate of these; 0: that of `train`")
    ditto_lambda: float = Field(
        0.1, ge=0, description="λ of `ditto`: strength of the pull of personal towards shared weights; 0: no pull"
    )
    prox_mu: float = Field(
        0.01, ge=0, description="μ of `fedprox`: strength of the pull of trained towards received weights; 0: no pull"
    )
    pfedme_lambda: float = Field(15.0, ge=0, description="λ of `pfedme`: strength of the pull between θ and w")
    inner_steps: Count = Field(5, description="steps in which `pfedme` finds θ on each minibatch")
    inner_learning_rate: float = Field(
        0.1, gt=0, le=RATE, description="α of `perfedavg`: size of the one gradient step from w to a device's model"
    )
    ala_learning_rate: float = Field(1.0, ge=0, le=RATE, description="learning rate of the weights W of `fedala`")
    ala_layers: int = Field(
        0, ge=0, description="last adapted linears (the head included) of which `fedala` learns a W; 0: all"
    )
    ala_share: Share = Field(0.8, description="share of the training images, drawn in each round, for W of `fedala`")
    head_epochs: Count = Field(
        1, description="epochs of a round in which `fedrep` trains the head; in the others it trains the body"
    )

    @property
    def holds_out(self) -> bool:
        """Whether devices keep a part of their training images for α, on which nothing is trained in any round."""
        return self.method == "apfl" and self.alpha_on == "held-out" and self.alpha_update != "fixed"

    @model_validator(mode="after")
    def _alone_is_another_model(self) -> PersonalizeOptions:
        if self.alone and self.method == "local":
            raise ValueError("alone=true with method=local would train the same model twice; accepted: alone=false")
        return self

    @model_validator(mode="after")
    def _held_out_alpha_is_one_number(self) -> PersonalizeOptions:
        """A handful of images chooses one number, not one for each layer; and there is nothing new at each step."""
        if self.holds_out and self.alpha_update == "step":
            raise ValueError("alpha-update=step learns α on minibatches; accepted with alpha-on=held-out: round, fixed")
        if self.holds_out and self.alpha_per == "layer":
            raise ValueError("alpha-per=layer needs more than a few held-out images; accepted with it: alpha-on=train")
        return self


class FaultOptions(Section):
    """Which failures a run tolerates before it stops."""

    min_success: Share = Field(0.5, description="smallest share of the sampled devices that must reply in a round")
    retries: int = Field(3, ge=0, description="how often a message is sent again after its worker was lost")
    device_timeout: float = Field(900.0, gt=0, description="seconds that a device may work on one message")
    exchange_timeout: float = Field(3600.0, gt=0, description="seconds to wait for all replies to one request")


class PrivacyOptions(Section):
    """Client-level differential privacy of the adapters: the Gaussian mechanism on each round's sum of updates."""

    dp_clip: float = Field(0.0, ge=0, description="L2 norm C to which each device's update is clipped; 0: no privacy")
    dp_noise: float = Field(0.0, ge=0, description="noise multiplier z: the sum gets noise of standard deviation z·C")
    dp_delta: float = Field(1e-5, gt=0, lt=1, description="δ for which ε is reported")

    @model_validator(mode="after")
    def _noise_has_a_scale(self) -> PrivacyOptions:
        if self.dp_noise and not self.dp_clip:
            raise ValueError(f"dp-noise={self.dp_noise} is a multiple of dp-clip and needs dp-clip above 0, got 0")
        return self


class LogOptions(Section):
    """Loggers that receive the numbers of metrics.jsonl as well; docs/logging.md."""

    tensorboard: bool = Field(False, description="write event files to the run's folder; needs tapfl[tensorboard]")
    mlflow: str = Field(
        "",
        description="MLflow tracking URI, http://HOST:PORT or sqlite:////FOLDER/mlflow.db; empty: off; "
        "needs tapfl[mlflow]",
    )
    mlflow_experiment: str = Field("tapfl", min_length=1, description="MLflow experiment, created if missing")

    @model_validator(mode="after")
    def _uri_is_public(self) -> LogOptions:
        """The URI is written to config.json and sent to the devices, and it must not depend on the working folder."""
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

    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random number of the run")
    out: str = Field("", description="folder of the run; empty: a new one, named by date and time")
    resume: bool = Field(False, description="continue the run in the folder `out`")
    cache: str = Field("", description="cache of trained backbones and decoded images; empty: TAPFL_CACHE or ~/.cache")
    node_timeout: float = Field(120.0, gt=0, description="seconds to wait for the nodes to connect")
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
        """The noise covers a sum of clipped updates in which each device counts once; all else is refused."""
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
                "personalize.method=fedala has nothing to mix with adapters.rule=rolora, which trains in a round the "
                "factor that did not change in the last; accepted: the other rules"
            )
        if method == "fedrep" and (train.steps or self.personalize.head_epochs >= train.epochs):
            raise ValueError(
                f"personalize.head-epochs={self.personalize.head_epochs} are of the train.epochs={train.epochs} of a "
                f"round, and train.steps={train.steps}; accepted: fewer than epochs, and steps=0"
            )
        return self

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> RunConfig:
        """Returns the validated configuration of dotted options such as ``{"pruning.tau": 5.82}``.

        Raises:
            ConfigError: naming every option that is unknown, of the wrong type or out of range.
        """
        return validated(cls, nested(flat))

    def flat(self) -> dict[str, Scalar]:
        """Returns all options with dotted names, the form of Flower's run-config."""
        return flatten(self.model_dump(by_alias=True))

    def paths(self) -> dict[str, str]:
        """Returns the options whose values are files or folders, with these values."""
        flat = self.flat()
        return {option: str(flat[option]) for option in PATH_OPTIONS if names_path(str(flat[option]))}


def binding(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a run's dotted options that must not change when it is resumed.

    It may get more rounds, unless the learning rates depend on their number.
    """
    free = (*FREE_OPTIONS, "train.rounds") if flat.get("train.schedule", "constant") == "constant" else FREE_OPTIONS
    return {k: v for k, v in flat.items() if not k.startswith(free)}


def names_path(value: str) -> bool:
    """Returns whether the value of one of `PATH_OPTIONS` is a path, rather than a built-in name."""
    return value not in NOT_PATHS and not value.startswith("hf:")
