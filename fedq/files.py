"""Files that survive a crash: a reader sees the old bytes or the new ones, never a mixture; and what is in the way."""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedq.errors import FieldError

_OF_DISKS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "ESTALE", "ENXIO", "ENODEV")
    if hasattr(errno, name)
}
_log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside ``path`` that takes its place, durably and in one step, if the block ends well.

    A folder that lies where one of them goes is set aside.
    """
    temporary = path.with_name(path.name + ".tmp")
    for place in (path, temporary):
        if place.is_dir():
            set_aside(place, "it is a folder")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writable(field: str, path: Path) -> Iterator[None]:
    """Turn an error of writing a file in the body into a `FieldError` that names the setting."""
    try:
        yield
    except OSError as error:
        raise FieldError(field, str(path), f"a file that can be written ({error.strerror})") from None


def replace_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file durably and put it in place of the old one in one step."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        for part in parts:
            file.write(part)


def is_of_disk(error: OSError) -> bool:
    """Whether an error has a reason that only a disk has: it is full, over its quota, broken or read-only."""
    return error.errno in _OF_DISKS


def describe(error: OSError) -> str:
    """Return what the system says, and of which file where it is known."""
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def set_aside(path: Path, why: str) -> None:
    """Move what cannot be used out of the way, and say so in a line."""
    beside = move_aside(path)
    _log.warning("%s cannot be used (%s): it is kept as %s, and begun anew", path, why, beside.name)


def move_aside(path: Path) -> Path:
    """Rename something to the first free of ``path.damaged``, ``path.damaged-2``..., and return that."""
    names = (f"{path.name}.damaged{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
    beside = next(place for name in names if not os.path.lexists(place := path.with_name(name)))
    os.replace(path, beside)
    return beside


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if need be; what else lies in its place is set aside."""
    if os.path.lexists(path) and not path.is_dir():
        with suppress(FileNotFoundError):  # another rank was quicker
            set_aside(path, "it is no folder")
    path.mkdir(parents=True, exist_ok=True)


def read_or_nothing(path: Path) -> str:
    """Return a small file's text; an empty one where it is missing, is no file, or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
