"""What the plans of many devices have in common: tables of the public pool, with a row for every image (ours).

A device's metric set S is part of the pool. What is a sum over images is the same function of each image for all
devices, so one pass over the pool serves them all (``pruning.probe = pool``):

    scores              Σ_{i ∈ S} t_i          of criteria that are `OverImages`: exact but for rounding
    layer importance    mean_{i ∈ S} KL_l(i)   of probes whose masks the pool as a whole ranks: an approximation, unless
                                               the ranking does not depend on images

Not of this form are `tap`, whose kernels compare the images of a batch with each other; the elimination of `tap+`, of
which second moments are sums over images, but of units² numbers an image; and sequential compensation, whose statistics
are of the device's own smaller model.

A table is computed piece by piece in the order of the pool, whoever asks first, so that a plan's bits do not depend on
other devices, on threads, or on whether a run was resumed.
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

PIECE = 256  # images that are read together
TABLES = 2  # of scores that are kept: a criterion has one, or one for each kind of layer
KEPT_BYTES = 256 * 2**20  # of divergences, float64 (layers, pool) for a set of shapes: 1 MB for DeiT and 5000 images

Images = Callable[[np.ndarray], tuple[Tensor, Tensor | None]]
Lock = AbstractContextManager[Any]


class PoolTables:
    """The tables of one pool and backbone, each computed when it is first asked for.

    Args:
        task: the problem of any device; its budget and its metric set are not used.
        images: returns the images at these positions of the pool, and their labels, as in a task.
        size: images of the pool.
        folder: where the tables of scores are: files that are mapped, without a name, and gone with the process. They
            hold a float64 an image and unit: 92 kB an image for DeiT-T.
        lock: held while a table is looked at or computed, for threads; a holder may take it again.
    """

    def __init__(self, task: PruningTask, images: Images, size: int, folder: Path, lock: Lock | None = None) -> None:
        self.task, self.images, self.size, self.folder = task, images, size, folder
        self.lock = lock or nullcontext()
        self._tables = Memo(TABLES)
        self._divergences = Memo(KEPT_BYTES, lambda found: found.nbytes)

    def sums(self, chosen: np.ndarray, samples: Samples, layers: Sequence[PrunableLayer]) -> dict[str, Tensor]:
        """Returns Σ t_i over the images at positions `chosen`, float64 (units,) by name of the layers that have t."""
        names = tuple(layer.name for layer in layers)
        with self.lock:
            table, widths = self._tables.once((samples, names), lambda: self._table(samples, layers))
        found = torch.from_numpy(table[np.sort(chosen)].sum(0)).to(self.task.inputs.device)
        return dict(zip(widths, found.split([*widths.values()]), strict=True))

    def importance(self, chosen: np.ndarray, shapes: Mapping[str, Shape]) -> dict[str, float]:
        """Returns KL_l in nats by layer name, over the images at the positions `chosen`."""
        with self.lock:
            found = self.divergences(shapes)[:, torch.from_numpy(np.sort(chosen))].mean(1)
        return dict(zip((layer.name for layer in self.task.layers), found.tolist(), strict=True))

    def divergences(self, shapes: Mapping[str, Shape]) -> Tensor:
        """Returns KL(P_dense ‖ P_probe) in nats, float64 (layers, pool), each layer cut to its shape alone."""
        key = tuple(sorted(shapes.items()))
        return self._divergences.once(key, lambda: self._measured(shapes))

    @cached_property
    def ranking(self) -> Scores:
        """The scores of the pool as a whole, (units,) by layer name: the criterion's, or else the composite importance.

        The latter is summed over the whole batches of each piece.
        """
        task = self.task
        if isinstance(scores := criterion_of(task.options.criterion).scores, OverImages):
            return home(scores(replace(task, sums=partial(self.sums, np.arange(self.size)))))
        found = {layer.name: torch.zeros(layer.units) for layer in task.layers}
        for piece in self._pieces():
            if len(piece.inputs) >= piece.batch:
                for name, values in composite_scores(piece).items():
                    found[name] += home(values)
        return found

    def _table(self, samples: Samples, layers: Sequence[PrunableLayer]) -> tuple[np.ndarray, dict[str, int]]:
        """Returns t of all images, (pool, columns), and how many columns each layer has."""
        table, widths, row = np.empty((0, 0)), dict[str, int](), 0
        for piece in self._pieces():
            for batch in samples(replace(piece, layers=tuple(layers))):
                if not widths:
                    widths = {name: values.shape[1] for name, values in batch.items()}
                    table = mapped(self.folder, self.size, sum(widths.values()))
                found = torch.cat(list(batch.values()), dim=1).double().cpu().numpy()
                table[row : row + len(found)] = found
                row += len(found)
        return table, widths

    def _measured(self, shapes: Mapping[str, Shape]) -> Tensor:
        found = []
        for piece in self._pieces():
            kept = {n.name: keep_best(n, self.ranking[n.name], shapes[n.name]) for n in piece.layers}
            variants = probes(piece.model, piece.layers, kept)
            found.append(divergences(piece.model, piece.layers, variants, piece.inputs, piece.batch, piece.compute))
        return torch.cat(found, dim=1)

    def _pieces(self) -> Iterator[PruningTask]:
        for start in track(range(0, self.size, PIECE), "pool"):
            inputs, labels = self.images(np.arange(start, min(start + PIECE, self.size)))
            yield replace(self.task, inputs=inputs, labels=labels)


def mapped(folder: Path, rows: int, columns: int) -> np.ndarray:
    """Returns an array, float64 (rows, columns), in a file without a name in `folder`.

    Raises:
        OSError: if the disk has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a signal later; macOS does not have it
            os.posix_fallocate(file.fileno(), 0, 8 * rows * columns)
        return np.memmap(file, np.float64, "r+", shape=(rows, columns))
