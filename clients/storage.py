"""A device's own storage: its smaller model, and its state by round. None of it leaves the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tapfl.config import REFERENCES
from tapfl.data.contents import ACCEPTED, changed
from tapfl.errors import DataError, RunError
from tapfl.personalize.method import Personal
from tapfl.run_folder import Versions
from tapfl.store import part_of, read_sealed, write_json, write_sealed
from tapfl.training import Params

ALPHA, PERSONAL, PRIVATE, STATE = "alpha", "v:", "w:", "state"
T = TypeVar("T")
FOLDER = "folder"  # entry of source.json
IMAGES_FILE, ALPHAS_FILE = "images.json", "alphas.json"


class DeviceState(NamedTuple):
    """What a device keeps from round to round."""

    personal: Personal | None  # v and α; None where the method has none
    private: Params  # the parts of w that the aggregation rule does not share
    references: Mapping[str, Params] = {}  # adapters that were trained for comparison, by `personalize.references`

    def moved(self, move: Callable[[Any], Any]) -> DeviceState:
        """Returns the state with all tensors moved: `Compute.put`, or `home`."""
        v = self.personal
        references = {name: move(params) for name, params in self.references.items()}
        return DeviceState(v and Personal(move(v.params), move(v.alpha)), move(self.private), references)


class DeviceStorage:
    """A folder per device.

    ```
    pruned/     plan.json and model.safetensors, for `tapfl.load_pruned`
    state/      round-NNNN.safetensors: the state after that round, the last two
    personal/   the personal model as a peft adapter, written at the end
    images.json   number of images of each class in its two parts, and the natural ids, for readers of this folder
    alphas.json   test accuracy of the interpolation at several α at the end, with `apfl`, for readers of this folder
    classes.json  names of the backbone's outputs, if the device has its own image source
    source.json   fingerprint of the images that the run began with; if they may change, the device's folder
    backbone.json the dense backbone's key and spec, if a reference needs it
    ```
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pruned, self.personal = folder / "pruned", folder / "personal"
        self._classes, self._state = folder / "classes.json", Versions(folder / "state")
        self._source, self._backbone = folder / "source.json", folder / "backbone.json"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the backbone's outputs. Raises RunError if no summary was requested before."""
        return _read(self._classes, tuple)

    def save_classes(self, classes: Sequence[str]) -> None:
        write_json(self._classes, list(classes))

    @property
    def backbone(self) -> tuple[str, str]:
        """The key and the spec, as JSON, of the dense backbone. Raises RunError if no model was received before."""
        known = _read(self._backbone, dict)
        return known["key"], known["spec"]

    def save_backbone(self, key: str, spec: str) -> None:
        write_json(self._backbone, {"key": key, "spec": spec})

    @property
    def source(self) -> dict[str, str]:
        """The fingerprint of the images that the run began with, by what they were named; empty if built in."""
        return _read(self._source, dict) if self.begun else {}

    def begin(self, fingerprint: Mapping[str, str]) -> None:
        """Writes the fingerprint of the images down when a run begins. Raises DataError as `require_same_images`."""
        self.require_same_images(fingerprint)
        if fingerprint and not self.source:
            write_json(self._source, dict(fingerprint))

    @property
    def begun(self) -> bool:
        """Whether a run with this device has begun."""
        return self._source.exists()

    @property
    def own_folder(self) -> str:
        """The name of the folder below `data.source` that a device with changing images has since the run began."""
        return self.source.get(FOLDER, "")

    def begin_changing(self, folder: str) -> None:
        """Writes the name of the device's folder down when a run begins."""
        if not self.begun:
            write_json(self._source, {FOLDER: folder})

    def require_same_images(self, fingerprint: Mapping[str, str]) -> None:
        """Raises DataError unless these are the images that the run began with; before it began all are.

        The message holds no fingerprint: it may reach the server.
        """
        before = self.source
        if odd := changed(before, {name: of for name, of in fingerprint.items() if name in before}):
            raise DataError(f"{'; '.join(odd)}; {ACCEPTED}")

    def note(self, name: str, content: Mapping[str, object]) -> None:
        """Writes one of the files for readers of this folder, such as `tapfl report` in a simulation."""
        write_json(self.folder / name, content)

    def save_state(self, device: int, round: int, state: DeviceState, before: int) -> None:
        """Writes the state of a device after `round`; keeps the one after `before`, from which it was computed.

        The server will ask for one of the two: the new one if the reply arrives, otherwise the old one.
        """
        parts = {PRIVATE: state.private, **{f"{name}:": params for name, params in state.references.items()}}
        if state.personal is not None:
            parts |= {PERSONAL: state.personal.params, "": {ALPHA: state.personal.alpha}}
        # one tensor may be in several parts; safetensors refuses two names for it
        tensors = {part + name: tensor.clone() for part, params in parts.items() for name, tensor in params.items()}
        write_sealed(self._state.path(round), tensors, STATE, {"device": device, "round": round})
        self._state.keep((before, round))

    def load_state(self, device: int, round: int) -> DeviceState:
        """Returns the state of a device after `round`; for 0 an empty one, unless something came with its model.

        Raises:
            RunError: if it is missing: another device's storage, or a lost one.
            PlanError: if it is damaged, or belongs to another device or round.
        """
        file = self._state.path(round)
        if not file.exists():
            if round == 0:
                return DeviceState(None, {})
            raise RunError(f"{self._state.folder}: has no state after round {round}, for which the server has a reply")
        tensors, _ = read_sealed(file, STATE, device=device, round=round)
        personal = part_of(tensors, PERSONAL)
        kept = Personal(personal, tensors[ALPHA]) if personal else None
        references = {name: found for name in REFERENCES if (found := part_of(tensors, f"{name}:"))}
        return DeviceState(kept, part_of(tensors, PRIVATE), references)


def _read(file: Path, kind: Callable[[Any], T]) -> T:
    """Returns what a file of JSON holds. Raises RunError if that cannot be read, or is of another kind."""
    try:
        return kind(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
