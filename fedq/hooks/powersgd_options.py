"""What a spec such as ``powersgd:rank=2,start=10`` says."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedq.codecs import Codec
from fedq.errors import FieldError, one_of
from fedq.specs import split_spec

_LEAST = {"rank": 1, "start": 2}


@dataclass(frozen=True)
class PowerSGDOptions:
    """The options of PowerSGD.

    Args:
        rank: Columns of P and Q; of a smaller matrix, its smaller side.
        start: Steps before compression starts, in which float32 gradients travel; PyTorch demands 2 or more.
    """

    rank: int = 2
    start: int = 10

    @classmethod
    def parse(cls, spec: str) -> PowerSGDOptions:
        """Read a spec.

        Raises:
            FieldError: Another name, an unknown option, or a value that is not allowed.
        """
        name, options = split_spec(spec)
        if name != "powersgd":
            raise FieldError("exchange", spec, "powersgd:rank=2,start=10")
        for option, text in options.items():
            if option not in _LEAST:
                raise FieldError("powersgd:option", option, one_of(_LEAST, option))
            if not re.fullmatch("[0-9]+", text) or int(text) < _LEAST[option]:
                raise FieldError(f"powersgd:{option}", text, f"a whole number, {_LEAST[option]} or more")
        return cls(**{option: int(text) for option, text in options.items()})


def is_powersgd(spec: str | Codec) -> bool:
    """Return whether a spec means PowerSGD."""
    return isinstance(spec, str) and split_spec(spec)[0] == "powersgd"
