"""Options of the rounds: adapters, local training, personalisation, processors, failures, privacy and loggers."""

from __future__ import annotations

import math
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, field_validator, model_validator

from tapfl.options import RATE, Count, Number, Section, Share, Words, one_of

LINEAR_RULES = ("fedit", "ffa", "rolora", "embed_side")  # rules that sum the uploads, so that DP noise covers them
RULES = (*LINEAR_RULES, "hetlora", "flex")
REFERENCES = ("alone", "dense+alone", "pooled")  # reference models, which devices train for comparison
PERSONAL_HEAD = ("fedper", "fedrep")  # methods in which the classifier stays on the device
METHODS = (
    *("apfl", "ditto", "local", "pooled", "fedavg", "fedavg+finetune", "fedprox", "pfedme", "perfedavg", "fedala"),
    *PERSONAL_HEAD,
)


class AdapterOptions(Section):
    """The LoRA adapters, and how the server aggregates them."""

    rule: Annotated[str, one_of(RULES)] = Field(
        "flex", description=f"aggregation rule: {', '.join(RULES)}, or module:name of a plugin"
    )
    scale: float = Field(2.0, gt=0, description="s = lora_alpha / rank, the same for every rank")
    head: Literal["class-rows", "mean", "personal"] = Field(
        "class-rows",
        description="classifier: each class's row averaged over the devices that hold the class; averaged over all "
        "devices; or kept on the device",
    )
    blocks: Number = Field(0, description="number of the backbone's last blocks that get adapters; 0: all")
    start: Literal["zero", "metric-sets", "pool"] = Field(
        "zero",
        description="initial adapters: without effect, or distilled from the dense model on each device's metric set "
        "or on the public pool",
    )
    start_rounds: Count = Field(3, description="most rounds of this distillation; fewer if the held-out loss rises")
    start_steps: Count = Field(20, description="gradient steps per device in each of these rounds")
    start_learning_rate: float = Field(3e-3, gt=0, le=RATE, description="learning rate of this distillation (Adam)")
    combine: Literal["mean", "median", "trimmed-mean"] = Field(
        "mean", description="how a coordinate is aggregated over the devices that hold it"
    )
    trim: float = Field(0.1, ge=0, lt=0.5, description="fraction of values that `trimmed-mean` removes at each end")
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
            raise ValueError(f"rule=hetlora weights devices, which combine={self.combine} ignores; accepted: mean")
        return self


class TrainOptions(Section):
    """Local training on the devices."""

    rounds: Count = Field(10, description="federated rounds")
    epochs: Count = Field(3, description="local epochs in each round")
    steps: Number = Field(0, description="local steps in each round; 0: the number of steps in `epochs` epochs")
    batch: Count = Field(16, description="images in a minibatch")
    together: Count | Literal["auto"] = Field(
        1,
        description="devices whose training steps are computed as one batched step; `auto`: as many as make training "
        "faster; changes the last bits of results",
    )
    learning_rate: float = Field(3e-3, gt=0, le=RATE, description="learning rate of local training")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="optimiser of local training, new in each round"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of `sgd`")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of `sgd` and `adamw`")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="learning rates over the rounds: constant, or decreasing towards 0 at the end"
    )
    warmup_rounds: Number = Field(0, description="rounds at the beginning in which the learning rates rise linearly")
    clip_gradient: float = Field(0.0, ge=0, description="L2 norm to which the gradient of a step is clipped; 0: none")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="fraction of a label that is spread over all classes")
    label_prior: Literal["none", "counts"] = Field(
        "none",
        description="`counts`: add the log class frequencies of a device's training images to its logits, in training "
        "and in inference",
    )
    augment: Literal["none", "flip", "crop"] = Field(
        "none",
        description="random changes of training images: none, horizontal flips, or flips and crops of at least half "
        "the area",
    )
    evaluate_every: Count = Field(
        1, description="rounds between evaluations; devices also evaluate after the last round"
    )

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
    """How a device gets a personal model, and the models that it is compared with."""

    method: Annotated[str, one_of(METHODS)] = Field(
        "apfl", description=f"personalisation method: {', '.join(METHODS)}, or module:name of a plugin"
    )
    from_round: Count = Field(
        5,
        description="round in which the private model starts, as a copy of the shared one, for `apfl` and `ditto`",
    )
    learning_rate: float = Field(
        0.0, ge=0, le=RATE, description="learning rate of the private model (`fedrep`: the head); 0: that of `train`"
    )
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="initial weight α of the private model, for `apfl`; with alpha-on=held-out it is used only in the "
        "round in which the private model starts",
    )
    alpha_on: Literal["held-out", "train"] = Field(
        "held-out",
        description="images on which α is chosen: held-out images, or training minibatches (as published)",
    )
    held_out_share: float = Field(
        0.25, gt=0, lt=1, description="fraction of a device's training images to hold out; none if under 12 images"
    )
    alpha_update: Literal["round", "step", "fixed"] = Field(
        "round", description="when α is updated: once per round, at every step (with alpha-on=train), or never"
    )
    alpha_per: Literal["device", "layer"] = Field(
        "device", description="one α per device, or (with alpha-on=train) one for each adapted linear and the head"
    )
    alpha_learning_rate: float = Field(0.1, ge=0, le=RATE, description="learning rate of α, with alpha-on=train")
    references: Words = Field(
        (),
        description="models that devices also train, for comparison, and never send: alone, dense+alone, pooled; each "
        "may have a learning rate, as in alone:0.001, otherwise that of `train`",
    )
    ditto_lambda: float = Field(
        0.1, ge=0, description="λ of `ditto`: penalty on the distance of private from shared weights; 0: none"
    )
    prox_mu: float = Field(
        0.01, ge=0, description="μ of `fedprox`: penalty on the distance of trained from received weights; 0: none"
    )
    pfedme_lambda: float = Field(15.0, ge=0, description="λ of `pfedme`: penalty on the distance between u and w")
    inner_steps: Count = Field(5, description="steps of u on each minibatch in `pfedme`")
    inner_learning_rate: float = Field(
        0.1, gt=0, le=RATE, description="α of `perfedavg`: learning rate of the single step from w to a device's model"
    )
    ala_learning_rate: float = Field(1.0, ge=0, le=RATE, description="learning rate of the weights W of `fedala`")
    ala_layers: Number = Field(
        0, description="`fedala` learns a W for this number of the last adapted linears, head included; 0: for all"
    )
    ala_share: Share = Field(
        0.8, description="fraction of the training images, drawn in each round, on which `fedala` learns W"
    )
    head_epochs: Count = Field(
        1, description="epochs of a round in which `fedrep` trains the head; in the others it trains the body"
    )

    @property
    def holds_out(self) -> bool:
        """Whether devices hold out a part of their training images in every round to choose α."""
        return self.method == "apfl" and self.alpha_on == "held-out" and self.alpha_update != "fixed"

    @property
    def reference_rates(self) -> dict[str, float]:
        """The learning rate of each of the `references`, in their order; 0 means that of `train`."""
        return {name: float(rate or 0) for name, _, rate in (text.partition(":") for text in self.references)}

    @field_validator("references")
    @classmethod
    def _references_are_known(cls, references: tuple[str, ...]) -> tuple[str, ...]:
        accepted = f"accepted: {', '.join(REFERENCES)}, each at most once, or with a learning rate as alone:0.001"
        names = [text.partition(":")[0] for text in references]
        for text in references:
            name, colon, rate = text.partition(":")
            if name not in REFERENCES or names.count(name) > 1 or (colon and not 0 < _number(rate) <= RATE):
                raise ValueError(f"{text!r} cannot be a reference; {accepted}")
        return references

    @model_validator(mode="after")
    def _references_are_other_models(self) -> PersonalizeOptions:
        if (same := {"local": "alone", "pooled": "pooled"}.get(self.method)) in self.reference_rates:
            raise ValueError(
                f"references: {same} with method={self.method} would train the same model twice; accepted: the others"
            )
        return self

    @model_validator(mode="after")
    def _held_out_alpha_is_one_number(self) -> PersonalizeOptions:
        """Refuses a held-out α per layer (too few images) and per step (the images are the same at every step)."""
        if self.holds_out and self.alpha_update == "step":
            raise ValueError("alpha-update=step learns α on minibatches; accepted with alpha-on=held-out: round, fixed")
        if self.holds_out and self.alpha_per == "layer":
            raise ValueError("alpha-per=layer needs more images than are held out; accepted with it: alpha-on=train")
        return self


class ComputeOptions(Section):
    """Where computations run, and how precisely; see docs/compute.md."""

    device: Literal["cpu", "cuda", "auto"] = Field(
        "cpu", description="`cuda`: the GPU that torch sees first; `auto`: a GPU if torch has one, else the CPU"
    )
    precision: Literal["exact", "fast"] = Field(
        "exact", description="`fast`: bfloat16 for rankings, evaluation and the products with frozen weights"
    )
    deterministic: bool = Field(
        False,
        description="on a GPU, use only deterministic operations; all GPUs of a run must then be of the same kind",
    )
    graphs: bool = Field(
        False, description="on a GPU, run each step of local training as a CUDA graph; not tested on a GPU yet"
    )
    cache_mb: Count = Field(
        512, description="most MB of images, models, and inputs of the first block with adapters that a worker caches"
    )


class FaultOptions(Section):
    """Which failures a run tolerates before it stops."""

    min_success: Share = Field(0.5, description="smallest fraction of the sampled devices that must reply in a round")
    retries: Number = Field(3, description="how often a message is sent again after its worker was lost")
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
    """Loggers that also receive the numbers of metrics.jsonl; see docs/logging.md."""

    tensorboard: bool = Field(False, description="write event files to the run's folder; needs tapfl[tensorboard]")
    mlflow: str = Field(
        "",
        description="MLflow tracking URI, http://HOST:PORT or sqlite:////FOLDER/mlflow.db; empty: off; "
        "needs tapfl[mlflow]",
    )
    mlflow_experiment: str = Field("tapfl", min_length=1, description="MLflow experiment, created if missing")

    @model_validator(mode="after")
    def _uri_is_public(self) -> LogOptions:
        """Refuses passwords, as the URI is stored in config.json and sent to devices, and relative paths."""
        uri = urlsplit(self.mlflow)
        if uri.password or "password" in parse_qs(uri.query):
            raise ValueError(
                "mlflow holds a password, which would be written to config.json and sent to the devices; accepted: "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        if uri.scheme.startswith("sqlite") and not uri.path.startswith("//"):
            raise ValueError(f"mlflow={self.mlflow} must be absolute: sqlite:////FOLDER/mlflow.db, with four slashes")
        return self


def _number(text: str) -> float:
    """Returns the number that `text` represents, or NaN if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
