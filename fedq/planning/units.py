"""Bandwidths and durations as people write them: ``1Gbit``, ``12.5MB/s``, ``50us``."""

from __future__ import annotations

import math
import re

from fedq.errors import FieldError

BANDWIDTH_FORMS = "100Mbit, 1Gbit/s (bits a second), 12.5MB/s or 1.2GiB/s (bytes a second); above 0"
DURATION_FORMS = "1s, 1ms, 50us or 300ns"
_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BYTES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER = r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*"


def parse_bandwidth(text: str, field: str = "bandwidth") -> float:
    """Return bytes a second.

    The unit has to say bits (any case, ``/s`` may be left out) or bytes (``B/s``): "1 Gb" may mean either.

    Raises:
        FieldError: The text is no number with one of the units above, or the number is not above 0.
    """
    bits = re.fullmatch(_NUMBER + "([kmgt]?)bit(?:/s)?", text, re.IGNORECASE)
    nbytes = re.fullmatch(_NUMBER + "(k|K|M|G|T|Ki|Mi|Gi)?B/s", text)
    value = 0.0
    if bits:
        value = float(bits[1]) * _BITS[bits[2].lower()] / 8
    elif nbytes:
        value = float(nbytes[1]) * _BYTES[nbytes[2] or ""]
    if not 0 < value < math.inf:
        raise FieldError(field, text, BANDWIDTH_FORMS)
    return value


def parse_duration(text: str, field: str = "latency") -> float:
    """Return seconds.

    Raises:
        FieldError: The text is no number, 0 or more, with one of the units above.
    """
    found = re.fullmatch(_NUMBER + "(s|ms|us|µs|ns)", text)
    value = float(found[1]) * _SECONDS[found[2]] if found else math.nan
    if not 0 <= value < math.inf:
        raise FieldError(field, text, DURATION_FORMS)
    return value


def bandwidth_text(value: float) -> str:
    """Return bytes a second in bits, three digits: "1.25 Gbit/s"."""
    bits = 8 * value
    for unit in ("bit/s", "kbit/s", "Mbit/s", "Gbit/s"):
        if bits < 999.5:
            return f"{bits:.3g} {unit}"
        bits /= 1000
    return f"{bits:.3g} Tbit/s"


def duration_text(seconds: float) -> str:
    """Return a duration, three digits: "1.25 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}" if seconds < 9999.5 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"
