"""Cache keys: a cached result was computed from the same inputs, in every respect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from strategies.round_zero import describe_pool
from tapfl.config import RunConfig
from tapfl.data.images import ImageSet
from tapfl.models.backbone import build, spec_of

TINY = "img_size=8,patch_size=2,in_chans=1,embed_dim=32,depth=2,class_token=True"


@pytest.mark.parametrize("other", ["num_heads=4", "num_heads=2,act_layer=relu"])
def test_another_architecture_with_the_same_weights_has_other_features(other: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = ImageSet.of(generator.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), np.arange(40) % 2, ("a", "b"))
    means = []
    for args in (f"{TINY},num_heads=2", f"{TINY},{other}"):
        config = RunConfig.from_flat({"model.args": args, "cache": str(tmp_path)})
        model = build(spec_of(config.model, images.classes), seed=0).eval()
        means.append(describe_pool(config, images, model).projection.mean)
    assert not np.allclose(*means)
