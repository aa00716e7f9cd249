"""A run with more images than its memory limit can hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COUNT, PIXELS, KINDS, ALLOWED = 16_000, 48, 12, 90 * 2**20
SCRIPT = """
import ctypes, gc, re, resource, sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from experiments import cli

place, images, allowed, *options = sys.argv[1:]
def run(source):
    command = ["run", "--engine", "inprocess", "--no-report", "--out", f"{place}/run-{source}"]
    chosen = [f"data.source={place}/{source}", f"cache={place}/cache-{source}", *options]
    sys.argv = ["tapfl", *command, *(part for option in chosen for part in ("--set", option))]
    with suppress(SystemExit):
        cli.main()

run("few")  # all that is imported once
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(allowed), size + int(allowed)))
try:
    np.empty(int(images), np.uint8)
except MemoryError:
    print("would not fit", flush=True)
run("many")
"""
MODEL = f"img_size={PIXELS},patch_size=16,embed_dim=32,depth=1,num_heads=2,class_token=False,global_pool=avg"
OPTIONS = [
    f"model.args={MODEL}",
    *("model.epochs=1", "devices.count=3", "devices.budgets=0.9", "devices.ranks=4", "data.partition=iid"),
    *("data.cache-gb=0.01", "compute.cache-mb=4", "metric.size=64", "summary.max-components=1"),
    *("pruning.criterion=magnitude", "train.rounds=1", "train.epochs=1", "personalize.method=fedavg"),
]


def write_images(folder: Path, count: int) -> None:
    noise = np.random.default_rng(0)
    for kind in range(KINDS):
        place = folder / f"class {kind % 4}"
        place.mkdir(parents=True, exist_ok=True)
        first = place / f"{kind:05d}.png"
        Image.fromarray(noise.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(first)
        for number in range(kind + KINDS, count, KINDS):
            os.link(first, place / f"{number:05d}.png")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_run_works_with_a_source_larger_than_the_memory_limit(tmp_path: Path) -> None:
    write_images(tmp_path / "few", 240)
    write_images(tmp_path / "many", COUNT)
    arguments = [str(tmp_path), str(COUNT * PIXELS**2 * 3), str(ALLOWED), *OPTIONS]
    # the limit is on address space, so freed memory must be returned and not remain in holes of the heap
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    one = {**os.environ, **allocator, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], env=one, capture_output=True, text=True)
    assert "would not fit" in done.stdout, done.stderr
    assert (tmp_path / "run-many" / "summary.json").exists(), done.stdout + done.stderr
