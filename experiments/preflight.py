"""Resolves the options, folder and paths of a run, and checks them before torch is loaded. Writes nothing."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strategies.binding import inputs_of, require_same_inputs, require_same_options
from tapfl.config import RunConfig
from tapfl.data.contents import contents
from tapfl.data.hugging_face import with_absolute_folder
from tapfl.errors import ConfigError
from tapfl.options import expanded
from tapfl.progress import stage
from tapfl.pruning.criteria.registry import require_criterion
from tapfl.run_folder import RunFolder

DEFAULT_DEVICES = 10


def place_of_run(options: Mapping[str, Any], out: Path | None, resume: Path | None) -> tuple[Path, bool]:
    """Returns the folder of a run, by default a new one, and whether it contains a run to resume.

    Args:
        options: by dotted name; `out` and `resume` may be among them.
        out: value of ``--out``, which overrides the option.
        resume: value of ``--resume``, the folder of the run to resume.

    Raises:
        ConfigError: if an option is not valid, or they name different folders or no folder to resume.
    """
    asked = RunConfig.from_flat({name: options[name] for name in ("out", "resume") if name in options})
    own = expanded("out", asked.out).absolute() if asked.out else None
    for named, folder in ((f"--out {out}", out), (f"out = {asked.out!r}", own)):
        if resume is not None and folder is not None and folder.absolute() != resume.absolute():
            raise ConfigError(f"{named}: a resumed run stays in its folder, {resume}; omit {named.split()[0]}")
    place = resume or out or own
    if asked.resume and place is None:
        raise ConfigError("resume = true: needs out, the folder of the run to continue")
    return place or Path(f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}"), resume is not None or asked.resume


def resolve_run(options: Mapping[str, Any], out: Path, resume: bool) -> RunConfig:
    """Returns the checked configuration of a run in the folder `out`.

    Args:
        options: by dotted name; they override the defaults, or the options of the run that is resumed.
        resume: whether `out` contains a run to resume.

    Raises:
        TapflError: one line, if an option would make the run fail.
    """
    kept = RunFolder(out).config() if resume else {}
    config = absolute_paths(RunConfig.from_flat({**kept, **options, "out": str(out), "resume": resume}))
    if resume:
        require_same_run(RunFolder(out), config)
    elif Path(config.out).exists():
        raise ConfigError(
            f"out = {config.out!r}: exists already; give a folder that does not exist, or continue with "
            f"--resume {shlex.quote(config.out)}"
        )
    require_criterion(config.pruning.criterion)
    with stage("checking"):
        from experiments.feasible import check

        config = counted(config)
        check(config)
    return config


def counted(config: RunConfig) -> RunConfig:
    """Returns the configuration with a number of devices; by default as many as the partition makes, or ten.

    Args:
        config: with absolute paths.

    Raises:
        TapflError: if the partition needs the images for this, and they are missing or cannot be divided.
    """
    if config.devices.count:
        return config
    from experiments.feasible import devices_of  # loads torch

    count = devices_of(config) if config.data.makes_devices else DEFAULT_DEVICES
    return RunConfig.from_flat(config.flat() | {"devices.count": count})


def require_same_run(folder: RunFolder, config: RunConfig, require: bool = True) -> None:
    """Raises unless the run in `folder` has these options and inputs, and its simulated devices have these images.

    Args:
        require: whether images and files must exist; if False, those that do not are not compared.

    Raises:
        ConfigError: naming everything that differs.
        TapflError: if a required file cannot be read.
    """
    from clients.storage import DeviceStorage

    require_same_options(folder, config)
    require_same_inputs(folder, inputs_of(config, require))
    images = contents(config, ["data.source"], require)
    for device in sorted(folder.path.glob("devices/*")):
        DeviceStorage(device).require_same_images(images)


def with_model_of_hub(config: RunConfig) -> RunConfig:
    """Returns the configuration with timm's name and arguments if the model is given as a repository or folder."""
    if ":" not in config.model.name:
        return config
    from tapfl.models.checkpoints import of_hub  # loads torch

    return config.model_copy(update={"model": of_hub(config.model)})


def absolute_paths(config: RunConfig) -> RunConfig:
    """Returns the configuration with absolute paths, because server and devices run in their own folders.

    A repository of timm's hub, or a local copy of one, is replaced by the name and arguments of its model, so that no
    device looks it up.

    Raises:
        ConfigError: if a path begins with the ``~`` of an unknown user.
        ModelError: if the repository or folder does not exist.
    """
    config = with_model_of_hub(config)
    absolute = {option: str(expanded(option, value).absolute()) for option, value in config.paths().items()}
    for option, value in (("data.source", config.data.source), ("data.public", config.data.public)):
        if value.startswith("hf:"):
            absolute[option] = "hf:" + with_absolute_folder(value.removeprefix("hf:"))
    return RunConfig.from_flat(config.flat() | absolute)
