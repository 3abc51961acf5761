"""Text for people: what others have written, made fit for a log, a table, a terminal and a page, and sizes."""

from __future__ import annotations

import re

_UNITS = ("kB", "MB", "GB", "TB", "PB")
LONGEST = 512
"""Number of characters of a text that are kept."""
# Letters, marks and symbols by their category, but nobody sees them: fillers, joiners, variation selectors.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def clean(text: str | bytes, longest: int = LONGEST) -> str:
    r"""Return a text on one line of characters that can be seen; cleaning it again changes nothing.

    White space, line ends too, becomes one space. What else has no glyph or steers a terminal is spelt as Python does
    (``\x1b``, ``\u202e``): control characters, escapes, marks of direction, characters without width, halves of pairs.

    Args:
        text: Any text; bytes that are no UTF-8 are replaced.
        longest: Number of characters that are kept; where there are more, the last three say so.
    """
    if isinstance(text, bytes):
        text = text[: 4 * longest + 4].decode(errors="replace")
    cut = text[: longest + 1]
    seen = " ".join("".join(map(_visible, cut)).split())
    return seen if len(seen) <= longest and len(text) <= longest else seen[: longest - 3] + "..."


def _visible(character: str) -> str:
    if character.isspace():
        return " "
    if character.isprintable() and not _UNSEEN.match(character):
        return character
    return character.encode("unicode_escape").decode()


def human_bytes(n: float) -> str:
    """Return bytes in the unit a person would choose, three digits, powers of 1000: "812 B", "1.43 MB"."""
    if n < 999.5:
        return f"{n:.0f} B"
    for unit in _UNITS:
        n /= 1000
        if n < 999.5 or unit == _UNITS[-1]:  # 999.5 would round to 1000 of this unit
            break
    return f"{n:.3g} {unit}" if n < 999.5 else f"{n:,.0f} {unit}"
