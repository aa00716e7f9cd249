"""A device's own storage: its smaller model, and its personal parameters by round. None of it leaves the device."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from tapfl.errors import RunError
from tapfl.personalize.method import Personal
from tapfl.store import read_tensors, write_json, write_tensors

VERSIONS_KEPT = 2
ALPHA = "alpha"


class DeviceStorage:
    """A folder per device.

    ```
    pruned/     plan.json and model.safetensors, for `tapfl.load_pruned`
    state/      round-NNNN.safetensors: v and α after that round, the last two rounds
    personal/   the personal model as a peft adapter, written at the end
    classes.json  what the backbone's outputs are called, where the device has a source of its own
    ```
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def pruned(self) -> Path:
        return self.folder / "pruned"

    @property
    def personal(self) -> Path:
        return self.folder / "personal"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the backbone's outputs. Raises RunError if no summary was ever asked for."""
        try:
            return tuple(json.loads(self._classes.read_text(encoding="utf-8")))
        except OSError as error:
            raise RunError(f"{self._classes}: cannot be read ({error.strerror})") from None

    def save_classes(self, classes: Sequence[str]) -> None:
        write_json(self._classes, list(classes))

    @property
    def _classes(self) -> Path:
        return self.folder / "classes.json"

    def save_state(self, round: int, state: Personal) -> None:
        """Writes the state after `round`, and drops versions older than the one before it."""
        alpha = torch.tensor(state.alpha, dtype=torch.float64)
        write_tensors(self._version(round), {**state.params, ALPHA: alpha})
        for older in self._rounds():
            if older <= round - VERSIONS_KEPT:
                self._version(older).unlink(missing_ok=True)

    def load_state(self, before: int) -> Personal | None:
        """Returns the state after the last round before `before` that this device took part in; None if there is none.

        A version of `before` itself, left by a round that the server never finished, is not used.
        """
        earlier = [round for round in self._rounds() if round < before]
        if not earlier:
            return None
        tensors = read_tensors(self._version(max(earlier)))
        return Personal(tensors, float(tensors.pop(ALPHA)))

    def _version(self, round: int) -> Path:
        return self.folder / "state" / f"round-{round:04d}.safetensors"

    def _rounds(self) -> list[int]:
        matches = (re.fullmatch(r"round-(\d+)\.safetensors", file.name) for file in self._version(0).parent.glob("*"))
        return sorted(int(match[1]) for match in matches if match)
