"""Sources, partitions and transforms: who holds which image, and what is refused before anything is trained."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tapfl.config import DataOptions
from tapfl.data import sources
from tapfl.data.federated import DeviceSplit, check_classes, open_pool, open_private, partition, split_public
from tapfl.data.sources import ImageSet, load_images
from tapfl.data.transform import Transform
from tapfl.errors import DataError

LABELS = np.random.default_rng(0).integers(0, 6, 300)
PARTITIONS = ["pathological", "dirichlet", "iid", "shard"]
GREY = Transform((8, 8), 1, (0.5,), (0.5,))


def options(**values: object) -> DataOptions:
    return DataOptions.model_validate(values)


# ---------------------------------------------------------------- partitions


def held(splits: list[DeviceSplit]) -> np.ndarray:
    return np.concatenate([part for split in splits for part in (split.train, split.test)])


@pytest.mark.parametrize("name", PARTITIONS)
def test_no_image_is_held_twice_and_all_are_held(name: str) -> None:
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
    with pytest.raises(DataError, match=r"devices\.count = 31: 300 private images serve at most 30 devices"):
        partition(LABELS, options(partition=name), 31, seed=0)


def test_more_classes_a_device_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.partition = 'pathological' for 3 devices: "):
        partition(LABELS, options(partition="pathological", classes_per_device=7), 3, seed=0)


def test_more_shards_than_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"shards-per-device = 100: 300 private images make at most 60 shards for each"):
        partition(LABELS, options(partition="shard", shards_per_device=100), 5, seed=0)


def test_a_device_that_would_get_too_few_is_refused_with_what_can_be_done() -> None:
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


# ---------------------------------------------------------------- sources


def test_the_digits_are_embedded(tmp_path: Path) -> None:
    digits = load_images("digits", 0, tmp_path)
    assert digits.images.shape == (1797, 8, 8, 1)
    assert digits.images.dtype == np.uint8
    assert digits.images.max() == 255
    assert digits.classes == tuple("0123456789")
    assert not list(tmp_path.iterdir())


def npz(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)
    return str(path)


IMAGES = np.arange(4 * 5 * 5, dtype=np.uint8).reshape(4, 5, 5)


def test_npz_with_and_without_names_and_channels(tmp_path: Path) -> None:
    plain = load_images(npz(tmp_path / "a.npz", images=IMAGES, labels=np.array([0, 2, 2, 0])), 0, tmp_path)
    assert plain.images.shape == (4, 5, 5, 1)
    assert plain.labels.dtype == np.int64
    assert plain.classes == ("0", "1", "2")
    colour = np.stack([IMAGES] * 3, -1)
    named = load_images(
        npz(tmp_path / "b.npz", images=colour, labels=np.array([0, 1, 1, 0], np.uint8), classes=np.array(["a", "b"])),
        0,
        tmp_path,
    )
    assert named.images.shape == (4, 5, 5, 3)
    assert named.classes == ("a", "b")
    part = named.subset(np.array([3, 1]))
    np.testing.assert_array_equal(part.images, colour[[3, 1]])
    assert part.labels.tolist() == [0, 1]
    assert len(part) == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "needs plain arrays `images` and `labels`"),
        ({"images": IMAGES, "labels": np.array([0, 1, None, 1], object)}, "needs plain arrays"),
        ({"images": np.array([IMAGES[0], "x"], object), "labels": np.array([0, 1])}, "needs plain arrays"),
        ({"images": IMAGES.astype(float), "labels": np.zeros(4, int)}, "must be uint8 .* got float64"),
        ({"images": np.stack([IMAGES] * 2, -1), "labels": np.zeros(4, int)}, r"got uint8 \(4, 5, 5, 2\)"),
        ({"images": IMAGES[0], "labels": np.zeros(5, int)}, r"got uint8 \(5, 5\)"),
        ({"images": IMAGES, "labels": np.zeros(3, int)}, r"`labels` must be 4 integers, got int64 \(3,\)"),
        ({"images": IMAGES, "labels": np.zeros(4)}, "`labels` must be 4 integers, got float64"),
        ({"images": IMAGES[:0], "labels": np.zeros(0, int)}, "holds no images"),
        ({"images": IMAGES, "labels": np.array([0, -1, 0, 0])}, "`labels` must not be negative"),
        ({"images": IMAGES, "labels": np.array([0, 2, 0, 0]), "classes": np.array(["a", "b"])}, r"must lie in 0\.\.1"),
        ({"images": IMAGES, "labels": np.zeros(4, int), "classes": np.array("a")}, "needs plain arrays"),
    ],
)
def test_an_npz_that_will_not_do_is_refused(arrays: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"bad.npz': .*{message}"):
        load_images(npz(tmp_path / "bad.npz", **arrays), 0, tmp_path)


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
        with pytest.raises(DataError, match=r"whole\.npz"):
            load_images(str(file), 0, tmp_path)


def write_image(path: Path, width: int, height: int, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; one keeps its images a folder deeper, as Tiny-ImageNet does."""
    root = tmp_path / "images"
    write_image(root / "cat" / "1.png", 12, 8, (200, 0, 0))
    write_image(root / "cat" / "2.png", 8, 20, (100, 0, 0))
    write_image(root / "ant" / "deep" / "1.PNG", 8, 8, (0, 0, 50))
    (root / "ant" / "notes.txt").write_text("not an image")
    return root


def test_an_image_folder(folder: Path, tmp_path: Path) -> None:
    found = load_images(str(folder), 6, tmp_path / "cache")
    assert found.classes == ("ant", "cat")
    assert found.labels.tolist() == [0, 1, 1]
    assert found.images.shape == (3, 6, 6, 3)
    assert found.images.dtype == np.uint8
    assert found.images[:, 3, 3].tolist() == [[0, 0, 50], [200, 0, 0], [100, 0, 0]]


def test_the_validation_part_of_tiny_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "val"
    for index, level in enumerate((10, 20, 30)):
        write_image(root / "images" / f"val_{index}.png", 8, 8, (level, 0, 0))
    annotations = root / "val_annotations.txt"
    annotations.write_text("val_0.png\tn02\t0\t0\t7\t7\nval_1.png\tn01\t0\t0\t7\t7\nval_2.png\tn02\t0\t0\t7\t7\n")
    found = load_images(str(root), 8, tmp_path / "cache")
    assert found.classes == ("n01", "n02") and found.labels.tolist() == [0, 1, 1]
    assert found.images[:, 0, 0, 0].tolist() == [20, 10, 30]
    annotations.write_text("val_9.png\tn02\n")
    with pytest.raises(DataError, match=r"val_annotations.txt': line 1 names no image and class: 'val_9.png"):
        load_images(str(root), 8, tmp_path / "cache")


def test_a_wide_image_is_scaled_and_cropped_in_its_centre(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "in" / "a" / "wide.png")
    assert load_images(str(tmp_path / "in"), 10, tmp_path).images.min() == 255


def test_the_second_load_decodes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_images(str(folder), 6, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_decode", lambda *_: pytest.fail("decoded again"))
        second = load_images(str(folder), 6, tmp_path / "cache")
    np.testing.assert_array_equal(first.images, second.images)
    assert load_images(str(folder), 4, tmp_path / "cache").images.shape == (
        3,
        4,
        4,
        3,
    )  # another size is another content
    write_image(folder / "cat" / "2.png", 8, 21, (7, 7, 7))
    assert load_images(str(folder), 6, tmp_path / "cache").images[2, 3, 3].tolist() == [7, 7, 7]
    assert not list((tmp_path / "cache").rglob("*.tmp*"))


def test_an_image_that_cannot_be_decoded_is_named(folder: Path, tmp_path: Path) -> None:
    broken = folder / "cat" / "2.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cat/2\.png.*cannot be decoded"):
        load_images(str(folder), 6, tmp_path / "cache")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no images; one folder of images a class is expected"):
        load_images(str(tmp_path / "empty"), 6, tmp_path)


@pytest.mark.parametrize("name", ["red\x1b[31m", "two\nlines", "tab\t", b"\xff".decode("utf-8", "surrogateescape")])
def test_a_class_whose_name_cannot_be_shown_is_refused(name: str, tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "ant" / "1.png", 8, 8, (1, 2, 3))
    write_image(tmp_path / "in" / name / "2.png", 8, 8, (1, 2, 3))
    with pytest.raises(DataError, match=r"in': class '.*\\.*' has characters that cannot be shown"):
        load_images(str(tmp_path / "in"), 6, tmp_path)


@pytest.mark.parametrize("source", ["no/such/folder", "digit", "images.tar"])
def test_a_source_that_is_not_there_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"'{source}': there is no such file or folder; accepted: digits, a .npz"):
        load_images(source, 8, tmp_path)


def test_an_npz_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npz': cannot be read"):
        load_images(str(tmp_path / "none.npz"), 8, tmp_path)


# ---------------------------------------------------------------- both sides of a federation


def test_one_source_is_shared_out_between_pool_and_devices(tmp_path: Path) -> None:
    public = open_pool(options(public_share=0.4), GREY, 3, tmp_path)
    private = open_private(options(public_share=0.4), GREY, 3, tmp_path)
    check_classes(options(), public, private)
    assert len(public) + len(private) == 1797
    assert len(public) == pytest.approx(0.4 * 1797, abs=10)
    together = np.concatenate([public.images, private.images]).reshape(1797, -1)
    whole = load_images("digits", 0, tmp_path).images.reshape(1797, -1)
    assert sorted(map(bytes, together)) == sorted(map(bytes, whole))


def test_a_second_source_is_the_pool_and_the_first_all_private(folder: Path, tmp_path: Path) -> None:
    wanted = options(public=str(folder), image_size=5)
    assert open_pool(wanted, GREY, 0, tmp_path / "cache").images.shape == (3, 5, 5, 3)
    assert len(open_private(wanted, GREY, 0, tmp_path / "cache")) == 1797


def images_of(classes: tuple[str, ...], labels: list[int]) -> ImageSet:
    return ImageSet(np.zeros((len(labels), 8, 8, 1), np.uint8), np.array(labels), classes)


@pytest.mark.parametrize(
    ("public", "message"),
    [
        (images_of(("a", "c"), [0, 1]), "differ in their classes: b, c"),
        (images_of(("b", "a"), [0, 1]), "differ in their classes: their order"),
        (images_of(("a", "b"), [0, 0]), "'elsewhere' has no image of b"),
    ],
)
def test_a_pool_of_other_classes_is_refused(public: ImageSet, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_classes(options(public="elsewhere"), public, images_of(("a", "b"), [0, 1]))


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


def test_grey_is_spread_to_three_channels_and_colour_not_squeezed_to_one() -> None:
    x = Transform((4, 4), 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(np.full((2, 4, 4, 1), 51, np.uint8))
    torch.testing.assert_close(x, torch.full((2, 3, 4, 4), 0.2))
    with pytest.raises(
        DataError, match=r"images have 3 channels, the backbone takes 1: give .* in_chans in model\.args"
    ):
        GREY(np.zeros((1, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_batches_are_all_the_images_in_order(batch: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    batches = GREY.batches(images, batch)
    for _ in range(2):  # from the start, each time
        parts = list(batches)
        assert all(len(part) == batch for part in parts[:-1]) and len(parts) == -(-7 // batch)
        torch.testing.assert_close(torch.cat(parts), GREY(images))


@pytest.mark.parametrize(("side", "size"), [(8, (32, 32)), (40, (16, 16)), (8, (4, 6))])
def test_images_of_another_size_are_resized_within_their_range(side: int, size: tuple[int, int]) -> None:
    checks = (np.indices((side, side)).sum(0) // 2 % 2 * 255).astype(np.uint8)[None, ..., None]
    x = Transform(size, 1, (0.0,), (1.0,))(checks)
    assert x.shape == (1, 1, *size)
    assert x.min() >= 0
    assert x.max() <= 1
    assert float(x.mean()) == pytest.approx(0.5, abs=0.1)


def test_memory_mapped_images_are_read_without_complaint_or_change(folder: Path, tmp_path: Path) -> None:
    images = load_images(str(folder), 8, tmp_path / "cache").images
    before = images.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Transform((8, 8), 3, (0.5,) * 3, (0.5,) * 3)(images)
    np.testing.assert_array_equal(images, before)
