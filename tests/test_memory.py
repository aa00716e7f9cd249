"""Images that are read on demand: views, partial caches of decoded images, and sources larger than memory."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from strategies.round_zero import pool_of
from tapfl.config import DataOptions, ModelOptions, RunConfig
from tapfl.data import decoded, federated, folders
from tapfl.data.decoded import DecodedCache, DecodedImages, ahead
from tapfl.data.federated import DeviceSplit, kept_partition, partition
from tapfl.data.folders import Names, list_images
from tapfl.data.images import ImageSet
from tapfl.data.sources import load_images
from tapfl.data.transform import Transform
from tapfl.errors import DataError
from tapfl.models.backbone import build, spec_of
from tapfl.models.forward import transform_of
from tapfl.store import content_hash
from tapfl.summary import metric_set
from tapfl.summary.metric_set import cached_features

SIX = Transform((6, 6), 3, (0.5,) * 3, (0.25,) * 3)
BYTES = 6 * 6 * 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty images of noise in two classes."""
    noise = np.random.default_rng(0)
    for number in range(30):
        place = tmp_path / "images" / ("ant" if number < 10 else "bee")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(place / f"{number:02d}.png")
    return tmp_path / "images"


# ---------------------------------------------------------------- views


def test_a_subset_of_a_subset_reads_the_right_images() -> None:
    array = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    whole = ImageSet.of(array, np.arange(20) % 3, "abc", "source")
    first = whole.subset(np.array([19, 3, 8, 8, 0]))
    second = first.subset(np.array([2, 0, 4]))
    assert second.read().ravel().tolist() == [8, 19, 0] and second.read(np.array([1])).ravel().tolist() == [19]
    assert second.labels.tolist() == [8 % 3, 19 % 3, 0]
    assert second.images is whole.images and second.fingerprint == "source"
    assert second.shape == (3, 1, 1, 1)


def test_a_view_has_the_hash_of_the_bytes_it_shows() -> None:
    array = np.random.default_rng(0).integers(0, 256, (600, 4, 4, 1), dtype=np.uint8)
    chosen = np.random.default_rng(1).permutation(600)[:555]
    view = ImageSet.of(array, np.zeros(600, int), "a").subset(chosen)
    assert content_hash("x", *view.content()) == content_hash("x", array[chosen].tobytes())


def test_images_of_a_folder_are_named_without_being_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_images(str(folder), SIX, folder.parent / "cache")
    bounded = load_images(str(folder), SIX, folder.parent / "elsewhere", cache_gb=1e-6)
    monkeypatch.setattr(ImageSet, "read", lambda *_: pytest.fail("read"))
    some, others = np.arange(5), np.arange(1, 6)
    assert content_hash(*images.content()) == content_hash(*bounded.content())
    assert content_hash(*images.subset(some).content()) != content_hash(*images.subset(others).content())


# ---------------------------------------------------------------- the cache of decoded pictures


@pytest.mark.parametrize("cache_gb", [0.0, 1e-6, 2e-6, 30 * BYTES / 1e9])
def test_results_have_the_same_bits_for_any_cache_size(cache_gb: float, folder: Path) -> None:
    whole = load_images(str(folder), SIX, folder.parent / "whole").read()
    images = load_images(str(folder), SIX, folder.parent / "cache", cache_gb=cache_gb)
    order = np.random.default_rng(0).permutation(30)
    for _ in range(2):  # the second time some are read from the file
        np.testing.assert_array_equal(images.read(order), whole[order])
    again = load_images(str(folder), SIX, folder.parent / "cache", cache_gb=cache_gb)
    np.testing.assert_array_equal(again.read(), whole)
    (file,) = (folder.parent / "cache" / "images").iterdir()
    assert file.stat().st_size <= cache_gb * 1e9 + 1024  # a header


def counted(folder: Path, limit: float, count: int = 30) -> tuple[ImageSet, list[int]]:
    asked: list[int] = []

    def decode(position: int) -> np.ndarray:
        asked.append(position)
        return np.full((6, 6, 3), position % 100 + 100, np.uint8)

    images = DecodedCache(folder, limit).keep(DecodedImages(decode, count, (6, 6, 3), "k"), "x")
    return ImageSet(images, np.zeros(count, int), ("a",)), asked


def test_an_image_with_a_place_in_the_cache_is_decoded_once(tmp_path: Path) -> None:
    images, asked = counted(tmp_path, 10 * (BYTES + 4))
    asked.clear()
    images.read()
    assert sorted(asked) == list(range(30))
    asked.clear()
    assert images.read()[:, 0, 0, 0].tolist() == list(range(100, 130))
    assert asked == [i for i in range(30) if i % 3]  # every third has a place in the cache
    elsewhere, asked = counted(tmp_path, 10 * (BYTES + 4))  # another process
    elsewhere.read()
    assert asked == [i for i in range(30) if i % 3]


def test_a_partly_written_place_is_decoded_again(tmp_path: Path) -> None:
    images, asked = counted(tmp_path, 10 * (BYTES + 4))
    images.read()
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    asked.clear()
    assert images.read()[:, 5, 5, 2].tolist() == list(range(100, 130))
    assert 27 in asked and 24 not in asked


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_only_costs_time(tmp_path: Path) -> None:
    images, _ = counted(tmp_path, 10 * (BYTES + 4))
    (file,) = tmp_path.iterdir()
    file.chmod(0o444)
    assert images.read()[:, 0, 0, 0].tolist() == list(range(100, 130))


def test_of_a_large_source_only_a_sample_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "SAMPLE", 7)
    _, asked = counted(tmp_path, 0, count=1000)
    assert len(asked) == 7 and asked[0] == 0 and asked[-1] == 999
    dark = DecodedImages(lambda _: np.full((6, 6, 3), 9, np.uint8), 1000, (6, 6, 3), "dark")
    with pytest.raises(DataError, match="data source 'x': all images are nearly black"):
        DecodedCache(tmp_path, 0).keep(dark, "x")
    assert not list(tmp_path.glob("dark*"))


def test_a_damaged_image_of_a_large_source_is_named(folder: Path) -> None:
    (folder / "bee" / "17.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"17\.png': cannot be decoded"):
        load_images(str(folder), SIX, folder.parent / "cache", cache_gb=0.0)


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("threads", ["1", "3"])
def test_batches_come_in_order_with_any_number_of_threads(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    readers = set()

    def read(batch: np.ndarray) -> list[int]:
        readers.add(threading.current_thread().name)
        return batch.tolist()

    assert list(ahead(read, np.arange(12).reshape(4, 3))) == np.arange(12).reshape(4, 3).tolist()
    assert (threading.main_thread().name in readers) == (threads == "1")


def test_an_exception_of_a_reader_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")

    def read(batch: np.ndarray) -> np.ndarray:
        if batch[0] == 2:
            raise DataError("image 2: cannot be decoded")
        return batch

    with pytest.raises(DataError, match="image 2"):
        list(ahead(read, np.arange(4)[:, None]))


# ---------------------------------------------------------------- listings and partitions


def test_paths_with_any_bytes_round_trip() -> None:
    names = ["ant/1.png", "ant/ü.png", os.fsdecode(b"bee/\xff.png"), "bee/a\nb.png"]
    packed = Names(names)
    assert [packed[i] for i in range(4)] == list(packed) == names and len(packed) == 4
    assert len(Names([])) == 0


def test_a_large_folder_is_listed_rarely(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list_images(folder)
    assert list_images(folder) is not first  # a small one is listed each time
    monkeypatch.setattr(folders, "MANY", 29)
    large = list_images(folder)
    assert list_images(folder) is large and list_images(folder.parent / "images") is large
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + folders.FRESH)
    assert list_images(folder) is not large


def test_a_partition_is_computed_once_and_read_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(0).integers(0, 6, 300)
    images = ImageSet.of(np.zeros((300, 1, 1, 1), np.uint8), labels, "abcdef")
    options = DataOptions(partition="dirichlet")
    plain = partition(labels, options, 4, 0)
    first = kept_partition(images, options, 4, 0, tmp_path)
    monkeypatch.setattr(federated, "partition", lambda *_: pytest.fail("computed again"))
    larger_cache = options.model_copy(update={"cache_gb": 7.0})
    for made in (first, kept_partition(images, larger_cache, 4, 0, tmp_path)):
        for split, own in zip(plain, made, strict=True):
            np.testing.assert_array_equal(split.train, own.train)
            np.testing.assert_array_equal(split.test, own.test)
    others = [(images, options, 4, 1), (images, options, 5, 0), (images, DataOptions(partition="iid"), 4, 0)]
    others.append((images.subset(np.arange(299)), options, 4, 0))
    others.append((replace(images, owners=labels, ids=tuple("abcdef")), options, 4, 0))
    monkeypatch.setattr(federated, "partition", lambda *_: [DeviceSplit(np.arange(3), np.arange(2))])
    for other in others:
        assert len(kept_partition(*other, tmp_path)) == 1


# ---------------------------------------------------------------- the pool


def test_mixture_of_a_large_pool_is_fitted_to_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0)
    features = noise.normal(size=(500, 12)).astype(np.float32)
    images = ImageSet.of(np.zeros((500, 1, 1, 1), np.uint8), np.zeros(500, int), "a")
    options = {"summary.dim": 4, "summary.max-components": 2}
    whole, enough, sample, again = (
        pool_of(RunConfig.from_flat(options | {"summary.pool-sample": size}), images, features)
        for size in (20_000, 500, 200, 200)
    )
    assert (whole.points == enough.points).all() and (whole.mixture.means == enough.mixture.means).all()
    assert len(sample.points) == len(sample.density) == 500 and sample.mixture.n <= 200
    assert (sample.points == again.points).all() and (sample.points != whole.points).any()
    monkeypatch.setattr(metric_set, "AT_ONCE", 100)
    np.testing.assert_allclose(whole.projection(features), whole.points, atol=1e-12)


def test_features_are_written_in_pieces_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = "img_size=8,patch_size=4,in_chans=1,embed_dim=32,depth=1,num_heads=2"
    spec = spec_of(ModelOptions.model_validate({"args": args}), ("a",))
    model = build(spec, seed=0).eval().requires_grad_(False)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    images, transform = ImageSet.of(pixels, np.zeros(20, int), "a"), transform_of(model)
    whole = cached_features(model, spec, images, transform, tmp_path / "whole")
    monkeypatch.setattr(metric_set, "AT_ONCE", 8)
    pieces = cached_features(model, spec, images, transform, tmp_path / "pieces")
    assert isinstance(pieces, np.memmap) and pieces.shape == (20, 32)
    np.testing.assert_allclose(pieces, whole, atol=1e-5)
