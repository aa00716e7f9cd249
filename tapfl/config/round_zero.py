"""Options of the data, the devices, the backbone, and its pruning for each device."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tapfl.arguments import Argument, parse_args
from tapfl.options import RATE, Count, Counts, Levels, Number, Section, Share, Shares, TermWeights

Partition = Literal[
    "pathological",
    "class-blocks",
    "dirichlet",
    "iid",
    "shard",
    "natural",
    "IidPartitioner",
    "LinearPartitioner",
    "SquarePartitioner",
    "ExponentialPartitioner",
    "SizePartitioner",
    "DirichletPartitioner",
    "InnerDirichletPartitioner",
    "PathologicalPartitioner",
    "ShardPartitioner",
    "DistributionPartitioner",
    "ContinuousPartitioner",
    "NaturalIdPartitioner",
    "GroupedNaturalIdPartitioner",
]
UNUSED = {  # partitioners of flwr-datasets that cannot be used with options, or not for images
    "VerticalEvenPartitioner": "divides columns among devices, and an image is one column",
    "VerticalSizePartitioner": "divides columns among devices, and an image is one column",
    "IdToSizeFncPartitioner": "takes a function; Linear-, Square- and ExponentialPartitioner are made of it",
}
NEW_HEADS = ("new", "prototypes")  # values of model.head with which the classes are those that devices report
PROFILE_SETS = ("equal", "tiers", "mobile")


def _divides_images(name: object) -> object:
    if why := UNUSED.get(str(name)):
        raise ValueError(f"{why}; accepted: the other partitioners of flwr-datasets")
    return name


class DataOptions(Section):
    """The images, and how they are divided among the devices."""

    source: str = Field("digits", min_length=1, description="`digits`, an .npz file, an image folder, or `hf:NAME`")
    public: str = Field(
        "",
        description="source of the public pool; empty: a part of `source`. With model.head=new or prototypes it may "
        "have other classes, such as `letters`, or no labels",
    )
    public_share: float = Field(0.5, gt=0, lt=1, description="fraction of `source` that becomes the public pool")
    test_share: float = Field(0.3, gt=0, lt=1, description="fraction of a device's images used for testing")
    evaluate: Literal["test", "validation"] = Field(
        "test",
        description="`validation`: evaluate on a fraction `test-share` of the training images, not on the test images",
    )
    partition: Annotated[Partition, BeforeValidator(_divides_images)] = Field(
        "pathological", description="partitioner of the private images: a short name, or a class of flwr-datasets"
    )
    partition_args: str = Field(
        "", description="arguments of that class, key=value; 2/2 is the list (2, 2), and 1/2;3/4 has two rows"
    )
    device_column: str = Field(
        "",
        description="array (.npz) or column (`hf:`) with device ids; for folders `ID/CLASS/`, any name; "
        "empty: automatic",
    )
    min_images: Number = Field(
        0,
        description="smallest number of private images of a device id; others are left out, or with `changing`, skip "
        "the round; 0: no limit",
    )
    changing: bool = Field(
        False, description="images of a node, or of a natural device's folder, may change between rounds"
    )
    classes_per_device: Count = Field(3, description="classes of each device, for `pathological` and `class-blocks`")
    shards_per_device: Count = Field(3, description="shards of each device, for `shard`")
    dirichlet_alpha: float = Field(0.3, gt=0, description="concentration of `dirichlet`; smaller is more uneven")
    cache_gb: float = Field(50.0, ge=0, description="most gigabytes of decoded images per source in `cache`")

    @property
    def makes_devices(self) -> bool:
        """Whether the partitioner determines the number of devices: one for each id, group of ids, or size."""
        own = ("natural", "NaturalIdPartitioner", "GroupedNaturalIdPartitioner")
        return self.partition in (*own, "SizePartitioner", "InnerDirichletPartitioner")

    @property
    def divided_by(self) -> Argument:
        """The column that private images are divided by: ``label``, ``device``, or the one in `partition-args`."""
        natural = self.partition in ("natural", "NaturalIdPartitioner", "GroupedNaturalIdPartitioner")
        return parse_args(self.partition_args).get("partition_by", "device" if natural else "label")

    @property
    def ids(self) -> str:
        """The name under which `source` has the ids of devices; empty if they are not needed."""
        return self.device_column or ("device" if self.divided_by == "device" else "")

    @model_validator(mode="after")
    def _options_go_together(self) -> DataOptions:
        try:
            args = parse_args(self.partition_args)
        except ValueError as error:
            raise ValueError(f"partition-args={error}") from None
        if args and not self.partition.endswith("Partitioner"):
            raise ValueError(
                f"partition-args={self.partition_args} are arguments of a class, but partition={self.partition} is a "
                "short name; accepted: no arguments, or the name of a class, such as DirichletPartitioner"
            )
        if self.min_images and not self.ids and not self.changing:
            raise ValueError(
                f"min-images={self.min_images} counts the images of each device id; accepted with it: "
                "partition=natural, a device-column, or changing=true"
            )
        return self


class DeviceOptions(Section):
    """The devices: their number, their abilities, and their participation in rounds. Lists are assigned cyclically."""

    count: Number = Field(
        0, description="number of devices; 0: one per node, or in a simulation one per id, otherwise 10"
    )
    budgets: Shares = Field((0.3, 0.5, 0.7), description="fraction of the dense model's MACs that a device can run")
    ranks: Counts = Field((4, 6, 8), description="LoRA rank of the devices with the budget at the same position")
    profiles: str = Field("", description=f"TOML file that replaces budgets and ranks, or {', '.join(PROFILE_SETS)}")
    participation: Share = Field(1.0, description="fraction of the available devices that are sampled in a round")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that a sampled device fails in that round")
    deadline: float = Field(0.0, ge=0, description="simulated seconds after which a round ends; 0: no deadline")

    @model_validator(mode="after")
    def _paired(self) -> DeviceOptions:
        if len(self.budgets) != len(self.ranks):
            raise ValueError(f"budgets and ranks must be equally long, got {len(self.budgets)} and {len(self.ranks)}")
        return self


class ModelOptions(Section):
    """The dense backbone before pruning."""

    name: str = Field(
        "vit_tiny_patch16_224",
        description="timm ViT, DeiT, PiT or Swin: its name, `hf-hub:NAME`, or `local-dir:FOLDER`",
    )
    args: str = Field(
        "img_size=8,patch_size=2,in_chans=1,embed_dim=64,depth=4,num_heads=4,class_token=False,global_pool=avg",
        description="arguments of timm's constructor, key=value; 2/2 is the tuple (2, 2)",
    )
    weights: str = Field(
        "", description="empty: train from scratch; `hub`: pretrained weights; or a file, .safetensors or .pth"
    )
    head: Literal["train", "rows", "rows+train", "new", "prototypes"] = Field(
        "train",
        description="classifier: trained on the public pool, taken from rows of the head in `weights`, or both; `new`: "
        "for the classes that devices report, starting at 0 or from `head-rows`; `prototypes`: from each device's "
        "class means",
    )
    head_rows: str = Field(
        "", description="JSON file, class name -> row of the head in `weights`, for `rows`, `rows+train` and `new`"
    )
    mean: Levels = Field(
        (), description="mean of each channel that `weights` were trained with, or one for all; empty: timm's"
    )
    std: Levels = Field((), description="standard deviation of each channel, or one for all; empty: timm's")
    crop_pct: float = Field(
        0.0, ge=0, le=1, description="fraction of the resized image's side in the centre crop; 0: timm's"
    )
    crop_mode: Literal["auto", "center", "squash", "border"] = Field(
        "auto", description="resize the shorter side, both sides, or the longer side before cropping; auto: timm's"
    )
    interpolation: Literal["auto", "bicubic", "bilinear", "lanczos", "nearest"] = Field(
        "auto", description="how images are resized; auto: timm's"
    )
    epochs: Count = Field(60, description="epochs on the public pool (with `weights`, only of the head)")
    learning_rate: float = Field(3e-3, gt=0, le=RATE, description="learning rate on the public pool (AdamW, one cycle)")

    @model_validator(mode="after")
    def _rows_are_used(self) -> ModelOptions:
        if self.head_rows and self.head in ("train", "prototypes"):
            raise ValueError(
                f"head-rows={self.head_rows} is not used with head={self.head}; accepted: head=rows, rows+train or new"
            )
        return self


class SummaryOptions(Section):
    """The Gaussian mixture that describes a device's images to the server."""

    dim: Count = Field(32, description="dimension of the descriptors after a PCA fitted on the public pool")
    covariance: Literal["diag", "full"] = Field("diag", description="covariances of the components")
    max_components: Count = Field(10, description="largest number of components; BIC chooses the number")
    pool_sample: Count = Field(20_000, description="most public images to fit the PCA and the pool's mixture on")
    refresh: Number = Field(
        0, description="number of rounds after which mixtures are fitted again, with data.changing; 0: never"
    )
    min_support: float = Field(5.0, ge=2, description="smallest number of images per uploaded component")
    clip: float = Field(0.0, ge=0, description="norm to which a device's descriptors are clipped; 0: no clipping")
    noise: float = Field(
        0.0, ge=0, description="standard deviation of the noise on a device's moments, in units of their sensitivity"
    )

    @model_validator(mode="after")
    def _noise_has_a_scale(self) -> SummaryOptions:
        if self.noise and not self.clip:
            raise ValueError(f"noise={self.noise} needs clip above 0: the norm that bounds the influence of one image")
        if self.noise and self.refresh:
            raise ValueError(
                f"refresh={self.refresh} uploads further mixtures, but noise={self.noise} protects only one; "
                "accepted: refresh=0, or noise=0"
            )
        return self


class MetricOptions(Section):
    """The metric set: public images chosen for a device, on which importance is measured."""

    rule: Literal["density-ratio", "component-quota", "top-likelihood", "random", "shared"] = Field(
        "density-ratio",
        description="how a device's mixture selects public images; random: at random; shared: at random, the same for "
        "all devices, so that devices with equal budgets get equal models, which are made once",
    )
    size: Count = Field(256, description="number of images; a multiple of `batch`")
    batch: Annotated[int, Field(ge=4)] = Field(64, description="images per batch when units are scored")

    @model_validator(mode="after")
    def _whole_batches(self) -> MetricOptions:
        if self.size % self.batch:
            raise ValueError(f"size={self.size} must be a multiple of batch={self.batch}")
        return self


class PruningOptions(Section):
    """How units are scored, how many each layer keeps, and what happens after units are removed.

    `auto` stands for the default of the criterion.
    """

    criterion: str = Field(
        "tap+", description="criterion that chooses the units: a name of `tapfl criteria`, or module:name of a plugin"
    )
    ratio: Literal["auto", "adaptive", "uniform"] = Field(
        "auto", description="layer weights: softmax(KL/tau), or all equal; auto: the criterion's default"
    )
    tau: float = Field(5.82, gt=0, description="temperature τ in w = softmax(KL/τ), for ratio=adaptive")
    basis: Literal["auto", "none", "canonical"] = Field(
        "auto", description="basis of the attention heads before scoring; auto: the criterion's default"
    )
    compensation: Literal["auto", "none", "one-pass", "sequential", "reconstruction"] = Field(
        "auto",
        description="how kept units are refitted to replace the removed ones; `reconstruction`: `sequential`, then "
        "gradient steps on each layer; auto: the criterion's default",
    )
    compensation_rows: Literal["auto", "even", "sensitivity"] = Field(
        "auto",
        description="weights of tokens in compensation: equal, or by Fisher sensitivity; auto: the criterion's default",
    )
    compensation_steps: Count = Field(40, description="gradient steps per layer, for compensation=reconstruction")
    compensation_learning_rate: float = Field(
        1e-3, gt=0, le=RATE, description="learning rate of these steps (Adam, constant)"
    )
    align: Number = Field(0, description="widths are multiples of this; 0: 8, or 4 if heads have under 32 dimensions")
    floor: float = Field(0.05, ge=0, lt=1, description="smallest fraction of its units that a layer keeps")
    unit_shape: Literal["head-dims", "heads", "both"] = Field(
        "head-dims",
        description="what attentions lose: equally many dimensions of every head, whole heads, or the better of both",
    )
    tokens: Literal["none", "merge", "auto"] = Field(
        "none",
        description="merging of similar tokens in ViT and DeiT; auto: the fraction of tokens that works best on the "
        "metric set",
    )
    token_share: float = Field(
        0.8,
        ge=0.5,
        le=1,
        description="fraction of the tokens that is left, on average over the FFNs of all blocks, for tokens=merge",
    )
    ffn_terms: TermWeights = Field(
        (0.1, 0.1, 0.8), description="weights of relevance, 1 - redundancy and activeness in the FFN score of `tap`"
    )
    attention_terms: TermWeights = Field(
        (0.8, 0.1, 0.1), description="weights of the same three terms in the attention score of `tap`"
    )
    probe: Literal["own", "pool", "auto"] = Field(
        "own",
        description="images on which layer importance (and unit scores, where this is exact) is measured: each "
        "device's metric set, or the pool, once for all devices; auto: whichever needs fewer forward passes",
    )
    labels: Literal["pseudo", "public"] = Field(
        "pseudo", description="labels of the metric set: predicted by the dense model, or the true public labels"
    )
    send: Literal["auto", "weights"] = Field(
        "auto",
        description="auto: send the plan, and the weights only if they do not follow from it; `weights`: always both",
    )
    recovery: Literal["none", "fine-tune", "distill"] = Field(
        "none", description="training after pruning: none, cross-entropy, or cross-entropy and distillation"
    )
    recovery_steps: Number = Field(100, description="gradient steps of recovery, minus those of the criterion itself")
    recovery_batch: Count = Field(32, description="images in a minibatch of recovery")
    recovery_learning_rate: float = Field(3e-5, gt=0, le=RATE, description="learning rate of recovery (Adam, constant)")
    recovery_size: Number = Field(0, description="public images used for recovery; 0: the metric set")
    recovery_held_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="fraction of these images to hold out; the weights with the least loss on them stay; 0: the last",
    )
