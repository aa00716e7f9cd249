"""A source larger than memory: time to open it, memory of the processes, and the rate at which images are read.

The images are generated JPEGs: a few files, and hard links to them for the requested number of images.
"""

from __future__ import annotations

import io
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from clients import caches
from clients.device import Device
from clients.storage import DeviceStorage
from experiments.bench.timing import Repeats, Row
from experiments.feasible import check
from tapfl.compute import HERE
from tapfl.config import RunConfig
from tapfl.data.contents import contents, fingerprints
from tapfl.models.forward import input_transform
from tapfl.options import Scalar
from tapfl.profiles import profiles_of
from tapfl.progress import stage
from tapfl.seeds import numpy_generator
from tapfl.wire import Hello

CLASSES, SIZE, BATCH = 100, (500, 375), 64
FILES, LINKS = 16, 50_000  # least number of distinct files, and most links to a file, which file systems limit
NO_BACKBONE = "0" * 16


def data(
    images: Annotated[int, typer.Option(min=2 * CLASSES, help="images of the devices")] = 4_000,
    devices: Annotated[int, typer.Option(min=1, help="devices that share them")] = 20,
    kilobytes: Annotated[int, typer.Option(min=20, help="size of an image's file")] = 200,
    threads: Annotated[list[int], typer.Option(min=1, help="decoding threads, and workers of torch's loader")] = [1],
    repeats: Repeats = 3,
    folder: Annotated[Path | None, typer.Option(help="folder of the files; those that exist are used again")] = None,
) -> Iterator[Row]:
    """Open a folder of JPEGs without any cache, and read a device's images, compared with torch's own loader.

    `until hello` is the time of the command and one worker before round zero: list the files, divide the images, check
    the options, and answer for every device. Memory is the peak resident memory, including libraries.
    """
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(TemporaryDirectory()))
        options = _make(place, images, devices, kilobytes)
        for count in threads:
            os.environ["OMP_NUM_THREADS"] = str(count)
            server = _alone(_serve, options)
            worker = _alone(_work, options, str(place), repeats, count)
            yield {
                "images": str(images),
                "devices": str(devices),
                "threads": str(count),
                "until hello s": f"{server['wall'] + worker['wall']:.1f}",
                "CPU s": f"{server['cpu'] + worker['cpu']:.1f}",
                "command MB": f"{server['bytes'] / 1e6:.0f}",
                "worker MB": f"{worker['bytes'] / 1e6:.0f}",
                **{f"{kind} ÷ loader's": f"{worker[kind]:.2f}" for kind in ("images/s", "images/CPU s")},
                "images/s": f"{worker['rate']:.1f}",
            }


def _alone(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Returns the result of `work`, computed in a separate process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def _make(place: Path, images: int, devices: int, kilobytes: int) -> dict[str, Scalar]:
    """Makes the folder of images and the pool unless they exist; returns the options of a run that uses them."""
    source, pool = place / f"images-{images}-{kilobytes}kB", place / "pool.npz"
    if not source.exists():
        kinds = max(FILES, -(-images // LINKS))
        (place / "files").mkdir(parents=True, exist_ok=True)
        for kind in range(kinds):
            (place / "files" / f"{kilobytes}kB-{kind}.jpg").write_bytes(generated_jpeg(kind, kilobytes))
        unfinished = place / "unfinished"
        with stage("links") as advance:
            for number in range(CLASSES):
                of_class = unfinished / f"c{number:03d}"
                of_class.mkdir(parents=True)
                for image in range(number, images, CLASSES):
                    os.link(place / "files" / f"{kilobytes}kB-{image % kinds}.jpg", of_class / f"{image:08d}.jpg")
                advance(number + 1, CLASSES)
        unfinished.rename(source)
    if not pool.exists():
        pixels = numpy_generator(0, "pool").integers(0, 256, (4 * CLASSES, 32, 32, 3), dtype=np.uint8)
        names = np.array([f"c{number:03d}" for number in range(CLASSES)])
        np.savez(pool, images=pixels, labels=np.arange(4 * CLASSES) % CLASSES, classes=names)
    return {
        "data.source": str(source),
        "data.public": str(pool),
        "data.partition": "iid",
        "data.cache-gb": 0.1,  # enough for the pool only
        "devices.count": devices,
        "cache": str(place / "cache"),
        "model.name": "deit_tiny_patch16_224",
        "model.args": "",
        "metric.size": 64,
    }


def generated_jpeg(kind: int, kilobytes: int) -> bytes:
    """Returns a JPEG that compresses like a photograph, with as much noise as its size needs."""
    noise = numpy_generator(0, "jpeg", kind)
    smooth = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    for spread in range(4, 120, 4):
        pixels = np.asarray(smooth, np.int16) + noise.integers(-spread, spread + 1, (*SIZE[::-1], 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
        if len(file.getvalue()) >= 1000 * kilobytes:
            break
    return file.getvalue()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _serve(options: Mapping[str, Scalar]) -> dict[str, float]:
    config = RunConfig.from_flat(options)
    start = _now()
    contents(config)
    check(config)
    wall, cpu = _now() - start
    return {"wall": wall, "cpu": cpu, "bytes": _peak()}


def _work(options: Mapping[str, Scalar], place: str, repeats: int, threads: int) -> dict[str, float]:
    config = RunConfig.from_flat(options)
    count, profile = config.devices.count, profiles_of(config.devices)[0]
    start = _now()
    with TemporaryDirectory(dir=place) as folder:
        for i in range(count):
            Device(config, i, count, profile, DeviceStorage(Path(folder) / str(i))).hello(Hello(NO_BACKBONE))
    wall, cpu = _now() - start
    (fingerprint,) = fingerprints([("data.source", config.data.source)]).values()
    owners = [caches.Owner(config, count, i % count, fingerprint=fingerprint) for i in range(repeats)]
    parts = [caches.part(owner, "train", (), HERE) for owner in owners]
    peak, took = 0, []
    for part in parts:
        own = _seconds_an_image(part.split(BATCH))
        peak = peak or _peak()
        positions = np.arange(len(part)) if part.images.positions is None else part.images.positions
        took.append((own, _seconds_an_image(torch_loader(config, positions.tolist(), threads))))
    ours, theirs = np.median(took, axis=0)
    rate, cpu_rate = theirs / ours
    found = {"wall": wall, "cpu": cpu, "bytes": peak, "rate": 1 / ours[0]}
    return found | {"images/s": rate, "images/CPU s": cpu_rate}


def _now() -> np.ndarray:
    """Returns wall seconds, and CPU seconds of this process and its children that have ended."""
    times = os.times()
    return np.array([times.elapsed, sum(times[:4])])


def _seconds_an_image(batches: Any) -> np.ndarray:
    """Returns the wall and CPU seconds per image of reading these batches."""
    start = _now()
    count = sum(len(batch) for batch in batches)
    return (_now() - start) / count


def torch_loader(config: RunConfig, positions: Sequence[int], threads: int) -> Iterator[torch.Tensor]:
    """Yields the images at these positions of the folder, read by torch's loader with timm's transform."""
    from timm.data import create_transform  # here, because the memory of the command and a worker is measured
    from torchvision.datasets import ImageFolder

    ours = input_transform(config.model)
    transform = create_transform(
        (ours.channels, *ours.size), interpolation=ours.interpolation, mean=ours.mean, std=ours.std, crop_pct=ours.crop
    )
    torch.set_num_threads(1)
    images = torch.utils.data.Subset(ImageFolder(config.data.source, transform), positions)
    # forked, as in a script on Linux; otherwise the workers would be spawned, like this process, with all imports
    own: dict[str, Any] = {"num_workers": threads, "multiprocessing_context": "fork"} if threads > 1 else {}
    return (inputs for inputs, _ in torch.utils.data.DataLoader(images, BATCH, **own))
