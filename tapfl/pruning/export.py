"""Export of a pruned model: ONNX, torch.export and TorchScript.

A file is read back and compared with the model before it gets its final name, so every exported file computes what the
model computes.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from tapfl.errors import ConfigError, RunError, message_of
from tapfl.models.forward import example_input, transform_of
from tapfl.pruning.plan import PruningPlan
from tapfl.seeds import torch_generator
from tapfl.store import whole_file

TOLERANCE = 1e-4  # largest accepted difference of a logit
ONNX_BYTES = 2**31 - 2**20  # capacity of one protobuf message
ABOUT = "tapfl.json"  # the file with the metadata in torch's archives; ONNX has metadata of its own

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """A written file, and how its logits differ from the model's on random inputs of `batches_checked` images."""

    file: Path
    format: str
    bytes: int
    batches_checked: tuple[int, ...]
    max_abs_difference: float
    top1_equal: bool


def export(
    model: nn.Module,
    plan: PruningPlan,
    file: Path | str,
    format: str = "onnx",
    batch: int | None = None,
    opset: int | None = None,
) -> Exported:
    """Writes `model` to `file`, with the backbone's name, its input and the plan's checksum as metadata.

    Args:
        model: as `load_pruned` returns it.
        plan: its pruning plan.
        format: a key of `FORMATS`.
        batch: batch size; None makes it dynamic.
        opset: ONNX operator set; None takes the exporter's.

    Raises:
        ConfigError: if an argument is invalid, a package is missing, or `file` exists or cannot be written.
        RunError: if the format cannot represent the model, or the file computes something else. No file is left then.
    """
    file = Path(file)
    if format not in FORMATS:
        raise ConfigError(f"format = {format!r}: accepted are {', '.join(FORMATS)}")
    if batch is not None and batch < 1:
        raise ConfigError(f"batch = {batch}: must be at least 1, or dynamic")
    if opset is not None and format != "onnx":
        raise ConfigError(f"opset = {opset}: is for format onnx, not for {format}")
    if file.exists():
        raise ConfigError(f"out = {str(file)!r}: exists already; give a file that does not")
    write, read, packages = FORMATS[format]
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ConfigError(f"format = {format!r}: needs {', '.join(missing)}, of the extra tapfl[export]")
    if opset is not None and not 0 < opset <= _newest_opset():
        raise ConfigError(f"opset = {opset}: accepted are 1 to {_newest_opset()}, if torch's exporter writes them")
    batches = (batch,) if batch else (1, 3)
    try:
        with whole_file(file) as temporary:
            with _quiet():
                try:
                    write(model, temporary, _about(model, plan), batch, opset)
                except (ConfigError, RunError, OSError):
                    raise
                except Exception as error:  # torch's exporters raise many types when they cannot represent a model
                    named = format + (f", opset = {opset}" if opset else "")
                    raise RunError(f"{named}: cannot represent this model ({message_of(error)})") from None
                difference, same = _check(model, read(temporary), batches)
            if not (difference <= TOLERANCE and same):
                how = f"logits differ by {difference:.2g}" + ("" if same else ", top-1 too")
                raise RunError(f"{file}: the outputs of {format} differ from the model's ({how}); the file was removed")
            size = temporary.stat().st_size
    except OSError as error:
        raise ConfigError(f"out = {str(file)!r}: cannot be written ({error.strerror})") from None
    return Exported(file, format, size, batches, difference, same)


def load_exported(file: Path | str, format: str = "onnx") -> Forward:
    """Returns an exported model as a function of images (n, channels, height, width); ONNX on one thread."""
    with _quiet():
        return FORMATS[format][1](Path(file))


def _about(model: nn.Module, plan: PruningPlan) -> dict[str, str]:
    transform = transform_of(model)
    return {
        "tapfl": metadata.version("tapfl"),
        "backbone": plan.backbone.name,
        "arguments": json.dumps(plan.backbone.args, sort_keys=True),
        "classes": str(plan.backbone.num_classes),
        "plan": plan.checksum,
        "input": json.dumps([transform.channels, *transform.size]),
        "mean": json.dumps(transform.mean),
        "std": json.dumps(transform.std),
    }


@torch.no_grad()
def _check(model: nn.Module, exported: Forward, batches: Sequence[int]) -> tuple[float, bool]:
    """Returns the largest difference of a logit on normally distributed inputs, and whether every top-1 is equal."""
    difference, same = 0.0, True
    for batch in batches:
        x = torch.randn(example_input(model, batch).shape, generator=torch_generator(0, "export", batch))
        want, got = model(x), exported(x)
        if want.shape != got.shape or not bool(got.isfinite().all()):
            return float("inf"), False
        difference = max(difference, float((want - got).abs().max()))
        same &= bool((want.argmax(1) == got.argmax(1)).all())
    return difference, same


# ---------------------------------------------------------------- the formats


def _program(model: nn.Module, batch: int | None) -> torch.export.ExportedProgram:
    """Returns the graph of `model`. A dynamic batch is traced with two images, because torch specialises on size 1."""
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (example_input(model, batch or 2),), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds paths of the machine that exports it
    return program


def _write_program(model: nn.Module, file: Path, about: Mapping[str, str], batch: int | None, _: int | None) -> None:
    with file.open("wb") as stream:
        torch.export.save(_program(model, batch), stream, extra_files={ABOUT: json.dumps(about)})


def _read_program(file: Path) -> Forward:
    with file.open("rb") as stream:
        return torch.export.load(stream).module()


def _write_script(model: nn.Module, file: Path, about: Mapping[str, str], batch: int | None, _: int | None) -> None:
    traced = torch.jit.trace(model, example_input(model, batch or 2), check_trace=False)
    torch.jit.save(traced, str(file), _extra_files={ABOUT: json.dumps(about).encode()})


def _write_onnx(model: nn.Module, file: Path, about: Mapping[str, str], batch: int | None, opset: int | None) -> None:
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if weights > ONNX_BYTES:
        raise RunError(f"onnx: a file can hold at most 2 GB, and the weights have {weights / 1e9:.1f} GB")
    program = torch.onnx.export(
        _program(model, batch), input_names=["images"], output_names=["logits"], opset_version=opset, verbose=False
    )
    assert program is not None  # only the old exporter returns None
    proto = program.model_proto
    got = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and got != opset:
        raise ConfigError(f"opset = {opset}: torch's exporter does not write it (it wrote {got})")
    for node in proto.graph.node:
        del node.metadata_props[:]  # the exporter's debug information can be larger than the weights of a small model
    for key, value in about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    file.write_bytes(proto.SerializeToString())


def _newest_opset() -> int:
    import onnx

    return int(onnx.defs.onnx_opset_version())


def _read_onnx(file: Path) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises exception types of its C++ code
        raise RunError(f"onnxruntime cannot load the file ({message_of(error)})") from None
    (images,) = (entry.name for entry in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {images: x.numpy()})[0])


Writer = Callable[[nn.Module, Path, Mapping[str, str], int | None, int | None], None]
FORMATS: dict[str, tuple[Writer, Callable[[Path], Forward], tuple[str, ...]]] = {
    "onnx": (_write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": (_write_program, _read_program, ()),
    "torchscript": (_write_script, lambda file: torch.jit.load(str(file)), ()),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
