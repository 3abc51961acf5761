"""How much of a sweep the tests try: everything with ``--all``, a share of it otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings

FEW = 15  # examples of a property that has 100 with --all


def tried(number: int) -> settings:
    """Return settings of a property with so many examples, of which the profile takes its share of a hundred."""
    share = settings.default.max_examples / 100
    return settings(max_examples=min(number, max(3, round(number * share))), deadline=None)


def is_all() -> bool:
    """Return whether everything is tried, as with ``--all``."""
    return settings.default.max_examples >= 100


def few(values: Iterable[Any], keep: int) -> list[Any]:
    """Return the values of a parameter, all but `keep` of them slow; those are as far apart as can be.

    A tuple has the values of several parameters, as in ``parametrize`` itself.
    """
    given = list(values)
    kept = {round(number * (len(given) - 1) / max(1, keep - 1)) for number in range(keep)}
    return [value if number in kept else _slow(value) for number, value in enumerate(given)]


def slow_but_for(values: Iterable[str], *kept: str) -> list[Any]:
    """Return the values of a parameter, all slow but those that are kept."""
    return [value if value in kept else _slow(value) for value in values]


def _slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
