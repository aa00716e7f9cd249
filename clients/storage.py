"""A device's own storage: its pruned model, and its state after each round. None of it leaves the device."""

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
    """What a device keeps from round to round.

    Attributes:
        personal: v and α; None if the method has none.
        private: the parts of w that the aggregation rule does not share.
        references: adapters of the reference models (`personalize.references`), by name.
    """

    personal: Personal | None
    private: Params
    references: Mapping[str, Params] = {}

    def moved(self, move: Callable[[Any], Any]) -> DeviceState:
        """Returns the state with all tensors moved by `move`: `Compute.put` or `home`."""
        v = self.personal
        references = {name: move(params) for name, params in self.references.items()}
        return DeviceState(v and Personal(move(v.params), move(v.alpha)), move(self.private), references)


class DeviceStorage:
    """A folder per device.

    ```
    pruned/       plan.json and model.safetensors, for `tapfl.load_pruned`
    state/        round-NNNN.safetensors: the state after that round; the last two are kept
    personal/     the personal model as a peft adapter, written at the end
    images.json   number of training and test images of each class, and natural ids, for readers of this folder
    alphas.json   with `apfl`: final test accuracy of the interpolation at several α, for readers of this folder
    classes.json  names of the backbone's outputs, if the device has its own image source
    source.json   fingerprint of the images at the start of the run; if they may change, the device's folder
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
        """Names of the backbone's outputs. Raises RunError if no `Summarize` message came before."""
        return _read(self._classes, tuple)

    def save_classes(self, classes: Sequence[str]) -> None:
        write_json(self._classes, list(classes))

    @property
    def backbone(self) -> tuple[str, str]:
        """(key, spec as JSON) of the dense backbone. Raises RunError if no model was received before."""
        content = _read(self._backbone, dict)
        return content["key"], content["spec"]

    def save_backbone(self, key: str, spec: str) -> None:
        write_json(self._backbone, {"key": key, "spec": spec})

    @property
    def source(self) -> dict[str, str]:
        """The fingerprint of the images at the start of the run, by source; empty for a built-in source."""
        return _read(self._source, dict) if self.begun else {}

    def begin(self, fingerprint: Mapping[str, str]) -> None:
        """Stores the fingerprint of the images at the start of a run. Raises DataError as `require_same_images`."""
        self.require_same_images(fingerprint)
        if fingerprint and not self.source:
            write_json(self._source, dict(fingerprint))

    @property
    def begun(self) -> bool:
        """Whether a run has started with this device."""
        return self._source.exists()

    @property
    def own_folder(self) -> str:
        """The folder of a device with changing images: its name in `data.source`, fixed at the start of the run."""
        return self.source.get(FOLDER, "")

    def begin_changing(self, folder: str) -> None:
        """Stores the name of the device's folder at the start of a run."""
        if not self.begun:
            write_json(self._source, {FOLDER: folder})

    def require_same_images(self, fingerprint: Mapping[str, str]) -> None:
        """Raises DataError if the images differ from those at the start of the run; before the start, all are accepted.

        The message does not contain a fingerprint, because it may reach the server.
        """
        before = self.source
        if faults := changed(before, {name: of for name, of in fingerprint.items() if name in before}):
            raise DataError(f"{'; '.join(faults)}; {ACCEPTED}")

    def note(self, name: str, content: Mapping[str, object]) -> None:
        """Writes one of the files for readers of this folder, such as `tapfl report` in a simulation."""
        write_json(self.folder / name, content)

    def save_state(self, device: int, round: int, state: DeviceState, before: int) -> None:
        """Writes the state of a device after `round`, and keeps the state after `before`, from which it was computed.

        The server will ask for one of the two: the new one if the reply arrives, otherwise the old one.
        """
        parts = {PRIVATE: state.private, **{f"{name}:": params for name, params in state.references.items()}}
        if state.personal is not None:
            parts |= {PERSONAL: state.personal.params, "": {ALPHA: state.personal.alpha}}
        # clones, because one tensor may be in several parts and safetensors refuses tensors that share memory
        tensors = {part + name: tensor.clone() for part, params in parts.items() for name, tensor in params.items()}
        write_sealed(self._state.path(round), tensors, STATE, {"device": device, "round": round})
        self._state.keep((before, round))

    def load_state(self, device: int, round: int) -> DeviceState:
        """Returns the state of a device after `round`. For round 0 it is empty, unless adapters came with the model.

        Raises:
            RunError: if it is missing, because the storage was lost or is another device's.
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
        references = {name: params for name in REFERENCES if (params := part_of(tensors, f"{name}:"))}
        return DeviceState(kept, part_of(tensors, PRIVATE), references)


def _read(file: Path, kind: Callable[[Any], T]) -> T:
    """Returns the content of a JSON file as a `kind`. Raises RunError if it cannot be read or has another type."""
    try:
        return kind(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
