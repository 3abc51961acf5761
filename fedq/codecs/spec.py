"""Codecs by spec string, alone or as a schedule by round."""

from __future__ import annotations

import re

from fedq.codecs.base import Codec, make
from fedq.errors import FieldError
from fedq.specs import split_spec


def codec(spec: str | Codec) -> Codec:
    """Return the codec that a spec string names, for example ``codec("int4:block=256")``.

    Raises:
        FieldError: The codec or an option is unknown, or a value is not allowed; the text lists what is. PowerSGD is no
            codec: its messages are sums over all ranks, and no rank can decode one alone.
    """
    if isinstance(spec, Codec):
        return spec
    if split_spec(spec)[0] == "powersgd":
        ways = "--exchange step --uplink powersgd:rank=2, or fedq.hooks.register(ddp_model, 'powersgd:rank=2')"
        raise FieldError("codec", spec, f"a codec; powersgd is an exchange of gradients: {ways}")
    return make(*split_spec(spec))


def codec_schedule(spec: str) -> tuple[tuple[int, Codec], ...]:
    """Return the codecs that a schedule names, each with its first round, counted from 0.

    Args:
        spec: A codec's spec, or several with the round from which each serves: ``"int4 sign@7"`` is int4 in rounds 1
            to 6 and sign from round 7 on (rounds are counted from 1, as reports do).

    Raises:
        FieldError: A codec does not exist, or rounds do not rise from the first codec on.
    """
    if "@" not in spec:
        return ((0, codec(spec)),)
    entries: list[tuple[int, Codec]] = []
    for part in spec.split():
        name, at, first = part.partition("@")
        start = int(first) - 1 if re.fullmatch(r"[0-9]+", first) else -1
        if bool(at) != bool(entries) or (at and start <= entries[-1][0]):
            allowed = "one codec, or several with rising rounds such as 'int4 sign@7': from round 7 on"
            raise FieldError("codec schedule", spec, allowed)
        entries.append((start if at else 0, codec(name)))
    return tuple(entries)
