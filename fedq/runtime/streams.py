"""Standard output and error that nobody may read any more: what is said is then lost, and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_LOST = (OSError, ValueError)
"""Errors of writing once the reader, the terminal or the stream is gone; UnicodeError, a ValueError, is not meant."""


class Lasting:
    """A text stream that goes on without its reader: from the first failure on it is a silent one.

    Args:
        stream: Stream that is written to while it can be.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, as far as anybody reads it."""
        try:
            return self._stream.write(text)
        except UnicodeError:
            raise
        except _LOST:
            self._silence()
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            self._stream.flush()
        except _LOST:
            self._silence()

    def isatty(self) -> bool:
        """Whether a terminal is there."""
        with suppress(*_LOST):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _silence(self) -> None:
        """Let the descriptor lead nowhere, so that what is still buffered can be flushed; or at least this object."""
        with suppress(*_LOST, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            finally:
                os.close(nowhere)
            return
        self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, it lasts as long as the process


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let standard output and error go on without their readers for the body, and for what it leaves unflushed."""
    before = sys.stdout, sys.stderr
    lasting = [None if stream is None else Lasting(stream) for stream in before]
    sys.stdout, sys.stderr = (cast("TextIO", stream) for stream in lasting)
    try:
        yield
    finally:
        for stream in lasting:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
