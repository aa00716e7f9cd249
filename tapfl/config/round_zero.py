"""Options of the data, the devices, the backbone, and how it is cut for each device."""

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
UNUSED = {  # partitioners of flwr-datasets that cannot divide images by options
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
        description="second source, for the public pool, with model.head=new of any classes or without labels, such as "
        "`letters`; empty: the pool is a share of `source`",
    )
    public_share: float = Field(0.5, gt=0, lt=1, description="share of `source` that becomes the public pool")
    test_share: float = Field(0.3, gt=0, lt=1, description="share of a device's images used for testing")
    evaluate: Literal["test", "validation"] = Field(
        "test", description="`validation`: evaluate on a `test-share` of the training images, not on the test images"
    )
    partition: Annotated[Partition, BeforeValidator(_divides_images)] = Field(
        "pathological", description="partitioner of the private images: a short name, or a class of flwr-datasets"
    )
    partition_args: str = Field(
        "", description="arguments of that class, key=value; 2/2 is the list (2, 2), and 1/2;3/4 has two rows"
    )
    device_column: str = Field(
        "", description="array (.npz) or column (`hf:`) of device ids; any name: folders `ID/CLASS/`; empty: automatic"
    )
    min_images: Number = Field(
        0, description="device ids with fewer private images are left out, of a round if `changing`; 0: none"
    )
    changing: bool = Field(
        False, description="a device's own images may change between rounds: those of a node, or of a natural folder"
    )
    classes_per_device: Count = Field(3, description="classes of each device, for `pathological` and `class-blocks`")
    shards_per_device: Count = Field(3, description="shards of each device, for `shard`")
    dirichlet_alpha: float = Field(0.3, gt=0, description="concentration of `dirichlet`; smaller is more uneven")
    cache_gb: float = Field(50.0, ge=0, description="gigabytes of a source's decoded images that are kept in `cache`")

    @property
    def makes_devices(self) -> bool:
        """Whether the partitioner says how many devices there are: one for each id, group of ids, or size given."""
        own = ("natural", "NaturalIdPartitioner", "GroupedNaturalIdPartitioner")
        return self.partition in (*own, "SizePartitioner", "InnerDirichletPartitioner")

    @property
    def divided_by(self) -> Argument:
        """What the private images are divided by: ``label``, ``device``, or what `partition-args` says."""
        natural = self.partition in ("natural", "NaturalIdPartitioner", "GroupedNaturalIdPartitioner")
        return parse_args(self.partition_args).get("partition_by", "device" if natural else "label")

    @property
    def ids(self) -> str:
        """The name under which `source` holds the ids of devices; empty: they are not asked for."""
        return self.device_column or ("device" if self.divided_by == "device" else "")

    @model_validator(mode="after")
    def _options_go_together(self) -> DataOptions:
        try:
            given = parse_args(self.partition_args)
        except ValueError as error:
            raise ValueError(f"partition-args={error}") from None
        if given and not self.partition.endswith("Partitioner"):
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
    """The devices: their number, what each can do, and who takes part in a round. Lists are assigned cyclically."""

    count: Number = Field(0, description="number of devices; 0: one for each node")
    budgets: Shares = Field((0.3, 0.5, 0.7), description="largest share of the dense model's MACs a device can run")
    ranks: Counts = Field((4, 6, 8), description="LoRA rank of the devices with the budget at the same position")
    profiles: str = Field("", description=f"TOML file that replaces budgets and ranks, or {', '.join(PROFILE_SETS)}")
    participation: Share = Field(1.0, description="share of the available devices that are sampled in a round")
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
        "", description="empty: train from scratch; `hub`: the pretrained ones; or a file, .safetensors or .pth"
    )
    head: Literal["train", "rows", "rows+train", "new", "prototypes"] = Field(
        "train",
        description="classifier: trained on the public pool, taken from rows of the head in `weights`, or both; `new`: "
        "of the classes that devices report, from 0 or `head-rows`; `prototypes`: from the means of a device's classes",
    )
    head_rows: str = Field(
        "", description="JSON file, class name -> row of the head in `weights`, for `rows` and `new`"
    )
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
    pool_sample: Count = Field(20_000, description="most public images that PCA and their mixture are fitted on")
    refresh: Number = Field(0, description="rounds after which mixtures are fitted again (data.changing); 0: never")
    min_support: float = Field(5.0, ge=2, description="smallest number of images that an uploaded component describes")
    clip: float = Field(0.0, ge=0, description="norm to which a device's descriptors are clipped; 0: no clipping")
    noise: float = Field(0.0, ge=0, description="noise on a device's moments, over their sensitivity; docs/privacy.md")

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
        "tap+", description="criterion that chooses the units: a name of `tapfl criteria`, or module:name of a plugin"
    )
    ratio: Literal["auto", "adaptive", "uniform"] = Field(
        "auto", description="layer weights: softmax(KL/tau), or all equal; auto: the criterion's choice"
    )
    tau: float = Field(5.82, gt=0, description="temperature τ in w = softmax(KL/τ), for ratio=adaptive")
    basis: Literal["auto", "none", "canonical"] = Field(
        "auto", description="basis of the attention heads before scoring; auto: the criterion's choice"
    )
    compensation: Literal["auto", "none", "one-pass", "sequential", "reconstruction"] = Field(
        "auto",
        description="how kept units are refitted to replace the removed ones; `reconstruction`: `sequential`, and "
        "gradient steps after each layer; auto: the criterion's choice",
    )
    compensation_rows: Literal["auto", "even", "sensitivity"] = Field(
        "auto", description="tokens in compensation: equal, or by Fisher sensitivity; auto: the criterion's choice"
    )
    compensation_steps: Count = Field(40, description="gradient steps a layer, for compensation=reconstruction")
    compensation_learning_rate: float = Field(1e-3, gt=0, le=RATE, description="their learning rate (Adam, constant)")
    align: Number = Field(0, description="widths are multiples of this; 0: 8, or 4 if heads have under 32 dims")
    floor: float = Field(0.05, ge=0, lt=1, description="smallest share of its units that a layer keeps")
    unit_shape: Literal["head-dims", "heads", "both"] = Field(
        "head-dims", description="attention units: as many dims of every head, whole heads, or the better of both"
    )
    tokens: Literal["none", "merge", "auto"] = Field(
        "none", description="similar tokens of ViT and DeiT merge; auto: as many as cost least on the metric set"
    )
    token_share: float = Field(
        0.8, ge=0.5, le=1, description="tokens that stay, on average over the FFNs of all blocks, for tokens=merge"
    )
    ffn_terms: TermWeights = Field(
        (0.1, 0.1, 0.8), description="weights of relevance, 1 - redundancy and activeness in the FFN score of `tap`"
    )
    attention_terms: TermWeights = Field(
        (0.8, 0.1, 0.1), description="weights of the same three terms in the attention score of `tap`"
    )
    probe: Literal["own", "pool", "auto"] = Field(
        "own",
        description="where layers, and units if that is exact, are measured: on the device's metric set; on the pool, "
        "once for all devices; auto: the pool, if they have more images than it times the budgets",
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
    recovery_steps: Number = Field(100, description="gradient steps, less those of the criterion's own training")
    recovery_batch: Count = Field(32, description="images in a minibatch of recovery")
    recovery_learning_rate: float = Field(1e-4, gt=0, le=RATE, description="learning rate of recovery (Adam, constant)")
    recovery_size: Number = Field(0, description="public images used for recovery; 0: the metric set")
    recovery_held_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of these that only judge: the weights of least loss on them stay; 0: the last",
    )
