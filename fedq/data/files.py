"""Which files of a folder are data: hidden ones are left out, links are followed, and no folder is entered twice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedq.data.source import DataError

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")
"""Names of the splits, as the Hub knows them; of several test splits the first is reported on."""
_NOT_DATA = frozenset(
    {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)  # folders that archivers, interpreters and file systems leave behind, some with thumbnails


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, by name; none where there is no such folder.

    Raises:
        DataError: The folder cannot be read.
    """
    if not folder.is_dir():
        return []
    try:
        with os.scandir(folder) as found:
            shown = [entry for entry in found if not entry.name.startswith(".") and entry.name not in _NOT_DATA]
    except OSError as error:
        raise DataError(folder, f"this folder cannot be read: {error.strerror}") from error
    return sorted(shown, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link that leads nowhere or to itself is none."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry))


def sub_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, by name.

    Raises:
        DataError: The folder cannot be read, or a link in it leads nowhere: it may have been a folder.
    """
    return [Path(entry) for entry in _checked(folder) if is_folder(entry)]


def split_folder(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """Return the folder of the first of these names of a split, in capitals or not, or None.

    Raises:
        DataError: Two folders have that name.
    """
    for name in names:
        found = [place for place in folders if place.name.lower() == name]
        if len(found) > 1:
            raise DataError(found[0].parent, f"two folders of one split: {', '.join(place.name for place in found)}")
        if found:
            return found[0]
    return None


def files_below(folder: Path, entered: set[str]) -> list[Path]:
    """Return every file below a folder, links followed, in no order that means anything.

    Args:
        folder: Folder to begin with.
        entered: Real paths of folders that are not entered; those that are entered join them, so that links end.

    Raises:
        DataError: A folder cannot be read, or a link leads nowhere: it may have been a folder.
    """
    real = os.path.realpath(folder)
    if real in entered:
        return []
    entered.add(real)
    files: list[Path] = []
    for entry in _checked(folder):
        if is_folder(entry):
            files += files_below(Path(entry), entered)
        elif entry.is_file():
            files.append(Path(entry))
    return files


def _checked(folder: Path) -> list[os.DirEntry[str]]:
    found = entries(folder)
    for entry in found:
        if entry.is_symlink() and not os.path.exists(entry):
            raise DataError(Path(entry), f"this link leads to {os.readlink(entry)}, where nothing can be read")
    return found
