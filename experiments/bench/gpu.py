"""What a GPU is worth here: one prepared script of under ten minutes, which writes each figure as soon as it is there.

``python -m experiments.bench.gpu OUT.jsonl [--device cpu] [--small] [--pictures FOLDER --weights FILE]``

It needs torch, timm, scikit-learn, scipy, safetensors and pydantic, and neither Flower nor Ray nor a network. Each part
(`experiments.bench.gpu_parts`) is a process of its own that ends at its time limit; the rows that it has yielded by
then are kept. ``--small`` is the size of a test.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from experiments.bench.gpu_parts import PARTS, SMALL, WAIT, Row, Size
from tapfl.compute import Compute
from tapfl.config import ComputeOptions


def _carry_out(name: str, size: Size, compute: Compute, pipe: Connection) -> None:
    """A part's own process: its rows through the pipe, each when it is there."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an ordinary exit, which ends its own processes as well
    compute.prepare()
    try:
        for row in PARTS[name][0](size, compute):
            pipe.send(row)
    except Exception:
        pipe.send({"failed": traceback.format_exc().strip().splitlines()[-1]})
    pipe.close()


def rows_of(name: str, size: Size, compute: Compute) -> Iterator[Row]:
    """Yields the rows of a part until it is done, or its time is over."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    limit = PARTS[name][1] * size.patience
    end = time.monotonic() + limit
    process = context.Process(target=_carry_out, args=(name, size, compute, there))
    process.start()
    there.close()
    try:
        while here.poll(max(0.0, end - time.monotonic())):
            yield here.recv()
        yield {"failed": f"took more than {limit:g} s"}
    except EOFError:
        process.join(WAIT)
    finally:
        process.terminate()
        process.join()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="file that gets a line of JSON for each figure")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda", "auto"])
    parser.add_argument("--small", action="store_true", help="the size of a test")
    parser.add_argument(
        "--pictures", default="", help="folder with one subfolder of images per class, at least 60 classes"
    )
    parser.add_argument("--weights", default="", help="checkpoint of deit_tiny_patch16_224, for --pictures")
    given = parser.parse_args(arguments)
    if bool(given.pictures) != bool(given.weights):
        parser.error("--pictures and --weights need each other")
    compute, size = Compute.of(ComputeOptions(device=given.device)), SMALL if given.small else Size()
    size = replace(size, pictures=given.pictures, weights=given.weights)
    failed = 0
    with given.out.open("a", encoding="utf-8") as file:
        for name in PARTS:
            for row in rows_of(name, size, compute):
                failed += "failed" in row
                line = {"about": name, "on": compute.kind, "torch": torch.__version__} | row
                file.write(json.dumps(line) + "\n")
                file.flush()
                shown = (
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                )
                print(f"{name}: {', '.join(shown)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
