"""Cases of a test of which the default suite runs only those that differ most; `make test-slow` runs the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeVar

import pytest
from _pytest.mark import ParameterSet

T = TypeVar("T")


def some_slow(cases: Iterable[T], slow: Collection[T]) -> list[ParameterSet]:
    """Returns the cases for `parametrize`, those in `slow` marked as slow; a tuple has one value per parameter."""
    values = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    return [pytest.param(*each, marks=pytest.mark.slow if case in slow else []) for case, each in values]
