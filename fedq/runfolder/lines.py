"""A file of JSON lines, one a round: each is handed to the system whole, and what is damaged is left out when it is
gone on with."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedq.files import replace_file, set_aside

_log = logging.getLogger(__name__)


class RoundLines:
    """Rows of rounds. A file that exists already is added to.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.is_dir():
            set_aside(path, "it is a folder")
        self._file = path.open("ab", buffering=0)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, readable when this returns; what is not finite is refused."""
        left = memoryview(json.dumps(row, allow_nan=False).encode() + b"\n")
        while left:  # a disk that fills up takes a part, and refuses the rest
            left = left[self._file.write(left) :]

    def sync(self) -> int:
        """Put all rows on disk, and return their bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def keep_before(self, round: int, num_bytes: int) -> None:
        """Keep the rows of earlier rounds, and say so if some are missing or damaged.

        Args:
            round: The first round whose row is dropped.
            num_bytes: Bytes of the file after the last row that is to stay, as `sync` returned them.
        """
        data = self._path.read_bytes()
        kept = b"".join(line for line in data.splitlines(keepends=True) if _is_of_round_before(line, round))
        if data.startswith(kept):
            self._file.truncate(len(kept))
        else:
            self._replace(kept)
        if len(kept) < num_bytes:
            lost = f"{num_bytes - len(kept)} of {num_bytes} bytes of rows before round {round} are lost"
            _log.warning("%s: %s; the run goes on without them", self._path, lost)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _replace(self, kept: bytes) -> None:
        set_aside(self._path, "some of its lines are damaged")
        replace_file(self._path, kept)
        self._file.close()
        self._file = self._path.open("ab", buffering=0)


def _is_of_round_before(line: bytes, round: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        row = json.loads(line)
        return isinstance(row, dict) and bool(row["round"] < round)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
