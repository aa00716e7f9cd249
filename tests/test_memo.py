"""`Memo`: which results it keeps, and which it drops."""

from __future__ import annotations

from tapfl.memo import Memo


def test_the_least_recently_used_result_is_dropped_first() -> None:
    made: list[str] = []
    memo = Memo(2)
    for key in ("a", "b", "a", "c", "a", "b"):
        assert memo.once(key, lambda key=key: made.append(key) or key) == key  # type: ignore[func-returns-value]
    assert made == ["a", "b", "c", "b"]


def test_results_are_limited_by_their_size() -> None:
    made: list[int] = []
    memo = Memo(10, lambda result: result)
    for size in (4, 6, 4, 3, 6, 12, 12, 3):
        assert memo.once(size, lambda size=size: made.append(size) or size) == size  # type: ignore[func-returns-value]
    assert made == [4, 6, 3, 6, 12, 3]
