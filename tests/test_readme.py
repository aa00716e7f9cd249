"""The library example of docs/pruning.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "pruning.md").read_text()


@pytest.mark.parametrize("depth", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_the_library_snippet_runs_in_fifteen_lines(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    body = [line for line in snippet.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(body) <= 15
    monkeypatch.chdir(tmp_path)
    model = '"deit_tiny_patch16_224", args={"img_size": 32'
    assert model in snippet
    snippet = snippet.replace(model, f'{model}, "depth": {depth}')
    exec(compile(snippet, "docs/pruning.md", "exec"), {})
    share, shape = capsys.readouterr().out.split(" ", 1)
    assert 0.4975 <= float(share) <= 0.5 and "[4, 10]" in shape
    assert {file.name for file in (tmp_path / "phone").iterdir()} == {"plan.json", "model.safetensors"}
