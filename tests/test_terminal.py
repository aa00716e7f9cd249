"""Tables as they are shown: whole, however many columns."""

from __future__ import annotations

import pytest

from experiments.terminal import of_the_system, show_rows


@pytest.mark.parametrize(("columns", "lines"), [(3, 3), (30, 3), (3, 30), (30, 30)])
def test_nothing_of_a_table_is_cut_off(columns: int, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{f"measure {i}": f"{row}.{i:03d} ± 0.01" for i in range(columns)} for row in range(lines)]
    show_rows(rows, as_json=False)
    shown = capsys.readouterr().out
    for row in rows:
        assert all(name in shown and value in shown for name, value in row.items())


def test_what_the_system_refused_is_a_line_that_can_be_read() -> None:
    assert of_the_system(OSError(28, "No space left on device", "/data/x")) == "/data/x: No space left on device"
    assert of_the_system(OSError(28, "No space left on device")) == "No space left on device"
    long = of_the_system(OSError(36, "File name too long", "/data/" + "x" * 5000))
    assert len(long) < 200 and long.startswith("/data/xxx") and long.endswith("xxx: File name too long")
