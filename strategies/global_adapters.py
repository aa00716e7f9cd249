"""The global adapters: their shapes, the part of them that a device has, and their values before the first round.

A warm start is stored in the run's folder as ``start.safetensors``, so that a resumed run does not train it again and
a device that joins later gets the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from flwr.common.logger import log
from torch import nn

from strategies.preparation import Preparation
from strategies.records import DeviceRecord
from tapfl.adapters import rules
from tapfl.adapters.layout import Layout, Shapes, device_layout, gather_all, global_shapes, last_blocks, pack
from tapfl.adapters.warm_start import Pupil, warm_start
from tapfl.errors import PlanError
from tapfl.memo import Memo
from tapfl.models.forward import transform_of
from tapfl.models.prunable import prunable_layers
from tapfl.models.units import PrunableLayer
from tapfl.profiles import max_rank
from tapfl.pruning.surgery import smaller_model
from tapfl.seeds import torch_generator
from tapfl.store import read_sealed, write_sealed
from tapfl.training import Params
from tapfl.wire import Prune

LAYOUTS = 2**26  # bytes of devices' layouts that are cached; one layout of DeiT-T has half a megabyte


class GlobalAdapters:
    """The global adapters of a run; `preparation` has the backbone, the pool and the run's folder."""

    def __init__(self, preparation: Preparation) -> None:
        self.preparation, self.config = preparation, preparation.config
        self._file = preparation.folder.path / "start.safetensors"
        self._layouts = Memo(LAYOUTS, lambda layout: sum(place.nbytes for place in layout.values()))

    @property
    def backbone(self) -> nn.Module:
        return self.preparation.backbone

    @cached_property
    def layers(self) -> list[PrunableLayer]:
        """The layers that get adapters."""
        return last_blocks(prunable_layers(self.backbone), self.config.adapters.blocks)

    @cached_property
    def shapes(self) -> Shapes:
        return global_shapes(self.backbone, self.layers, max_rank(self.config.devices))

    @cached_property
    def initial(self) -> Params:
        """Adapters without effect, with the dense model's head.

        After recovery, or with a criterion that trains, the devices' models have different heads. From the first round
        on the shared head replaces them: the head is trained as a whole anyway, and the rest of a device's model keeps
        what it has learnt. On the digits this changed no device's accuracy.
        """
        generator = torch_generator(self.config.seed, "adapters")
        return rules.initial(self.config.adapters, self.shapes, self.layers, self.backbone, generator)

    def layout(self, record: DeviceRecord, checksum: str = "") -> Layout:
        """Returns which entries of the global adapters a device has, according to its plan in the run's folder.

        Args:
            checksum: checksum of the plan by which the device's model was pruned; empty: it has no model yet.

        Raises:
            PlanError: if the plan is missing, or has another checksum.
        """

        def make() -> Layout:
            plan, _ = self.preparation.plan(record.device)
            if checksum and plan.checksum != checksum:
                file = self.preparation.plan_file(record.device)
                raise PlanError(f"{file}: is not the plan by which the model of device {record.device} was pruned")
            return device_layout(self.shapes, self.layers, plan, record.profile.rank)

        found: Layout = self._layouts.once((record.device, checksum), make)
        return found

    @property
    def starts_warm(self) -> bool:
        return self.config.adapters.start != "zero"

    @cached_property
    def first(self) -> Params:
        """The adapters of the first round. Raises PlanError if the file of the warm start is missing or damaged."""
        if not self.starts_warm:
            return self.initial
        params, _ = read_sealed(self._file, "start")
        return {name: params[name] for name in self.shapes}

    def warm_up(self, devices: Sequence[DeviceRecord]) -> None:
        """Trains the warm start on the models of these devices, if it is asked for and is not stored yet.

        Raises:
            ModelError: if the training diverges.
            PlanError: if the stored file is damaged.
        """
        if not self.starts_warm:
            return
        made_of = [[r.device, self.preparation.plan(r.device)[0].checksum, r.generic] for r in devices]
        if self._file.exists() and read_sealed(self._file, "start")[1].get("of") == made_of:
            return
        pupils = [self._pupil(record) for record in devices]
        images, transform, compute = self.preparation.images, transform_of(self.backbone), self.preparation.compute

        def inputs(positions: np.ndarray) -> torch.Tensor:
            return compute.put(transform(images.read(positions)))

        options, dense = self.config.adapters, compute.put(self.backbone)
        made = warm_start(options, self.initial, pupils, inputs, dense, self.config.seed, compute)
        log(logging.INFO, "warm start: held-out loss %s", ", ".join(f"{loss:.4f}" for loss in made.losses))
        write_sealed(self._file, made.params, "start", {"losses": made.losses, "of": made_of})

    def message(self, record: DeviceRecord) -> Prune:
        """Returns the message with a device's model, and with the warm start if the device's references need it."""
        message = self.preparation.message(record.device)
        if not (self.starts_warm and self.config.personalize.references):
            return message
        sent = rules.down(self.config.adapters, self.layout(record))
        return replace(message, adapters=pack(gather_all(self.first, sent), sent))

    def _pupil(self, record: DeviceRecord) -> Pupil:
        (plan, _), on_pool = self.preparation.plan(record.device), self.config.adapters.start == "pool"
        return Pupil(
            device=record.device,
            model=lambda: smaller_model(plan, self.preparation.message(record.device).weights, lambda: self.backbone),
            layout=self.layout(record),
            weight=record.train_samples,
            classes=None if record.held_classes is None else torch.tensor(record.held_classes),
            images=np.arange(len(self.preparation.images)) if on_pool else self.preparation.metric_set(record),
        )
