"""What the plans of many devices share: tables over the public pool, with one row per image (ours).

The metric set S of a device is part of the pool. A statistic that is a sum over images needs one term per image, and
the term is the same for all devices. So one pass over the pool serves them all (``pruning.probe = pool``):

    scores              Σ_{i ∈ S} t_i          for criteria that are `OverImages`: exact except for rounding
    layer importance    mean_{i ∈ S} KL_l(i)   for probes whose units are ranked on the whole pool: an approximation,
                                               unless the ranking does not depend on images

Three computations do not have this form. The kernels of `tap` compare the images of a batch with each other. The
elimination of `tap+` uses second moments, which are sums over images, but of units² numbers per image. Sequential
compensation uses statistics of the device's own pruned model.

A table is computed in pieces, always in the order of the pool. The bits of a plan therefore do not depend on which
device asks first, on threads, or on whether a run was resumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tapfl.compute import home
from tapfl.memo import Memo
from tapfl.models.units import PrunableLayer, Shape
from tapfl.progress import track
from tapfl.pruning.criteria.criterion import OverImages, PruningTask, Samples, Scores
from tapfl.pruning.criteria.registry import criterion_of
from tapfl.pruning.criteria.tap import composite_scores
from tapfl.pruning.layer_importance import divergences, probes
from tapfl.pruning.unit_shape import keep_best

PIECE = 256  # images read at a time
TABLES = 2  # score tables kept in the cache; a criterion has one, or one for each kind of layer
KEPT_BYTES = 256 * 2**20  # cached divergences, float64 (layers, pool) per set of shapes: 1 MB for DeiT and 5000 images

Images = Callable[[np.ndarray], tuple[Tensor, Tensor | None]]
Lock = AbstractContextManager[Any]


class PoolTables:
    """The tables of one pool and backbone, each computed when it is first asked for.

    Args:
        task: the task of any device; its budget and its metric set are not used.
        images: maps positions in the pool to the images and their labels, in the form that a task has them.
        size: number of images in the pool.
        folder: for the tables of scores. They are unnamed memory-mapped files that disappear with the process. Each
            holds one float64 per image and unit, which is 92 kB per image for DeiT-T.
        lock: for threads: held while a table is looked up or computed. It must be reentrant.
    """

    def __init__(self, task: PruningTask, images: Images, size: int, folder: Path, lock: Lock | None = None) -> None:
        self.task, self.images, self.size, self.folder = task, images, size, folder
        self.lock = lock or nullcontext()
        self._tables = Memo(TABLES)
        self._divergences = Memo(KEPT_BYTES, lambda kl: kl.nbytes)

    def sums(self, chosen: np.ndarray, samples: Samples, layers: Sequence[PrunableLayer]) -> dict[str, Tensor]:
        """Returns Σ t_i over the images at positions `chosen`, float64 (units,), by name of the layers that t has."""
        names = tuple(layer.name for layer in layers)
        with self.lock:
            table, widths = self._tables.once((samples, names), lambda: self._table(samples, layers))
        sums = torch.from_numpy(table[np.sort(chosen)].sum(0)).to(self.task.inputs.device)
        return dict(zip(widths, sums.split([*widths.values()]), strict=True))

    def importance(self, chosen: np.ndarray, shapes: Mapping[str, Shape]) -> dict[str, float]:
        """Returns KL_l in nats by layer name, the mean over the images at the positions `chosen`."""
        with self.lock:
            kl = self.divergences(shapes)[:, torch.from_numpy(np.sort(chosen))].mean(1)
        return dict(zip((layer.name for layer in self.task.layers), kl.tolist(), strict=True))

    def divergences(self, shapes: Mapping[str, Shape]) -> Tensor:
        """Returns KL(P_dense ‖ P_probe) in nats, float64 (layers, pool); probe l cuts only layer l to its shape."""
        key = tuple(sorted(shapes.items()))
        return self._divergences.once(key, lambda: self._measured(shapes))

    @cached_property
    def ranking(self) -> Scores:
        """The scores on the whole pool, (units,) by layer name: the criterion's, if it is `OverImages`.

        Otherwise the composite importance, summed over the complete batches of each piece.
        """
        task = self.task
        if isinstance(scores := criterion_of(task.options.criterion).scores, OverImages):
            return home(scores(replace(task, sums=partial(self.sums, np.arange(self.size)))))
        importance = {layer.name: torch.zeros(layer.units) for layer in task.layers}
        for piece in self._pieces():
            if len(piece.inputs) >= piece.batch:
                for name, values in composite_scores(piece).items():
                    importance[name] += home(values)
        return importance

    def _table(self, samples: Samples, layers: Sequence[PrunableLayer]) -> tuple[np.ndarray, dict[str, int]]:
        """Returns t of all images, float64 (pool, columns), and the number of columns of each layer."""
        table, widths, row = np.empty((0, 0)), dict[str, int](), 0
        for piece in self._pieces():
            for batch in samples(replace(piece, layers=tuple(layers))):
                if not widths:
                    widths = {name: values.shape[1] for name, values in batch.items()}
                    table = mapped(self.folder, self.size, sum(widths.values()))
                rows = torch.cat(list(batch.values()), dim=1).double().cpu().numpy()
                table[row : row + len(rows)] = rows
                row += len(rows)
        return table, widths

    def _measured(self, shapes: Mapping[str, Shape]) -> Tensor:
        parts = []
        for piece in self._pieces():
            kept = {n.name: keep_best(n, self.ranking[n.name], shapes[n.name]) for n in piece.layers}
            variants = probes(piece.model, piece.layers, kept)
            parts.append(divergences(piece.model, piece.layers, variants, piece.inputs, piece.batch, piece.compute))
        return torch.cat(parts, dim=1)

    def _pieces(self) -> Iterator[PruningTask]:
        for start in track(range(0, self.size, PIECE), "pool"):
            inputs, labels = self.images(np.arange(start, min(start + PIECE, self.size)))
            yield replace(self.task, inputs=inputs, labels=labels)


def mapped(folder: Path, rows: int, columns: int) -> np.ndarray:
    """Returns a memory-mapped array, float64 (rows, columns), backed by an unnamed file in `folder`.

    Raises:
        OSError: if the disk has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk raises here, and kills the process later; missing on macOS
            os.posix_fallocate(file.fileno(), 0, 8 * rows * columns)
        return np.memmap(file, np.float64, "r+", shape=(rows, columns))
