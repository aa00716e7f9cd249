"""Secrets and private file names are in no file of a run and in no line that it prints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_inprocess_run import tapfl

from tapfl.data.sources import load_images

SECRETS = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")


def test_no_secret_of_the_environment_and_no_private_file_name_is_disclosed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "hunter2")
    digits = load_images("digits")
    for number in np.arange(300):
        folder = tmp_path / ("pool" if number % 2 else "private") / str(digits.labels[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.read()[number, :, :, 0]).save(folder / f"aunt-mary-{number}.png")
    options = [
        f"data.source={tmp_path / 'private'}",
        f"data.public={tmp_path / 'pool'}",
        "devices.count=3",
        "train.rounds=1",
        "model.args=img_size=8,patch_size=2,embed_dim=32,depth=2,num_heads=2",
    ]
    done = tapfl("--out", str(tmp_path / "run"), cache=cache, options=options, report="--report")
    assert done.exit_code == 0, done.output
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {"summary.json", "report.html", "config.json"} <= {file.name for file in files}
    for where, said in [("the screen", done.output.encode()), *((file.name, file.read_bytes()) for file in files)]:
        assert b"hunter2" not in said and b"aunt-mary" not in said, where
