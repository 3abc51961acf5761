"""Spec strings: ``name`` or ``name:option=value,option=value``, and the frozen dataclasses that they name.

A setting that has options of its own is a dataclass for each of its names; their fields are the options, their types
say how a value is read (``0.9/0.99`` is a tuple of two floats), and their ``__post_init__`` says what is in range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fedq.errors import FieldError, one_of


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split ``name:a=1,b=2`` into the name and its options' texts.

    Raises:
        FieldError: An option has no ``=``, or is given twice.
    """
    name, _, rest = spec.strip().partition(":")
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key or key in options:
            raise FieldError("spec", spec, "name:option=value,option=value, each option once")
        options[key] = value.strip()
    return name.strip().lower(), options


def parse(field: str, spec: str, kinds: Mapping[str, type]) -> Any:
    """Return the instance of a dataclass that a spec names.

    Args:
        field: Name of the setting, for errors.
        spec: A name of `kinds`, in any case, then options of that class.
        kinds: Frozen dataclasses by name.

    Raises:
        FieldError: A name or option is unknown, or a value is not allowed; the error names ``field`` and what would be.
    """
    try:
        name, texts = split_spec(spec)
    except FieldError as error:
        raise FieldError(field, spec, error.allowed) from None
    if name not in kinds:
        raise FieldError(field, spec, one_of(kinds, name))
    kind, hints, values = kinds[name], get_type_hints(kinds[name]), {}
    known = [one.name for one in fields(kind)]
    for option, text in texts.items():
        if option not in known:
            allowed = f"options of {name}: {one_of(known, option)}" if known else f"{name} without options"
            raise FieldError(field, spec, allowed)
        try:
            values[option] = parse_value(text, hints[option])
        except ValueError:
            raise FieldError(field, spec, f"{option}={describe(hints[option])}") from None
    try:
        return kind(**values)
    except FieldError as error:
        raise FieldError(field, spec, f"{error.field}: {error.allowed}") from None


def spec_of(value: Any, kinds: Mapping[str, type]) -> str:
    """Return the shortest spec that names an instance: options that have their defaults are left out."""
    name = next(name for name, kind in kinds.items() if kind is type(value))
    defaults = {one.name: one.default for one in fields(value) if one.default is not MISSING}
    given = {one.name: getattr(value, one.name) for one in fields(value)}
    options = [f"{key}={_text(one)}" for key, one in given.items() if key not in defaults or defaults[key] != one]
    return name + (":" + ",".join(options) if options else "")


def with_options(field: str, spec: str, kinds: Mapping[str, type], **options: Any) -> str:
    """Return a spec with some options changed, of those that what it names has; see `parse`."""
    value = parse(field, spec, kinds)
    known = {one.name for one in fields(value)}
    return spec_of(replace(value, **{key: one for key, one in options.items() if key in known}), kinds)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


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
        text: The value in letters; parts of a tuple have slashes between them; true, false and none are in any case.
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
