"""Spec strings: ``name`` or ``name:option=value,option=value``, one grammar for codecs, partitions and servers."""

from __future__ import annotations

from fedq.codecs.base import Codec, make
from fedq.errors import FieldError


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split ``name:a=1,b=2`` into the name and its options' texts.

    Raises:
        FieldError: An option without ``=``, or one that is given twice.
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


def codec(spec: str | Codec) -> Codec:
    """Return the codec that a spec string names, for example ``codec("int4:block=256")``.

    Raises:
        FieldError: Unknown codec or option, or a value that is not allowed; the text lists what is.
    """
    if isinstance(spec, Codec):
        return spec
    return make(*split_spec(spec))
