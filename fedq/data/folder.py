"""Reader of ImageFolder directories: one sub-folder a class, optionally under ``train/`` and ``test/`` or ``val/``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedq.data.source import Chunk, Contents, DataError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
TEST_FOLDERS = ("test", "val")
_FILES = 64  # files a chunk: large enough to keep a thread busy, small enough that a progress bar moves


@dataclass(frozen=True)
class ImageFiles:
    """Image files and their labels, training files first; ``num_test`` is 0 without a test folder."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    num_test: int
    class_names: tuple[str, ...]


def find_images(folder: Path) -> ImageFiles | None:
    """List an ImageFolder directory, or return None if it has no sub-folders.

    Raises:
        DataError: Fewer than two classes, a training class without images, or a test class unknown to training.
    """
    train = folder / "train" if (folder / "train").is_dir() else folder
    class_names = _class_names(train)
    if not class_names:
        return None
    if len(class_names) < 2:
        raise DataError(train, f"only one class folder ({class_names[0]}); expected two or more")
    test = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None) if train != folder else None
    train_files, train_labels = _list(train, class_names)
    for label in sorted(set(range(len(class_names))) - set(train_labels)):
        raise DataError(
            train / class_names[label], f"no image of this class; file types: {', '.join(sorted(SUFFIXES))}"
        )
    test_files, test_labels = ([], []) if test is None else _list(test, class_names)
    if test is not None and not test_files:
        raise DataError(test, "no images in this folder")
    return ImageFiles((*train_files, *test_files), (*train_labels, *test_labels), len(test_files), class_names)


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _list(folder: Path, class_names: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    files: list[Path] = []
    labels: list[int] = []
    for name in _class_names(folder):
        if name not in class_names:
            raise DataError(folder / name, f"not a class of the training folder: {', '.join(class_names)}")
        found = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        files += found
        labels += [class_names.index(name)] * len(found)
    return files, labels


def read_images(images: ImageFiles) -> Contents:
    """Open a listed directory."""

    def chunks() -> Iterator[Chunk]:
        for first in range(0, len(images.files), _FILES):
            items = images.files[first : first + _FILES]
            yield Chunk(items[0], first, items)

    return Contents(np.array(images.labels, dtype=np.int64), images.num_test, images.class_names, chunks)
