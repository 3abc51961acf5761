"""Output that every terminal can show: what its encoding lacks is written with ASCII characters, and never raises.

Programs call `make_readable` once, before they print. What is written into files is always UTF-8.
"""

# ruff: noqa: RUF001 - look-alikes are what this is about

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from collections.abc import Mapping

_ERRORS = "fedq.readable"
_PLAIN = {
    **{"±": "+-", "×": "x", "·": "*", "÷": "/", "−": "-", "≈": "~", "≠": "!=", "≤": "<=", "≥": ">=", "∞": "inf"},
    **{"→": "->", "←": "<-", "↔": "<->", "⇒": "=>", "↑": "^", "↓": "v"},
    **{"‐": "-", "‑": "-", "‒": "-", "–": "-", "—": "-", "…": "...", "•": "*", "●": "*", "○": "o"},
    **{"‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"', "′": "'", "″": '"'},
    **{"°": " deg", "µ": "u", "μ": "u", "σ": "sigma", "Δ": "delta", "√": "sqrt", "‖": "||", "✓": "ok", "✗": "x"},
    **{"²": "^2", "³": "^3", "¹": "^1", "ᵀ": "^T", "½": "1/2", "¼": "1/4", "¾": "3/4"},
}
_BOXES, _BLOCKS, _SPINNERS = range(0x2500, 0x2580), range(0x2580, 0x25A0), range(0x2800, 0x2900)


def make_readable(environ: Mapping[str, str] = os.environ) -> None:
    """Let standard output and error write ASCII equivalents of the characters that their encoding lacks.

    A locale that somebody has set to C is taken at its word, though Python writes UTF-8 there unless told otherwise.
    """
    encoding = "ascii" if _is_plain(environ) else None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not what a notebook or a test has put there
            stream.reconfigure(encoding=encoding, errors=_ERRORS)


def plain(character: str) -> str:
    """Return a character in ASCII: its equivalent, or else its number as Python writes it."""
    if character in _PLAIN:
        return _PLAIN[character]
    if ord(character) in _BOXES:
        return _line(unicodedata.name(character))
    if ord(character) in _BLOCKS or ord(character) in _SPINNERS:
        return "#" if ord(character) in _BLOCKS else "*"
    if character.isspace():
        return " "
    return character.encode("ascii", "backslashreplace").decode("ascii")


def _line(name: str) -> str:
    """Return what stands for a piece of a table's frame: where lines meet or turn, a cross."""
    ways = {way for way in ("HORIZONTAL", "VERTICAL", "LEFT", "RIGHT", "UP", "DOWN", "DIAGONAL") if way in name}
    if ways <= {"HORIZONTAL", "LEFT", "RIGHT"}:
        return "-"
    return "|" if ways <= {"VERTICAL", "UP", "DOWN"} else "+"


def _is_plain(environ: Mapping[str, str]) -> bool:
    is_told = environ.get("PYTHONIOENCODING") or environ.get("PYTHONUTF8") or "utf8" in sys._xoptions
    return environ.get("LC_ALL") in ("C", "POSIX") and not is_told


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(plain, error.object[error.start : error.end])), error.end


codecs.register_error(_ERRORS, _replace)
