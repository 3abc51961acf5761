"""Files that survive a crash: a reader sees the old bytes or the new ones, never a mixture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedq.errors import FieldError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside ``path`` that takes its place, durably and in one step, if the block ends well."""
    temporary = path.with_name(path.name + ".tmp")
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


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
