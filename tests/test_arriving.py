"""`adapters.blocks`: what enters the first adapter of a model is computed once and cached by the worker."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import Tiny
from recording import Recording
from test_inprocess_run import content, tapfl
from test_lora import device, later, only, with_noise

from clients import caches
from clients.caches import AdaptedDevice, Arriving, Part
from tapfl.compute import HERE, Compute
from tapfl.config import RunConfig
from tapfl.config import binding as bound
from tapfl.data.images import ImageSet
from tapfl.data.transform import Transform
from tapfl.memo import Memo
from tapfl.models.merging import merging
from tapfl.personalize import method, together

BLOCKS = {"adapters.blocks": 1}


def own(backbone: Tiny) -> tuple[AdaptedDevice, dict[str, torch.Tensor]]:
    """A model with adapters in the second half of its layers, and values for them."""
    _, layout, params = device(backbone, 0.5, 2)
    layout = {name: layout[name] for name in later(params, backbone)}
    made = AdaptedDevice(layout, only(backbone, layout), {}, (), 0, backbone.spec.name)
    return made, with_noise({name: params[name] for name in layout}, 1)


@pytest.fixture
def part(vit: Tiny) -> Part:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 1), dtype=np.uint8)
    images = ImageSet.of(pixels, np.arange(150) % 3, ("a", "b", "c"))
    transform = Transform((8, 8), 1, (0.5,), (0.5,))
    return Part(images, torch.arange(150) % 3, transform, HERE, 2**20, "part")


@pytest.mark.parametrize("family", ["vit", "deit", "swin", "merged"])
def test_a_model_continues_from_the_input_of_its_first_adapter(family: str, families: dict[str, Tiny]) -> None:
    backbone = families.get(family, families["vit"])
    made, params = own(backbone)
    if family == "merged":  # the first of two blocks merges, so the input consists of tokens and their sizes
        merging(made.adapted.model, (3, 2))
        made.adapted._divide()
    arriving = made.adapted.before(backbone.inputs)
    assert torch.equal(made.adapted.beyond(params, arriving), made.adapted(params, backbone.inputs))
    assert len(made.adapted.prefix) > 1 and made.adapted.beyond.before(arriving) is arriving


def test_an_image_is_the_same_in_every_batch_and_after_it_was_evicted(vit: Tiny, part: Part) -> None:
    made, _ = own(vit)
    first, again = (Arriving.of(part, made.adapted) for _ in range(2))
    assert torch.equal(first.stream, again.stream) and first.nbytes == 150 * made.adapted.bytes_before
    chosen = np.array([149, 3, 77])
    torch.testing.assert_close(first.batch(chosen), made.adapted.before(part.batch(chosen)), rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([*first.split(40)])[chosen], first.batch(chosen))


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("train", {}, True),
        ("test", {}, True),
        ("pooled", {}, False),
        ("train", {"adapters.blocks": 0}, False),
        ("train", {"train.augment": "flip"}, False),
        ("test", {"train.augment": "flip"}, True),
        ("train", {"train.steps": 4, "train.batch": 32}, False),  # 128 of 150 images
        ("train", {"train.steps": 5, "train.batch": 32}, True),
        ("test", {"train.steps": 4, "train.batch": 32}, True),
    ],
)
def test_the_options_determine_what_is_kept(
    name: str, options: dict[str, Any], kept: bool, vit: Tiny, part: Part
) -> None:
    (made, _), config = own(vit), RunConfig.from_flat(BLOCKS | options)
    model, inputs = caches.inputs(made, part, name, config)
    assert isinstance(inputs, Arriving) == kept and (inputs is part) != kept
    assert model is (made.adapted.beyond if kept else made.adapted)


def test_what_does_not_fit_the_cache_is_not_kept_and_the_size_then_binds_the_run(
    vit: Tiny, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = own(vit)
    config = RunConfig.from_flat(BLOCKS | {"compute.cache-mb": 1})
    assert 150 * made.adapted.bytes_before < 2**20
    assert isinstance(caches.inputs(made, part, "train", config)[1], Arriving)
    monkeypatch.setattr(made.adapted, "bytes_before", 2**20 // 150 + 1)
    assert caches.inputs(made, part, "train", config)[1] is part
    assert "compute.cache-mb" in bound(config.flat())
    assert "compute.cache-mb" not in bound(RunConfig().flat()) and "data.cache-gb" not in bound(config.flat())


def test_a_run_has_the_same_bits_without_cache_and_with_recorded_steps_and_when_resumed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices also step together from the cached input."""
    options = ["adapters.blocks=1", "train.together=2", "train.batch=8", "train.epochs=3"]
    options += ["devices.count=2", "data.public-share=0.9"]
    sizes, real = [], together.together

    def noted(tasks: list[together.LocalTask], model: together.StackedModel) -> list[together.Outcome]:
        sizes.append((len(tasks), len(model.prefix)))
        return real(tasks, model)

    monkeypatch.setattr(together, "together", noted)
    held, dropped = tmp_path / "held", tmp_path / "dropped"
    assert tapfl("--out", str(held), cache=cache, options=options).exit_code == 0
    assert sizes == [(2, 0)] * 2  # two devices, two rounds
    monkeypatch.setattr(caches, "kept", memo := Memo(0, lambda each: each.nbytes))
    monkeypatch.setattr(memo, "once", partial(memo.once, keep=lambda each: not isinstance(each, Arriving)))
    monkeypatch.setattr(Compute, "recorder", recording := Recording())
    monkeypatch.setattr(method, "WORTH", 1)
    for more in (["--out", str(dropped)], ["--resume", str(dropped)]):
        rounds = ["train.rounds=1"] if more[0] == "--out" else []
        assert tapfl(*more, cache=cache, options=[*options, *rounds]).exit_code == 0
    assert recording.replayed >= recording.recorded >= 2
    assert content(dropped) == content(held)
