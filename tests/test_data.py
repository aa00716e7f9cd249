"""Sources, partitions and transforms: which device has which image, and what is refused before any training."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tapfl.config import DataOptions
from tapfl.data.federated import DeviceSplit, check_pool, open_pool, open_private, partition, split_public
from tapfl.data.images import ImageSet
from tapfl.data.sources import load_images
from tapfl.data.transform import Transform
from tapfl.errors import DataError

LABELS = np.random.default_rng(0).integers(0, 6, 300)
PARTITIONS = ["pathological", "dirichlet", "iid", "shard"]
GREY = Transform((8, 8), 1, (0.5,), (0.5,))


def rgb(*size: int) -> Transform:
    return Transform((size[0], size[-1]), 3, (0.5,) * 3, (0.5,) * 3)


def options(**values: object) -> DataOptions:
    return DataOptions.model_validate(values)


# ---------------------------------------------------------------- partitions


def held(splits: list[DeviceSplit]) -> np.ndarray:
    return np.concatenate([part for split in splits for part in (split.train, split.test)])


@pytest.mark.parametrize("name", PARTITIONS)
def test_every_image_is_on_exactly_one_device(name: str) -> None:
    splits = partition(LABELS, options(partition=name, test_share=0.25), 5, seed=0)
    assert len(splits) == 5
    images = held(splits)
    assert len(images) == len(set(images.tolist()))
    assert sorted(images.tolist()) == list(range(300))
    for split in splits:
        assert len(split.train) >= 8
        assert len(split.test) >= 2
        assert len(split.test) / (len(split.test) + len(split.train)) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_same_seed_gives_the_same_split_and_another_seed_another(name: str) -> None:
    first, again, other = (partition(LABELS, options(partition=name), 4, seed) for seed in (7, 7, 8))
    for left, right in zip(first, again, strict=True):
        np.testing.assert_array_equal(left.train, right.train)
        np.testing.assert_array_equal(left.test, right.test)
    assert any(not np.array_equal(left.train, right.train) for left, right in zip(first, other, strict=True))


def test_pathological_devices_hold_that_many_classes() -> None:
    for split in partition(LABELS, options(partition="pathological", classes_per_device=2), 6, seed=0):
        assert len(np.unique(LABELS[split.train])) == 2
        assert set(LABELS[split.test]) == set(LABELS[split.train])


def test_blocks_of_classes_are_disjoint_and_in_order() -> None:
    splits = partition(LABELS, options(partition="class-blocks", classes_per_device=2), 3, seed=0)
    assert [set(LABELS[split.train]) for split in splits] == [{0, 1}, {2, 3}, {4, 5}]
    assert sorted(held(splits).tolist()) == list(range(300))


def test_more_blocks_of_classes_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match=r"classes-per-device = 2: 6 classes make at most 3 disjoint blocks for 4"):
        partition(LABELS, options(partition="class-blocks", classes_per_device=2), 4, seed=0)


def test_a_device_s_test_part_has_its_classes_in_their_shares() -> None:
    (split,) = partition(LABELS, options(partition="iid", test_share=0.3), 1, seed=0)
    for label in range(6):
        assert abs((LABELS[split.test] == label).sum() - 0.3 * (label == LABELS).sum()) <= 1


@pytest.mark.parametrize("name", PARTITIONS)
def test_validation_does_not_touch_the_test_part(name: str) -> None:
    tested = partition(LABELS, options(partition=name), 5, seed=0)
    validated = partition(LABELS, options(partition=name, evaluate="validation"), 5, seed=0)
    for reported, chosen_by in zip(tested, validated, strict=True):
        assert sorted([*chosen_by.train, *chosen_by.test]) == sorted(reported.train)
        assert len(chosen_by.test) == pytest.approx(0.3 * len(reported.train), abs=1)


@pytest.mark.parametrize("name", PARTITIONS)
def test_more_devices_than_images_can_serve_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"devices\.count = 31: 300 private images allow at most 30 devices"):
        partition(LABELS, options(partition=name), 31, seed=0)


def test_more_classes_a_device_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.partition = 'pathological' for 3 devices: "):
        partition(LABELS, options(partition="pathological", classes_per_device=7), 3, seed=0)


def test_more_shards_than_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"shards-per-device = 100: 300 private images make at most 60 shards for each"):
        partition(LABELS, options(partition="shard", shards_per_device=100), 5, seed=0)


def test_a_device_with_too_few_images_is_refused_with_advice() -> None:
    with pytest.raises(DataError, match=r"device 0 would get 0 training .* it needs 8 and 2: fewer devices"):
        partition(LABELS[:40], options(partition="iid", test_share=0.99), 2, seed=0)


@given(counts=st.lists(st.integers(4, 30), min_size=1, max_size=8), share=st.floats(0.4, 0.7), seed=st.integers(0, 100))
def test_the_pool_has_its_share_of_every_class(counts: list[int], share: float, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    pool, private = split_public(labels, share, seed)
    assert sorted([*pool.tolist(), *private.tolist()]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        assert (labels[pool] == label).sum() == round(share * count)


@pytest.mark.parametrize(("images", "share"), [(2, 0.5), (3, 0.9)], ids=["pool", "devices"])
def test_a_class_with_too_few_images_for_both_sides_is_refused(images: int, share: float) -> None:
    labels = np.array([0] * 20 + [4] * images)
    with pytest.raises(DataError, match=rf"class 4 has {images} images: too few for data\.public-share = {share}"):
        split_public(labels, share, 0)
    with pytest.raises(DataError, match=rf"class dog has {images} images"):
        split_public(labels, share, 0, ("ant", "bee", "cat", "cow", "dog"))


# ---------------------------------------------------------------- sources


def test_the_digits_are_embedded(tmp_path: Path) -> None:
    digits = load_images("digits", GREY, tmp_path)
    assert digits.read().shape == (1797, 8, 8, 1)
    assert digits.read().dtype == np.uint8
    assert digits.read().max() == 255
    assert digits.classes == tuple("0123456789")
    assert not list(tmp_path.iterdir())


def npz(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)
    return str(path)


IMAGES = np.arange(4 * 5 * 5, dtype=np.uint8).reshape(4, 5, 5)


def test_npz_with_and_without_names_and_channels(tmp_path: Path) -> None:
    plain = load_images(npz(tmp_path / "a.npz", images=IMAGES, labels=np.array([0, 2, 2, 0])), None, tmp_path)
    assert plain.read().shape == (4, 5, 5, 1)
    assert plain.labels.dtype == np.int64
    assert plain.classes == ("0", "1", "2")
    colour = np.stack([IMAGES] * 3, -1)
    named = load_images(
        npz(tmp_path / "b.npz", images=colour, labels=np.array([0, 1, 1, 0], np.uint8), classes=np.array(["a", "b"])),
        None,
        tmp_path,
    )
    assert named.read().shape == (4, 5, 5, 3)
    assert named.classes == ("a", "b")
    part = named.subset(np.array([3, 1]))
    np.testing.assert_array_equal(part.read(), colour[[3, 1]])
    assert part.labels.tolist() == [0, 1]
    assert len(part) == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "has no array `labels`; accepted: `images` and `labels`, has images"),
        ({"images": IMAGES, "labels": np.array([0, 1, None, 1], object)}, "needs plain arrays"),
        ({"images": np.array([IMAGES[0], "x"], object), "labels": np.array([0, 1])}, "needs plain arrays"),
        ({"images": IMAGES.astype(float), "labels": np.zeros(4, int)}, "must be uint8 or uint16 .* got float64"),
        ({"images": np.stack([IMAGES] * 2, -1), "labels": np.zeros(4, int)}, r"got uint8 \(4, 5, 5, 2\)"),
        ({"images": IMAGES[0], "labels": np.zeros(5, int)}, r"got uint8 \(5, 5\)"),
        ({"images": IMAGES, "labels": np.zeros(3, int)}, r"`labels` must be 4 integers, got int64 \(3,\)"),
        ({"images": IMAGES, "labels": np.zeros(4)}, "`labels` must be 4 integers, got float64"),
        ({"images": IMAGES[:0], "labels": np.zeros(0, int)}, "holds no images"),
        ({"images": IMAGES, "labels": np.array([0, -1, 0, 0])}, "`labels` must not be negative"),
        ({"images": IMAGES, "labels": np.array([0, 2, 0, 0]), "classes": np.array(["a", "b"])}, r"must lie in 0\.\.1"),
        ({"images": IMAGES, "labels": np.zeros(4, int), "classes": np.array("a")}, "must be a list of names"),
        ({"images": IMAGES, "labels": np.arange(4), "classes": np.arange(4)}, "must be a list of names, got int64"),
        (
            {"images": IMAGES, "labels": np.arange(4) * 10**9},
            r"must lie in 0\.\.65535 as no model has more .* 3000000000",
        ),
        (
            {"images": IMAGES, "labels": np.full(4, 2**64 - 1, np.uint64)},
            r"must lie in 0\.\.65535 .* 18446744073709551615",
        ),
        ({"images": IMAGES, "labels": np.zeros(4, bool)}, "`labels` must be 4 integers, got bool"),
        ({"images": IMAGES, "labels": np.eye(4, dtype=int)}, r"`labels` must be 4 integers, got int64 \(4, 4\)"),
        ({"images": IMAGES[:, :0], "labels": np.zeros(4, int)}, r"`images` must be .* got uint8 \(4, 0, 5, 1\)"),
        ({"images": IMAGES > 7, "labels": np.zeros(4, int)}, "`images` must be .* got bool"),
        (
            {"images": IMAGES, "labels": np.zeros(4, int), "classes": np.array(["a", "b", "a"])},
            "two classes .* name 'a'",
        ),
    ],
)
def test_an_invalid_npz_is_refused(arrays: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"bad.npz': .*{message}"):
        load_images(npz(tmp_path / "bad.npz", **arrays), None, tmp_path)


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "whole.npz"
    np.savez_compressed(
        file, images=np.random.default_rng(0).integers(0, 256, (9, 9, 9), np.uint8), labels=np.zeros(9, int)
    )
    whole = file.read_bytes()
    middle = len(whole) // 3
    one_array = tmp_path / "one.npy"
    np.save(one_array, IMAGES)
    for content in (
        b"",
        b"not a zip",
        whole[: len(whole) // 2],
        whole[:middle] + bytes(50) + whole[middle + 50 :],
        one_array.read_bytes(),
    ):
        file.write_bytes(content)
        said = "needs plain arrays" if zipfile.is_zipfile(file) else "is not an .npz file"
        with pytest.raises(DataError, match=rf"whole\.npz': {said}"):
            load_images(str(file), None, tmp_path)


@pytest.mark.parametrize("source", ["no/such/folder", "digit", "images.tar"])
def test_a_missing_source_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=f"'{source}': there is no such file or folder; accepted: digits, letters, a .npz"
    ):
        load_images(source, GREY, tmp_path)


def test_a_missing_npz_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npz': there is no such file"):
        load_images(str(tmp_path / "none.npz"), GREY, tmp_path)


# ---------------------------------------------------------------- both sides of a federation


def test_one_source_is_shared_out_between_pool_and_devices(tmp_path: Path) -> None:
    public = open_pool(options(public_share=0.4), GREY, 3, tmp_path)
    private = open_private(options(public_share=0.4), GREY, 3, tmp_path)
    check_pool(options(), public, private)
    assert len(public) + len(private) == 1797
    assert len(public) == pytest.approx(0.4 * 1797, abs=10)
    together = np.concatenate([public.read(), private.read()]).reshape(1797, -1)
    whole = load_images("digits", GREY, tmp_path).read().reshape(1797, -1)
    assert sorted(map(bytes, together)) == sorted(map(bytes, whole))


def test_a_second_source_is_the_pool_and_the_first_all_private(tmp_path: Path) -> None:
    file = npz(tmp_path / "pool.npz", images=IMAGES, labels=np.arange(4))
    assert open_pool(options(public=file), GREY, 0, tmp_path / "cache").shape == (4, 8, 8, 1)
    assert len(open_private(options(public=file), GREY, 0, tmp_path / "cache")) == 1797


def images_of(classes: tuple[str, ...], labels: list[int]) -> ImageSet:
    return ImageSet.of(np.zeros((len(labels), 8, 8, 1), np.uint8), np.array(labels), classes, f"{classes} {labels}")


@pytest.mark.parametrize(
    ("public", "message"),
    [
        (images_of(("a", "c"), [0, 1]), "differ in their classes: b, c"),
        (images_of(("b", "a"), [0, 1]), "differ in their classes: their order"),
        (images_of(("a", "b"), [0, 0]), "'elsewhere' has no image of b"),
        (images_of(("a", "b"), [0, 1]), "'elsewhere': has images of data.source, of which devices keep some"),
    ],
)
def test_an_unsuitable_pool_is_refused(public: ImageSet, message: str) -> None:
    private = images_of(("a", "b"), [0, 1])
    with pytest.raises(DataError, match=message):
        check_pool(options(public="elsewhere"), public, private)
    if public.fingerprint != private.fingerprint:
        check_pool(options(public="elsewhere"), public, private, other_classes=True)


def test_a_pool_of_images_inside_the_source_or_around_it_is_refused(tmp_path: Path) -> None:
    """By device, classes differ from those of the pool, so the fingerprints differ, too."""
    for folder in ("X/train/cat", "X/val/ada", "X/val of others"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "X" / "val" / "ada")
    images, others = images_of(("a",), [0]), images_of(("b",), [0])

    def checked(source: str, public: str) -> None:
        given = options(source=str(tmp_path / source), public=str(tmp_path / public))
        check_pool(given, images, others, other_classes=True)

    for source, public in (("X/val", "X/val/ada"), ("X/val", "X/val"), ("X/train", "X"), ("X/val", "link")):
        with pytest.raises(DataError, match=r"has images of data\.source, of which devices keep some"):
            checked(source, public)
    checked("X/train", "X/val")
    checked("X/val", "X/val of others")
    check_pool(options(public=str(tmp_path)), images, others, other_classes=True)


# ---------------------------------------------------------------- transforms


def test_bytes_are_normalised() -> None:
    transform = Transform((2, 2), 3, (0.5, 0.0, 0.0), (0.5, 1.0, 2.0))
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, 0, 1] = 255
    x = transform(image)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    torch.testing.assert_close(x[0, :, 0, 1], torch.tensor([1.0, 1.0, 0.5]))
    torch.testing.assert_close(x[0, :, 1, 0], torch.tensor([-1.0, 0.0, 0.0]))


def test_images_of_another_size_or_number_of_channels_are_refused() -> None:
    with pytest.raises(DataError, match=r"images are 8 × 8 with 3 channels, the backbone takes 8 × 8 with 1: load_im"):
        GREY(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"images are 8 × 9 with 1 channels, the backbone takes 8 × 8 with 1"):
        GREY(np.zeros((1, 8, 9, 1), np.uint8))


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_batches_are_all_the_images_in_order(batch: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    batches = GREY.batches(ImageSet.of(images, np.zeros(7, int), "a"), batch)
    for _ in range(2):  # from the start, each time
        parts = list(batches)
        assert all(len(part) == batch for part in parts[:-1]) and len(parts) == -(-7 // batch)
        torch.testing.assert_close(torch.cat(parts), GREY(images))
