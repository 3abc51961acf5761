"""Values of options as text, read by the type a signature gives them: ``0.9/0.99`` for a tuple of two floats.

Which options exist, and what is in range, is the business of the code that calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _one_word(words: dict[str, bool | None]) -> Callable[[str], bool | None]:
    def read(text: str) -> bool | None:
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]

    return read


_READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    NoneType: (_one_word({"none": None}), "none"),  # before str, which takes anything
    bool: (_one_word({"true": True, "false": False}), "true or false"),
    int: (int, "an integer"),
    float: (_finite, "a finite number"),
    str: (str, "a word"),
}


def parse_value(text: str, kind: Any) -> Any:
    """Return the value of type ``kind`` that ``text`` spells.

    Args:
        text: For a tuple, its parts with slashes between; true, false and none in any case.
        kind: bool, int, float, str, None, a union of these (members of other types are never spelled), or a tuple
            of such types.

    Raises:
        ValueError: ``text`` spells no value of that type; a float must be finite.
    """
    if get_origin(kind) is tuple:
        return tuple(parse_value(part, item) for part, item in zip(text.split("/"), get_args(kind), strict=True))
    for choice in _choices(kind):
        try:
            return _READERS[choice][0](text)
        except ValueError:
            continue
    raise ValueError(text)


def describe(kind: Any) -> str:
    """Return in words what `parse_value` accepts for ``kind``."""
    if get_origin(kind) is tuple:
        return "/".join(describe(item) for item in get_args(kind))
    return " or ".join(_READERS[choice][1] for choice in _choices(kind))


def _choices(kind: Any) -> list[Any]:
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [choice for choice in _READERS if choice in members]
