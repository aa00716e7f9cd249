"""Unusual sources, after bug reports of similar projects: they are read correctly, or refused by name."""

from __future__ import annotations

import io
import os
import struct
import tomllib
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from tapfl.data import sources
from tapfl.data.contents import content_of
from tapfl.data.folders import list_images
from tapfl.data.sources import load_images
from tapfl.data.transform import Transform
from tapfl.errors import DataError

SIDE = 16
ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE]
PIXELS = np.stack([ROWS * 16, COLUMNS * 16, 255 - ROWS * 8 - COLUMNS * 8], -1).astype(np.uint8)
GREY = np.repeat(PIXELS[..., :1], 3, -1)
UPRIGHT = np.rot90(PIXELS, -1)  # pixels of an image with EXIF orientation 6
RGB = Transform((SIDE, SIDE), 3, (0.5,) * 3, (0.5,) * 3)
ORIENTATION_6 = struct.pack("<HHII", 0x112, 3, 1, 6)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, bits: int, colour: int, *extra: bytes) -> bytes:
    """Writes a PNG file of big-endian samples, with chunks before its pixels."""
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def tiff(samples: np.ndarray, photometric: int) -> bytes:
    """Writes a grey TIFF file with 16 bits."""
    data = samples.astype("<u2").tobytes()
    tags = [(256, SIDE), (257, SIDE), (258, 16), (259, 1), (262, photometric), (273, 8), (277, 1), (278, SIDE)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, len(data))])
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", 9) + entries + bytes(4)


def saved(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def exif(*entries: bytes) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


WIDE = (PIXELS.astype(np.uint32) * 257).astype(">u2")
PICTURES: dict[str, tuple[bytes, np.ndarray, int]] = {  # content, expected pixels, tolerance
    "APNG.png": (saved(PIXELS, "PNG", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]), PIXELS, 0),
    "frames.tif": (saved(PIXELS, "TIFF", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]), PIXELS, 0),
    "rgb16.png": (png(WIDE, 16, 2), PIXELS, 0),
    "grey16.png": (png(WIDE[..., 0], 16, 0), GREY, 0),
    "grey16.tif": (tiff(WIDE[..., 0], 1), GREY, 0),
    "white-is-zero16.tif": (tiff(65535 - WIDE[..., 0], 0), GREY, 0),
    "transparent.png": (saved(np.dstack([PIXELS, PIXELS[..., :1]]), "PNG"), PIXELS, 0),
    "grey-alpha.png": (saved(Image.fromarray(np.dstack([PIXELS[..., 0], PIXELS[..., 1]])), "PNG"), GREY, 0),
    "bit.png": (saved(Image.fromarray(PIXELS[..., 0] > 100), "PNG"), (GREY > 100) * 255, 0),
    "cmyk.jpg": (
        saved(Image.new("RGB", (SIDE, SIDE), (200, 100, 50)).convert("CMYK"), "JPEG"),
        np.full((SIDE, SIDE, 3), (200, 100, 50)),
        8,
    ),
    "jpeg-named.png": (saved(PIXELS, "JPEG", quality=95), PIXELS, 40),
    "Upper.PNG": (saved(PIXELS, "PNG"), PIXELS, 0),
    "turned.png": (png(PIXELS, 8, 2, chunk(b"eXIf", exif(ORIENTATION_6)[6:])), UPRIGHT, 0),
    "bad-exif.png": (png(PIXELS, 8, 2, chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03")), PIXELS, 0),
    "bad-exif.jpg": (saved(PIXELS, "JPEG", quality=95, exif=b"Exif\0\0garbage"), PIXELS, 40),
    "exif-twice.jpg": (saved(PIXELS, "JPEG", quality=95, exif=b"Exif\0\0" + exif(ORIENTATION_6)), UPRIGHT, 40),
    "bad-rational.jpg": (
        saved(PIXELS, "JPEG", quality=95, exif=exif(ORIENTATION_6, struct.pack("<HHII", 0x11A, 10, 1, 2**24))),
        UPRIGHT,
        40,
    ),
}
BROKEN = {
    "empty.png": b"",
    "text.png": b"hello",
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\n",
    "cut.jpg": saved(PIXELS.repeat(8, 0).repeat(8, 1), "JPEG")[:700],
    "cut.png": saved(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "PNG")[:5000],
    "long-profile.png": png(PIXELS, 8, 2, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(3_000_000)))),
    "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n",
}


def test_the_oldest_pillow_accepted_knows_every_format() -> None:
    """`Image.open(formats=…)` raises KeyError at a format that Pillow does not know. AVIF came with 11.3."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    (pillow,) = (needed for needed in map(Requirement, project["dependencies"]) if needed.name == "pillow")
    assert "AVIF" in sources.FORMATS and "11.2.1" not in pillow.specifier and "11.3" in pillow.specifier


def folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(saved(PIXELS, "PNG"))
    return root


def loaded(source: Path | str, root: Path) -> sources.ImageSet:
    return load_images(str(source), RGB, root / "cache")


@pytest.mark.parametrize("name", PICTURES)
def test_an_image_is_read_as_it_is_displayed(name: str, tmp_path: Path) -> None:
    content, expected, tolerance = PICTURES[name]
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / name).write_bytes(content)
    (seen,) = loaded(tmp_path / "in", tmp_path).read()
    assert np.abs(np.asarray(seen).astype(int) - expected.astype(int)).max() <= tolerance


@pytest.mark.parametrize("name", BROKEN)
def test_a_picture_that_cannot_be_decoded_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / name).write_bytes(BROKEN[name])
    with pytest.raises(DataError, match=rf"image '.*{name}': cannot be decoded") as refused:
        loaded(tmp_path / "in", tmp_path)
    assert "Ghostscript" not in str(refused.value)  # an image must not start a program
    assert not list((tmp_path / "cache").rglob("*.npy"))


# ---------------------------------------------------------------- sources that are nearly black


@pytest.mark.parametrize("values", [PIXELS.astype(np.uint16) * 16, (PIXELS / 255).astype(np.uint8), PIXELS // 16])
def test_an_npz_that_does_not_use_its_value_range_is_refused(values: np.ndarray, tmp_path: Path) -> None:
    """12 bits in 16, and values of 0 to 1 as integers."""
    np.savez(tmp_path / "x.npz", images=values[None], labels=[0])
    with pytest.raises(DataError, match=r"x\.npz': all images are nearly black \(no value is above (16|15|1) of 255"):
        loaded(tmp_path / "x.npz", tmp_path)
    with pytest.raises(DataError, match="nearly black"):  # another size, so that they are resized
        load_images(str(tmp_path / "x.npz"), Transform((8, 8), 3, (0.5,) * 3, (0.5,) * 3), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_a_folder_that_does_not_use_its_value_range_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.tif").write_bytes(tiff(PIXELS[..., 0].astype(int) * 16, 1))
    with pytest.raises(DataError, match=r"/in': all images are nearly black"):
        loaded(tmp_path / "in", tmp_path)


def test_a_dark_image_among_others_is_accepted(tmp_path: Path) -> None:
    folder(tmp_path / "in", "a/bright.png")
    (tmp_path / "in" / "a" / "dark.png").write_bytes(saved(PIXELS // 16, "PNG"))
    assert len(loaded(tmp_path / "in", tmp_path)) == 2


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train/a/x.png", "test/t.png"), r"has the folders test and train instead .*'.*train' .* leave the others"),
        (("train/x.png", "test/x.png"), "has the folders test and train instead of classes; one folder of images p"),
        (("data/cat/x.png", "data/dog/y.png"), r"has one folder, 'data', with 2 folders .* name '.*/in/data'"),
        (("x.png",), r"holds no images; .*images outside the classes' folders: 1"),
    ],
)
def test_folders_that_are_not_classes_are_refused(names: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        loaded(folder(tmp_path / "in", *names), tmp_path)


@pytest.mark.parametrize("names", [("a/b/x.png", "a/b/y.png"), ("a/b/x.png", "a/c/y.png", "a/z.png")])
def test_folders_within_the_only_class_belong_to_it(names: tuple[str, ...], tmp_path: Path) -> None:
    assert loaded(folder(tmp_path / "in", *names), tmp_path).classes == ("a",)


def test_files_of_a_file_server_are_left_out(tmp_path: Path) -> None:
    names = ("a/x.png", "a/@eaDir/x.png/SYNOPHOTO_THUMB_M.png", "b/y.png", "$RECYCLE.BIN/z.png", "__MACOSX/a/._x.png")
    found = loaded(folder(tmp_path / "in", *names), tmp_path)
    assert found.classes == ("a", "b") and len(found) == 2
    assert found.left_out == {"system folders": 3}


def test_two_classes_with_the_same_folder_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "in", "a/x.png")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "in" / "a")
    with pytest.raises(DataError, match="'a' and 'b' are the same folder"):
        loaded(tmp_path / "in", tmp_path)


def test_unusual_names_are_accepted(tmp_path: Path) -> None:
    names = ("10/x.png", "2/x.png", "Cat/x.png", "cat/x.png", "[bold]b/x.png", " c/a\nb.png")
    found = loaded(folder(tmp_path / "in", *names), tmp_path)
    assert found.classes == (" c", "10", "2", "Cat", "[bold]b", "cat") and len(found) == 6


def test_an_image_that_was_deleted_is_named(tmp_path: Path) -> None:
    found = list_images(folder(tmp_path / "in", "a/x.png", "a/y.png"))
    (tmp_path / "in" / "a" / "y.png").unlink()
    with pytest.raises(DataError, match=r"image '.*/a/y\.png': cannot be read \(No such file or directory\)"):
        assert found.fingerprint


@pytest.mark.parametrize("time", [-10, 0, 2**32])
def test_files_with_any_time_are_accepted(time: int, tmp_path: Path) -> None:
    folder(tmp_path / "in", "a/x.png")
    os.utime(tmp_path / "in" / "a" / "x.png", (time, time))
    assert len(loaded(tmp_path / "in", tmp_path)) == 1


# ---------------------------------------------------------------- .npz files


def test_arrays_in_any_layout_are_the_same_images(tmp_path: Path) -> None:
    images, labels = np.stack([PIXELS, PIXELS[::-1], 255 - PIXELS]), np.arange(3)
    kinds = {
        "plain": (images, labels),
        "Fortran": (np.asfortranarray(images), labels),
        "strides": (images[::-1].copy()[::-1], labels[::-1].copy()[::-1]),
        "big-endian": ((images.astype(np.uint32) * 257).astype(">u2"), labels.astype(">i8")),
        "unsigned": (images, labels.astype(np.uint64)),
    }
    for kind, (given, of) in kinds.items():
        np.savez(tmp_path / f"{kind}.NPZ", images=given, labels=of)
        (tmp_path / f"{kind}.NPZ.npz").rename(tmp_path / f"{kind}.NPZ")
        found = loaded(tmp_path / f"{kind}.NPZ", tmp_path)
        np.testing.assert_array_equal(found.read(), images)
        assert found.labels.tolist() == [0, 1, 2] and found.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x_train": PIXELS, "y_train": [0]}, "has no array `images`; accepted: `images` and `labels`, has x_train, y"),
        ({"images": PIXELS[None], "labels": [0], "classes": [b"\xff"]}, "`classes` are not UTF-8"),
        ({"images": PIXELS[None] > 9, "labels": [0]}, "must be uint8 or uint16 .*got bool"),
        ({"images": PIXELS[None].transpose(0, 3, 1, 2), "labels": [0]}, r"got uint8 \(1, 3, 16, 16\)"),
        ({"images": PIXELS[None], "labels": [[0, 1]]}, r"`labels` must be 1 integers, got int64 \(1, 2\)"),
        ({"images": PIXELS[None], "labels": [0.0]}, "got float64"),
        ({"images": PIXELS[None], "labels": 0}, r"got int64 \(\)"),
        ({"images": PIXELS[None], "labels": np.array([0], object)}, "Object arrays cannot be loaded"),
        ({"images": PIXELS[None], "labels": [-1]}, "must not be negative"),
    ],
)
def test_arrays_that_are_not_images_and_labels_are_refused(
    arrays: dict[str, np.ndarray], said: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"data source '.*x\.npz': .*{said}"):
        loaded(tmp_path / "x.npz", tmp_path)


def test_classes_without_images_are_reported(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.stack([PIXELS] * 2), labels=[1, 3])
    assert "2 images of 4 classes (2 without images), used at 16" in loaded(tmp_path / "x.npz", tmp_path).described()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.npy", "is a file of another kind"),
        ("pipe.npz", "is a file of another kind"),  # a pipe without a writer, which would block forever
        ("none", "there is no such file"),
        ("a" * 5000, "File name too long"),
    ],
)
def test_an_invalid_source_is_refused(name: str, said: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(DataError, match=rf"data source .*{said}.*accepted: digits, letters, a \.npz file"):
        loaded(tmp_path / name, tmp_path)


# ---------------------------------------------------------------- Hugging Face


def table(**columns: tuple[list[object], object]) -> datasets.Dataset:
    kinds = datasets.Features({name: kind for name, (_, kind) in columns.items()})
    return datasets.Dataset.from_dict({name: values for name, (values, _) in columns.items()}, features=kinds)


@pytest.fixture
def images() -> tuple[list[object], object]:
    return [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)], datasets.Image()


LABELS = [1, 0], datasets.ClassLabel(names=["a", "b"])


@pytest.fixture
def as_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[datasets.Dataset], None]:
    return lambda made: monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)


def test_columns_may_have_any_name_and_unused_ones_are_reported(
    images: tuple[list[object], object], as_hub: Callable[[datasets.Dataset], None], tmp_path: Path
) -> None:
    as_hub(table(img=images, fine=LABELS, coarse=([0, 0], datasets.ClassLabel(names=["c"])), mask=images))
    found = loaded("hf:mine", tmp_path)
    assert found.classes == ("a", "b") and found.labels.tolist() == [1, 0]
    assert "left out: column coarse: 1, column mask: 1" in found.described()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": ([0, 1], datasets.Value("int64"))}, r"type ClassLabel .*makes one\), has image: .*, label: int"),
        ({"label": ([-1, -1], LABELS[1])}, "2 of 2 images have no label; give a split with labels"),
        ({"label": ([None, 1], LABELS[1])}, "1 of 2 images have no label"),
        ({"label": LABELS, "image": ([None, None], datasets.Image())}, "image 0: there is none"),
        ({"label": ([], LABELS[1]), "image": ([], datasets.Image())}, "holds no images"),
        ({"label": LABELS, "image": (["/no.png"] * 2, datasets.Image())}, r"image 0: cannot be decoded \(FileNotFou"),
    ],
)
def test_tables_without_labelled_images_are_refused(
    columns: dict[str, tuple[list[object], object]],
    said: str,
    images: tuple[list[object], object],
    as_hub: Callable[[datasets.Dataset], None],
    tmp_path: Path,
) -> None:
    as_hub(table(**{"image": images} | columns))
    with pytest.raises(DataError, match=rf"data source 'hf:mine': .*{said}"):
        loaded("hf:mine", tmp_path)


def test_a_table_saved_to_disk_is_read(images: tuple[list[object], object], tmp_path: Path) -> None:
    saved_table = table(image=images, label=LABELS)
    saved_table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved_table, test=saved_table.select([0])).save_to_disk(tmp_path / "parts")
    assert len(loaded(f"hf:{tmp_path / 'one'}", tmp_path)) == len(loaded(f"hf:{tmp_path / 'parts'}", tmp_path)) == 2
    assert len(loaded(f"hf:{tmp_path / 'parts'}:test", tmp_path)) == 1
    for name, accepted in (("one", "train"), ("parts", "train, test")):
        with pytest.raises(DataError, match=rf"'hf:.*{name}': has no split 'none'; accepted: {accepted}$"):
            loaded(f"hf:{tmp_path / name}:none", tmp_path)
    with pytest.raises(DataError, match="'hf:': names no table; accepted: hf:NAME"):
        loaded("hf:", tmp_path)


def test_a_table_on_disk_is_identified_by_its_files(images: tuple[list[object], object], tmp_path: Path) -> None:
    """A run must not be resumed with another table in its place."""
    first = table(image=images, label=LABELS)
    first.save_to_disk(tmp_path / "one")
    before = content_of("data.source", f"hf:{tmp_path / 'one'}")
    assert content_of("data.source", f"hf:{tmp_path / 'one'}") == before
    first.select([1]).save_to_disk(tmp_path / "two")
    (tmp_path / "one").rename(tmp_path / "old")
    (tmp_path / "two").rename(tmp_path / "one")
    assert content_of("data.source", f"hf:{tmp_path / 'one'}") != before
