"""Partitions with the names of flwr-datasets, and natural ones by folder, array or column of device ids."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import pytest
from flwr_datasets import partitioner as flwr
from PIL import Image

from tapfl.config import DataOptions, RunConfig
from tapfl.config.round_zero import UNUSED, Partition
from tapfl.data.contents import contents
from tapfl.data.federated import DeviceSplit, open_pool, open_private, partition
from tapfl.data.images import ImageSet
from tapfl.data.sources import load_images
from tapfl.data.transform import Transform
from tapfl.errors import ConfigError, DataError

LABELS = np.random.default_rng(0).integers(0, 6, 300)
OWNERS = np.random.default_rng(1).integers(0, 5, 300)
GREY = Transform((8, 8), 1, (0.5,), (0.5,))
TABLE = ";".join(["1/2/3/4"] * 6)  # six classes, each on four devices; six devices with four classes each
# class name -> arguments, and the number of devices
BY_NAME: dict[str, tuple[str, int]] = {
    "IidPartitioner": ("", 5),
    "LinearPartitioner": ("", 4),
    "SquarePartitioner": ("", 3),
    "ExponentialPartitioner": ("", 3),
    "SizePartitioner": ("partition_sizes=40/60/100", 3),
    "DirichletPartitioner": ("alpha=0.5,self_balancing=True", 5),
    "InnerDirichletPartitioner": ("partition_sizes=50/50/80,alpha=1", 3),
    "PathologicalPartitioner": ("num_classes_per_partition=2,class_assignment_mode=first-deterministic", 6),
    "ShardPartitioner": ("shard_size=20,keep_incomplete_shard=True", 5),
    "DistributionPartitioner": (
        f"distribution_array={TABLE},num_unique_labels_per_partition=4,preassigned_num_samples_per_label=2",
        6,
    ),
    "ContinuousPartitioner": ("strictness=0.8", 5),
    "NaturalIdPartitioner": ("", 5),
    "GroupedNaturalIdPartitioner": ("group_size=2,mode=allow-bigger", 2),
}


def options(**values: object) -> DataOptions:
    return RunConfig.from_flat({f"data.{name.replace('_', '-')}": value for name, value in values.items()}).data


def held(splits: list[DeviceSplit]) -> np.ndarray:
    return np.concatenate([part for split in splits for part in (split.train, split.test)])


def bits(splits: list[DeviceSplit]) -> str:
    parts = [part for split in splits for part in (split.train, split.test)]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:12]


@pytest.mark.parametrize(
    ("short", "want"),
    [
        ("pathological", "00604dc31167"),
        ("class-blocks", "e7e23f3d09e9"),
        ("dirichlet", "2e2a5b027b0d"),
        ("iid", "bda5b7b3f91e"),
        ("shard", "5b69fc5beb32"),
    ],
)
def test_short_names_give_the_same_partitions_as_before(short: str, want: str) -> None:
    splits = partition(LABELS, options(partition=short, classes_per_device=2), 3, 7)
    assert bits(splits) == want


def test_every_partitioner_of_the_library_has_a_name_here() -> None:
    theirs = set(flwr.__all__) - {"Partitioner"}
    assert {name for name in get_args(Partition) if name.endswith("Partitioner")} | UNUSED.keys() == theirs
    assert BY_NAME.keys() | UNUSED.keys() == theirs


@pytest.mark.parametrize("name", BY_NAME)
def test_a_class_name_with_its_arguments_can_be_used(name: str) -> None:
    args, devices = BY_NAME[name]
    given = options(partition=name, partition_args=args)
    splits = partition(LABELS, given, devices, 3, OWNERS)
    assert len(splits) == devices
    images = held(splits)
    assert len(set(images.tolist())) == len(images) > 150
    assert bits(partition(LABELS, given, devices, 3, OWNERS)) == bits(splits)
    if given.makes_devices:
        assert len(partition(LABELS, given, 0, 3, OWNERS)) == devices


def test_sizes_and_ids_are_as_given() -> None:
    sizes = partition(LABELS, options(partition="SizePartitioner", partition_args="partition_sizes=40/60/100"), 3, 0)
    assert [len(held([split])) for split in sizes] == [40, 60, 100]
    for name in ("natural", "NaturalIdPartitioner"):
        for i, split in enumerate(partition(LABELS, options(partition=name), 5, 0, OWNERS)):
            assert sorted(held([split])) == np.flatnonzero(i == OWNERS).tolist()
    pairs = partition(
        LABELS, options(partition="GroupedNaturalIdPartitioner", partition_args="group_size=3"), 2, 0, OWNERS
    )
    assert sorted(len(np.unique(OWNERS[held([split])])) for split in pairs) == [2, 3]


@pytest.mark.parametrize("name", UNUSED)
def test_what_cannot_divide_images_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.partition = '{name}': .*; accepted: the other"):
        options(partition=name)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("DirichletPartitioner", "alpha", r"data: partition-args='alpha': 'alpha' must have the form key=value"),
        ("dirichlet", "alpha=1", r"partition-args=alpha=1 are arguments of a class, but partition=dirichlet is a s"),
    ],
)
def test_arguments_in_another_form_are_refused(name: str, args: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(partition=name, partition_args=args)


@pytest.mark.parametrize(
    ("name", "args", "devices", "message"),
    [
        (
            "DirichletPartitioner",
            "alpha=x",
            4,
            r"'alpha=x': Dirichlet.* does not take this value; .*: whole numbers or n",
        ),
        ("DirichletPartitioner", "", 4, r"partition-args = '': missing 1 required positional argument: 'alpha'"),
        ("DirichletPartitioner", "alpha=-1.0", 4, r"alpha=-1.0': Alpha values should be strictly greater than zero"),
        ("DirichletPartitioner", "alpha=1,seed=3", 4, r"has no argument seed; accepted: alpha, min_partition_size"),
        ("IidPartitioner", "num_partitions=3", 4, r"has no argument num_partitions; accepted: none"),
        (
            "SizePartitioner",
            "partition_sizes=40/60",
            3,
            r"count = 3: .*'SizePartitioner' makes 2; accepted: 2",
        ),
        ("SizePartitioner", "partition_sizes=400/60", 2, r"for 2 devices: The sum of partition sizes"),
        (
            "PathologicalPartitioner",
            "num_classes_per_partition=2,class_assignment_mode=odd",
            4,
            "random or",
        ),
        ("ContinuousPartitioner", "strictness=2.0", 4, r"strictness` must be between 0 and 1"),
        ("ShardPartitioner", "", 4, r"for 4 devices: "),
        ("LinearPartitioner", "", 20, r"device 0 would get .* it needs 8 and 2"),
        ("natural", "", 4, r"devices\.count = 4: data\.partition = 'natural' makes 5; accepted: 5"),
        (
            "DirichletPartitioner",
            "alpha=1,partition_by=weather",
            4,
            r"'weather' .*accepted: device, label",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name: str, args: str, devices: int, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        partition(LABELS, options(partition=name, partition_args=args), devices, 0, OWNERS)
    assert "\n" not in str(refused.value)


def test_without_ids_nothing_is_divided_by_them() -> None:
    with pytest.raises(DataError, match="these images have no 'device' to partition by; accepted: label"):
        partition(LABELS, options(partition="GroupedNaturalIdPartitioner", partition_args="group_size=2"), 2, 0)
    with pytest.raises(DataError, match=r"'digits': has no device ids; \.npz, hf:NAME and folders can"):
        load_images("digits", GREY, ids="device")
    with pytest.raises(
        ConfigError, match="min-images=5 counts the images of each device id; accepted with it: partition=nat"
    ):
        options(min_images=5)


# ---------------------------------------------------------------- sources with ids of devices

PIXELS = np.random.default_rng(2).integers(0, 256, (60, 8, 8), np.uint8)
CLASSES = np.arange(60) % 2
WRITERS = np.repeat(["ada", "zoë", "bob"], [30, 20, 10])


def as_npz(folder: Path) -> str:
    np.savez(folder / "a.npz", images=PIXELS, labels=CLASSES, classes=np.array(["cat", "dog"]), device=WRITERS)
    return str(folder / "a.npz")


def as_folders(folder: Path) -> str:
    for i, writer in enumerate(WRITERS):
        (place := folder / "users" / writer / ("cat", "dog")[CLASSES[i]]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[i]).save(place / f"{i:02d}.png")
    return str(folder / "users")


def as_table(folder: Path) -> str:
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]), device=datasets.Value("string")
    )
    rows = {"image": [Image.fromarray(image) for image in PIXELS], "label": CLASSES.tolist(), "device": list(WRITERS)}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(folder / "table"))
    return f"hf:{folder / 'table'}"


@pytest.mark.parametrize("made", [as_npz, as_folders, as_table])
def test_one_device_per_id(made: Any, tmp_path: Path) -> None:
    source = made(tmp_path)
    given = options(source=source, public=source, partition="natural", test_share=0.2)
    images = open_private(given, GREY, 0, tmp_path)
    assert (images.ids, images.classes) == (("ada", "bob", "zoë"), ("cat", "dog"))
    assert "60 images of 2 classes from 3 devices" in images.described()
    splits = partition(images.labels, given, 3, 0, images.owners)
    for writer, split in zip(images.ids, splits, strict=True):
        mine = images.read(held([split]))[..., 0]
        assert sorted(map(bytes, mine)) == sorted(map(bytes, PIXELS[writer == WRITERS]))
        assert images.subset(split.test).owner_names == (writer,)
    (fingerprint,) = contents(RunConfig(data=given), ["data.source"]).values()
    assert fingerprint == images.fingerprint


def test_devices_with_few_images_are_left_out_if_that_is_asked_for(tmp_path: Path) -> None:
    source = as_npz(tmp_path)
    given = options(source=source, public=source, partition="natural", min_images=15)
    images = open_private(given, GREY, 0, tmp_path)
    assert images.ids == ("ada", "zoë") and len(images) == 50
    assert "left out: images of devices with fewer than 15 (data.min-images): 10" in images.described()
    assert [len(held([split])) for split in partition(images.labels, given, 2, 0, images.owners)] == [30, 20]
    with pytest.raises(DataError, match=r"min-images = 31: the largest of 3 devices has 30 private images; accepted"):
        open_private(given.model_copy(update={"min_images": 31}), GREY, 0, tmp_path)


def test_the_pool_takes_its_share_of_every_device(tmp_path: Path) -> None:
    given = options(source=as_npz(tmp_path), public_share=0.5, partition="natural")
    images = open_private(given, GREY, 0, tmp_path)
    assert len(images) == 30 and images.ids == ("ada", "bob", "zoë")


def ids(images: ImageSet) -> list[str]:
    return [images.ids[i] for i in images.owners]  # type: ignore[union-attr]


def test_ids_may_be_numbers_and_have_another_name(tmp_path: Path) -> None:
    numbers = np.where(WRITERS == "ada", 10, np.where(WRITERS == "bob", 9, -3))
    np.savez(tmp_path / "b.npz", images=PIXELS, labels=CLASSES, writer=numbers)
    images = load_images(str(tmp_path / "b.npz"), GREY, tmp_path, ids="writer")
    assert images.ids == ("-3", "9", "10") and ids(images) == list(map(str, numbers))
    assert options(device_column="writer").ids == "writer" and options().ids == ""


def as_table_with_named_ids(folder: Path, first: int | None = 1, **columns: Any) -> str:
    """Writes a table whose ids are a ClassLabel column that comes before the classes."""
    features = {"image": datasets.Image(), "writer": datasets.ClassLabel(names=["zoë", "ada", "bob"])} | columns
    numbers = [first, *(["zoë", "ada", "bob"].index(writer) for writer in WRITERS[1:])]
    rows = {"image": [Image.fromarray(image) for image in PIXELS], "writer": numbers, "label": CLASSES.tolist()}
    given = {name: rows[name] for name in features}
    datasets.Dataset.from_dict(given, datasets.Features(features)).save_to_disk(str(folder / "named"))
    return f"hf:{folder / 'named'}"


def test_a_column_of_ids_is_not_taken_for_the_classes(tmp_path: Path) -> None:
    source = as_table_with_named_ids(tmp_path, label=datasets.ClassLabel(names=["cat", "dog"]))
    given = options(source=source, public=source, partition="natural", device_column="writer")
    images = open_private(given, GREY, 0, tmp_path)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == CLASSES.tolist() and not images.left_out
    assert images.ids == ("ada", "bob", "zoë") and ids(images) == list(WRITERS)
    assert open_pool(given, GREY, 0, tmp_path).classes == ("cat", "dog")
    source = as_table_with_named_ids(tmp_path / "alone")
    with pytest.raises(DataError, match=r"one of type ClassLabel .* besides 'writer' of device ids, has image"):
        load_images(source, GREY, tmp_path, ids="writer")
    for i, missing in enumerate([None, -1]):
        source = as_table_with_named_ids(tmp_path / str(i), missing, label=datasets.ClassLabel(names=["cat", "dog"]))
        with pytest.raises(DataError, match="device id '' is empty"):
            load_images(source, GREY, tmp_path, ids="writer")


def test_invalid_ids_are_refused(tmp_path: Path) -> None:
    def refused(message: str, **arrays: Any) -> None:
        np.savez(tmp_path / "bad.npz", images=PIXELS, labels=CLASSES, **arrays)
        with pytest.raises(DataError, match=message):
            load_images(str(tmp_path / "bad.npz"), GREY, tmp_path, ids="device")

    refused("has no array `device`; accepted: `images` and `labels` and `device`, has images, labels")
    refused("device ids must be 60 texts or integers, got float64", device=np.zeros(60))
    refused("device ids must be 60 texts or integers, got int64 .59,.", device=np.zeros(59, int))
    refused("device id '' is empty or has characters", device=np.repeat(["", "b"], 30))
    refused("two device ids differ only in their Unicode form", device=np.repeat(["zo\u00eb", "zoe\u0308"], 30))
    refused("device ids are not UTF-8", device=np.array([b"M\xfcller"] * 60))
    with pytest.raises(DataError, match=r"has no column 'writer' of device ids .*; has image, label, device"):
        load_images(as_table(tmp_path), GREY, tmp_path, ids="writer")
    (tmp_path / "flat" / "ada").mkdir(parents=True)
    Image.fromarray(PIXELS[0]).save(tmp_path / "flat" / "ada" / "1.png")
    with pytest.raises(DataError, match="holds no images; one folder per device with one folder of images"):
        load_images(str(tmp_path / "flat"), GREY, tmp_path, ids="device")
