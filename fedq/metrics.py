"""What a run is judged by: a metric's name, its unit, and whether less or more of it is better."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from fedq.errors import FieldError, one_of

Direction = Literal["lower", "higher"]
MOST_CHARACTERS = 64


@dataclass(frozen=True)
class Metric:
    """A number that evaluation returns.

    >>> mse = Metric("mse", "K^2")
    >>> mse.text(0.25), mse.is_better(0.25, 0.5)
    ('0.2500 K^2', True)

    Args:
        name: Key of the metric in what evaluation returns; a run's files have it as ``val_<name>``.
        unit: Unit of the values as they are, such as ``K^2`` or ``%``; empty if they have none.
        better: Direction of better values: ``lower`` or ``higher``.

    Raises:
        FieldError: The name, unit or direction cannot be used.
    """

    name: str
    unit: str = ""
    better: Direction = "lower"

    def __post_init__(self) -> None:
        allowed = f"text of 1 to {MOST_CHARACTERS} characters in one line, without blanks around it"
        if not _is_plain(self.name) or not self.name:
            raise FieldError("metric's name", self.name, allowed)
        if not _is_plain(self.unit):
            raise FieldError("metric's unit", self.unit, f"empty, or {allowed}")
        if self.better not in get_args(Direction):
            raise FieldError("metric's better", self.better, one_of(get_args(Direction), self.better))

    @property
    def label(self) -> str:
        """Name and unit, as for an axis: "mse, K^2"."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def is_better(self, a: float | None, b: float | None) -> bool:
        """Return whether ``a`` is better than ``b``, and not equal to it; none, or one not finite, is the worst."""
        if a is None or not math.isfinite(a):
            return False
        if b is None or not math.isfinite(b):
            return True
        return a < b if self.better == "lower" else a > b

    def best(self, values: Iterable[float | None]) -> float | None:
        """Return the best value; None if none is finite."""
        best: float | None = None
        for value in values:
            if self.is_better(value, best):
                best = value
        return best

    def text(self, value: float | None) -> str:
        """Return a value for people, with four digits and its unit; "-" for none."""
        if value is None or not math.isfinite(value):
            return "-"
        return f"{digits(value)} {self.unit}".rstrip()


def digits(value: float) -> str:
    """Return four significant digits: "0.02500", "12.30", "12,300", "1.230e-05"."""
    size = abs(value)
    if value == 0:
        return "0"
    if size < 0.9995e-3 or size >= 1e9:
        return f"{value:.3e}"
    return f"{value:,.0f}" if size >= 999.95 else f"{value:#.4g}"


def _is_plain(text: object) -> bool:
    is_text = isinstance(text, str) and len(text) <= MOST_CHARACTERS
    return is_text and str(text).isprintable() and str(text) == str(text).strip()
