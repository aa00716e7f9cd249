"""Image files and folders: what the backbone gets, which files are left out, and what is refused."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tapfl.config import ModelOptions
from tapfl.data import sources
from tapfl.data.folders import list_images
from tapfl.data.images import ImageSet
from tapfl.data.sources import load_images
from tapfl.data.transform import Transform
from tapfl.errors import DataError, ModelError
from tapfl.models.backbone import build, spec_of
from tapfl.models.forward import input_transform, transform_of

SMALL = "patch_size=8,embed_dim=32,depth=1,num_heads=2"
NOISE = np.random.default_rng(0)


def square(size: int, channels: int = 3, crop: float = 1.0) -> Transform:
    return Transform((size, size), channels, (0.5,) * channels, (0.5,) * channels, crop)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(NOISE.integers(0, 256, (height, width, 3), np.uint8))


def plain(path: Path, level: int, width: int = 8, height: int = 8) -> Path:
    return save(Image.new("RGB", (width, height), (level, 200, 0)), path)


def loaded(root: Path, transform: Transform) -> ImageSet:
    return load_images(str(root), transform, root.parent / "cache")


def seen(root: Path, transform: Transform) -> np.ndarray:
    """Returns the only image of a folder as it is stored."""
    (image,) = loaded(root, transform).read()
    return np.asarray(image)


# ---------------------------------------------------------------- the same pixels as timm's


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("mode", ["auto", "center", "squash", "border"])
@pytest.mark.parametrize("side", [(70, 50), (32, 90), (20, 20)])
def test_inputs_are_those_of_timm_s_evaluation_transform(
    name: str, mode: str, side: tuple[int, int], tmp_path: Path
) -> None:
    sizes = (
        "img_size=56,window_size=7,depths=1/1,num_heads=1/1,embed_dim=8" if "swin" in name else f"img_size=48,{SMALL}"
    )
    options = ModelOptions(name=name, args=sizes, crop_mode=mode)  # type: ignore[arg-type]
    picture = noise(*side)
    save(picture, tmp_path / "in" / "a" / "x.png")
    model, transform = build(spec_of(options, ("a",))), input_transform(options)
    config = timm.data.resolve_model_data_config(model)
    expected = timm.data.create_transform(**config | {"input_size": (3, *transform.size)}, is_training=False)(picture)
    torch.testing.assert_close(transform(loaded(tmp_path / "in", transform).read())[0], expected, rtol=0, atol=1e-6)


@given(
    width=st.integers(1, 80),
    height=st.integers(1, 80),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    crop=st.sampled_from([0.875, 0.9, 0.95, 1.0]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)
def test_any_image_is_fitted_as_in_timm(
    width: int, height: int, size: tuple[int, int], crop: float, interpolation: str
) -> None:
    if max(width, height) > 16 * min(width, height):
        return
    transform = Transform(size, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.1), crop, "center", interpolation)
    picture = noise(width, height)
    reference = timm.data.create_transform(
        (3, *size),
        is_training=False,
        crop_pct=crop,
        interpolation=interpolation,
        mean=transform.mean,
        std=transform.std,
    )
    torch.testing.assert_close(transform(transform.fit(picture)[None])[0], reference(picture), rtol=0, atol=1e-6)


def test_options_override_timm_s_preprocessing_and_stay_with_the_backbone() -> None:
    plain_options = ModelOptions(name="deit_tiny_patch16_224", args=f"img_size=32,{SMALL}")
    assert input_transform(plain_options).crop == 0.9
    options = plain_options.model_copy(
        update={"mean": (0.5,), "std": (0.1, 0.2, 0.3), "crop_pct": 1.0, "interpolation": "bilinear"}
    )
    transform = input_transform(options)
    assert (transform.mean, transform.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    assert (transform.crop, transform.crop_mode, transform.interpolation) == (1.0, "center", "bilinear")
    spec = spec_of(options, ("a",))
    assert transform_of(build(type(spec).from_json(spec.model_dump_json()))) == transform
    assert input_transform(plain_options).crop == 0.9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": (0.1, 0.2)}, r"model\.mean = .*: has 2 values; accepted: 3, or 1"),
        ({"std": (0.0,)}, r"model\.std = 0\.0: input should be greater than 0"),
    ],
)
def test_an_invalid_preprocessing_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ModelError, match=f"(?i){message}"):
        input_transform(ModelOptions(**{"name": "deit_tiny_patch16_224", "args": f"img_size=32,{SMALL}"} | values))


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (20, 20)])
def test_a_folder_an_npz_and_hugging_face_give_the_same_input(size: tuple[int, int], tmp_path: Path) -> None:
    pictures = [noise(64, 32) for _ in range(3)]
    for index, picture in enumerate(pictures):
        save(picture, tmp_path / "in" / "a" / f"{index}.png")
    np.savez(
        tmp_path / "x.npz", images=np.stack([np.asarray(picture) for picture in pictures]), labels=np.zeros(3, int)
    )
    table = datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 0, 0]})
    table = table.cast_column("picture", datasets.Image()).cast_column("kind", datasets.ClassLabel(names=["a"]))
    transform = Transform(size, 3, (0.5,) * 3, (0.5,) * 3, 0.9)
    folder = loaded(tmp_path / "in", transform).read()
    np.testing.assert_array_equal(load_images(str(tmp_path / "x.npz"), transform, tmp_path / "cache").read(), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, **__: table)
        np.testing.assert_array_equal(load_images("hf:mine", transform, tmp_path / "cache").read(), folder)


# ---------------------------------------------------------------- pictures that are not eight plain bits


def test_a_rotated_photo_is_upright(tmp_path: Path) -> None:
    half = np.zeros((48, 64, 3), np.uint8)
    half[:24] = 255  # white at the top
    images = []
    for orientation in (1, 3, 6, 8):
        image = Image.fromarray(half)
        exif = image.getexif()
        exif[0x0112] = orientation
        save(image, tmp_path / str(orientation) / "a" / "x.png", exif=exif)
        images.append(seen(tmp_path / str(orientation), square(16)))
    white = [image[..., 0] > 128 for image in images]
    assert white[0][:7].all() and not white[0][9:].any()
    assert white[1][9:].all() and not white[1][:7].any()
    assert white[2][:, 9:].all() and not white[2][:, :7].any()  # 6: stored rotated by 90°
    assert white[3][:, :7].all() and not white[3][:, 9:].any()


RAMP = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_by_their_range(ending: str, channels: int, tmp_path: Path) -> None:
    save(Image.fromarray(RAMP), tmp_path / "in" / "a" / f"g.{ending}")
    image = seen(tmp_path / "in", square(32, channels))
    np.testing.assert_array_equal(image[..., 0], np.round(RAMP / 257).astype(np.uint8))


def test_an_npz_of_sixteen_bits_is_scaled_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=RAMP[None].astype(">u2"), labels=np.zeros(1, int))
    images = load_images(str(tmp_path / "x.npz"), square(32, 1), tmp_path).read()
    np.testing.assert_array_equal(images[0, ..., 0], np.round(RAMP / 257).astype(np.uint8))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_of_an_unknown_range_are_refused(kind: type, tmp_path: Path) -> None:
    save(Image.fromarray((RAMP / 65535).astype(kind)), tmp_path / "in" / "a" / "f.tif")
    with pytest.raises(DataError, match=r"a/f\.tif': holds .*, whose range is unknown; accepted: pictures of 8 or 16"):
        seen(tmp_path / "in", square(32))


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("YCbCr", "jpg")],
)
def test_images_of_any_mode_become_the_backbone_s_input(mode: str, ending: str, tmp_path: Path) -> None:
    picture = noise(16, 16).resize((4, 4)).resize((16, 16)).convert(mode)
    file = save(picture, tmp_path / "in" / "a" / f"x.{ending}")
    with Image.open(file) as stored:
        rgb = stored.convert("RGB")
    np.testing.assert_array_equal(seen(tmp_path / "in", square(16)), np.asarray(rgb))
    np.testing.assert_array_equal(seen(tmp_path / "in", square(16, 1))[..., 0], np.asarray(rgb.convert("L")))


def test_grey_and_colour_images_fit_any_backbone(tmp_path: Path) -> None:
    level = Image.new("L", (28, 28), 51)
    save(level, tmp_path / "in" / "a" / "0.png")
    assert (seen(tmp_path / "in", square(14, 1)) == 51).all()
    assert (seen(tmp_path / "in", square(14, 3)) == 51).all()
    np.savez(tmp_path / "x.npz", images=np.asarray(level)[None], labels=np.zeros(1, int))
    assert load_images(str(tmp_path / "x.npz"), square(14, 3), tmp_path).read().shape == (1, 14, 14, 3)


def test_a_very_long_image_is_cropped_before_it_is_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *args, **more: scaled.append(size) or resize(self, size, *args, **more),
    )
    tall = Image.new("RGB", (1, 60_000), (7, 0, 0))
    tall.putpixel((0, 30_000), (200, 0, 0))
    save(tall, tmp_path / "in" / "a" / "thin.png")
    image = seen(tmp_path / "in", square(224))
    assert max(height * width for width, height in scaled) <= 17 * 224 * 224
    reference = timm.data.create_transform(
        (3, 224, 224), is_training=False, crop_pct=1.0, interpolation="bicubic", use_prefetcher=True
    )
    np.testing.assert_array_equal(image, reference(tall.crop((0, 29_900, 1, 30_100))).permute(1, 2, 0))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """Returns a PNG with 192 million pixels in 24 kB."""
    width, height = 16_000, 12_000
    content = zlib.compress(b"\0" * ((width // 8 + 1) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def png_of(side: int) -> bytes:
    buffer = io.BytesIO()
    noise(side, side).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        bomb(),
        png_of(50)[:2000],
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0"),
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 1, 8, 9, 0, 0, 0)),
        b"II*\0" + b"\xff" * 20,
        b"P6 -1 5 255 ",
    ],
    ids=["bomb", "truncated", "empty", "no gif", "short header", "wide header", "no tiff", "no ppm"],
)
def test_a_picture_that_cannot_be_decoded_is_named(content: bytes, tmp_path: Path) -> None:
    plain(tmp_path / "in" / "a" / "1.png", 1)
    (tmp_path / "in" / "a" / "2.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a/2\.png': cannot be decoded"):
        loaded(tmp_path / "in", square(8))
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize(
    "error", [SyntaxError, struct.error, MemoryError, OverflowError, ZeroDivisionError, IndexError]
)
def test_any_exception_of_a_decoder_names_the_image(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(tmp_path / "in" / "a" / "1.png", 1)

    def broken(*_: object) -> None:
        raise error("odd")

    monkeypatch.setattr(Image.Image, "convert", broken)
    with pytest.raises(DataError, match=rf"a/1\.png': cannot be decoded \({error.__name__}: odd\)"):
        loaded(tmp_path / "in", square(8))


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; the images of one are a folder deeper, as in Tiny-ImageNet."""
    root = tmp_path / "images"
    plain(root / "cat" / "1.png", 200, 12, 8)
    plain(root / "cat" / "2.png", 100, 8, 20)
    plain(root / "ant" / "deep" / "1.PNG", 50)
    return root


def test_an_image_folder(folder: Path) -> None:
    found = loaded(folder, square(6))
    assert found.classes == ("ant", "cat")
    assert found.labels.tolist() == [0, 1, 1] and found.labels.dtype == np.int64
    assert found.read().shape == (3, 6, 6, 3) and found.read().dtype == np.uint8
    assert found.read()[:, 3, 3, 0].tolist() == [50, 200, 100]
    assert found.described() == "3 images of 2 classes, used at 6 × 6 px, RGB"


def test_files_that_are_not_images_are_left_out_and_counted(folder: Path) -> None:
    before = loaded(folder, square(6))
    (folder / ".ipynb_checkpoints").mkdir()
    plain(folder / ".ipynb_checkpoints" / "1-checkpoint.png", 1)
    (folder / "cat" / "._1.png").write_bytes(b"of a Mac")
    (folder / "cat" / ".deep").mkdir()
    (folder / "ant" / "notes.TXT").write_text("not an image")
    (folder / "ant" / "photo.heic").write_bytes(b"not decoded")
    (folder / "ant" / "README").write_text("none")
    plain(folder / "outside.png", 1)
    (folder / "cat" / "gone.png").symlink_to("nowhere.png")
    (folder / "cat" / "round").symlink_to(folder / "cat", target_is_directory=True)
    (folder / "empty").mkdir()
    found = loaded(folder, square(6))
    assert found.classes == before.classes and found.labels.tolist() == before.labels.tolist()
    np.testing.assert_array_equal(found.read(), before.read())
    assert found.left_out == {
        **{"hidden": 3, ".txt files": 1, ".heic files": 1, "files without an extension": 1, "broken links": 1},
        **{"images outside the classes' folders": 1, "circular links": 1, "folders without images": 1},
    }
    assert found.described().endswith(
        "; left out: hidden: 3, .heic files: 1, .txt files: 1, broken links: 1, circular links: 1, "
        "files without an extension: 1, folders without images: 1, images outside the classes' folders: 1"
    )


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    plain(tmp_path / "elsewhere" / "9.png", 9)
    (folder / "dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "cat" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "ant" / "0.png").symlink_to(tmp_path / "elsewhere" / "9.png")
    found = loaded(folder, square(6))
    assert found.classes == ("ant", "cat", "dog") and np.bincount(found.labels).tolist() == [2, 3, 1]


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test", "validation")])
def test_the_splits_of_a_data_set_are_not_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        plain(tmp_path / "in" / name / "cat" / "1.png", 1)
    message = (
        rf"has the folders {' and '.join(names)} instead of classes; name one of them, such as '.*/{names[0]}' \(da"
    )
    with pytest.raises(DataError, match=message):
        loaded(tmp_path / "in", square(6))
    assert loaded(tmp_path / "in" / names[0], square(6)).classes == ("cat",)


def test_train_may_be_a_class(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        plain(tmp_path / "in" / name / "1.png", 1)
    assert loaded(tmp_path / "in", square(6)).classes == ("bus", "train")


def test_names_are_the_same_in_nfc_and_nfd(tmp_path: Path) -> None:
    name = "été"
    for form in ("NFC", "NFD"):
        plain(tmp_path / form / unicodedata.normalize(form, name) / "1.png", 1)
        plain(tmp_path / "both" / unicodedata.normalize(form, name) / f"{form}.png", 1)
    np.savez(
        tmp_path / "x.npz",
        images=np.zeros((1, 6, 6, 3), np.uint8),
        labels=np.zeros(1, int),
        classes=np.array([unicodedata.normalize("NFD", name)]),
    )
    composed = (unicodedata.normalize("NFC", name),)
    assert loaded(tmp_path / "NFC", square(6)).classes == loaded(tmp_path / "NFD", square(6)).classes == composed
    assert load_images(str(tmp_path / "x.npz"), square(6)).classes == composed
    both = loaded(tmp_path / "both", square(6))
    assert both.classes == composed and both.labels.tolist() == [0, 0]


def test_the_validation_part_of_tiny_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "val"
    for index, level in enumerate((10, 20, 30, 40)):
        plain(root / "images" / f"val_{index}.png", level)
    annotations = root / "val_annotations.txt"
    annotations.write_text("val_0.png\tn02\t0\t0\t7\t7\nval_1.png\tn01\t0\t0\t7\t7\nval_2.png\tn02\t0\t0\t7\t7\n")
    found = loaded(root, square(8))
    assert found.classes == ("n01", "n02") and found.labels.tolist() == [0, 1, 1]
    assert found.read()[:, 0, 0, 0].tolist() == [20, 10, 30]
    assert found.left_out == {"not in val_annotations.txt": 1}
    annotations.write_text("val_9.png\tn02\n")
    with pytest.raises(DataError, match=r"val_annotations.txt': line 1 names no image and class: 'val_9.png"):
        loaded(root, square(8))
    annotations.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"val_annotations.txt': is not UTF-8"):
        loaded(root, square(8))


def test_the_second_load_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loaded(folder, square(6))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_decoded", lambda *_: pytest.fail("decoded again"))
        second = loaded(folder, square(6))
    np.testing.assert_array_equal(first.read(), second.read())
    assert loaded(folder, square(4)).read().shape == (3, 4, 4, 3)  # with another size the content is different
    loaded(folder, square(6, crop=0.5))  # and with another crop as well
    plain(folder / "cat" / "2.png", 7, 8, 21)
    assert loaded(folder, square(6)).read()[2, 3, 3, 0] == 7
    assert len(list((folder.parent / "cache" / "images").iterdir())) == 4  # and no partly written file


def test_a_fingerprint_changes_with_the_images_and_not_with_their_place(folder: Path, tmp_path: Path) -> None:
    def fingerprint() -> str:
        return list_images(folder).fingerprint

    first, file = fingerprint(), folder / "cat" / "1.png"
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert list_images(moved).fingerprint == first == loaded(moved, square(6)).subset(np.array([1])).fingerprint
    moved.rename(folder)
    os.utime(file, ns=(1, 1))
    assert (touched := fingerprint()) != first
    file.rename(folder / "ant" / "1.png")
    assert fingerprint() not in (first, touched)
    (folder / "ant" / "notes.txt").write_text("not an image")
    assert fingerprint() not in (first, touched)


def test_an_npz_is_identified_by_its_content(tmp_path: Path) -> None:
    def fingerprint(level: int) -> str:
        np.savez(tmp_path / "x.npz", images=np.full((2, 4, 4), level, np.uint8), labels=np.arange(2))
        return load_images(str(tmp_path / "x.npz")).fingerprint

    assert fingerprint(100) == fingerprint(100) != fingerprint(200)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "empty" / "class" / "x.heic").write_bytes(b"")
    message = r"holds no images; one folder .* is expected \(found \.heic files: 1, folders without images: 1\)"
    with pytest.raises(DataError, match=message):
        loaded(tmp_path / "empty", square(6))


def test_a_folder_of_images_needs_a_transform(folder: Path) -> None:
    with pytest.raises(DataError, match="its images may differ in size; pass the transform of a backbone"):
        load_images(str(folder))


@pytest.mark.parametrize(
    "name", ["red\x1b[31m", "two\nlines", "tab\t", "\u202eback", b"\xff".decode("utf-8", "surrogateescape")]
)
def test_a_class_whose_name_cannot_be_shown_is_refused(name: str, tmp_path: Path) -> None:
    plain(tmp_path / "in" / "ant" / "1.png", 1)
    plain(tmp_path / "in" / name / "2.png", 1)
    with pytest.raises(DataError, match=r"in': class '.*\\.*' has characters that cannot be shown"):
        loaded(tmp_path / "in", square(6))


def test_memory_mapped_images_are_read_without_warning_or_change(folder: Path) -> None:
    images = loaded(folder, square(8)).read()
    before = images.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        square(8)(images)
    np.testing.assert_array_equal(images, before)
