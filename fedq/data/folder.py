"""Reader of ImageFolder directories: one sub-folder a class, optionally under ``train/`` and ``test/`` or ``val/``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedq.data.files import TEST_NAMES, TRAIN_NAMES, files_below, split_folder, sub_folders
from fedq.data.source import Chunk, Contents, DataError

SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
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

    Hidden files and folders are left out. Links are followed, but not back to a folder that they lie in.

    Raises:
        DataError: Fewer than two classes, a training class without images, a test class unknown to training, a link
            that leads nowhere, or a folder whose images would be of two classes.
    """
    places = sub_folders(folder)
    train, test = split_folder(places, TRAIN_NAMES) or folder, split_folder(places, TEST_NAMES)
    class_names = tuple(place.name for place in sub_folders(train))
    if not class_names:
        return None
    if train == folder and test is not None and (sub_folders(test) or _are_splits(class_names)):
        raise DataError(test, f"a test set without a training set: there is no {folder / 'train'}")
    if len(class_names) < 2:
        raise DataError(train, f"only one class folder ({class_names[0]}); expected two or more")
    train_files, train_labels = _list(train, class_names)
    for label in sorted(set(range(len(class_names))) - set(train_labels)):
        raise DataError(
            train / class_names[label], f"no image of this class; file types: {', '.join(sorted(SUFFIXES))}"
        )
    if train == folder or test is None:
        return ImageFiles(tuple(train_files), tuple(train_labels), 0, class_names)
    test_files, test_labels = _list(test, class_names)
    if not test_files:
        raise DataError(test, "no images in this folder's class folders")
    return ImageFiles((*train_files, *test_files), (*train_labels, *test_labels), len(test_files), class_names)


def _are_splits(names: tuple[str, ...]) -> bool:
    return all(name.lower() in TEST_NAMES for name in names)


def _list(folder: Path, class_names: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    files: list[Path] = []
    labels: list[int] = []
    class_of: dict[str, Path] = {}
    for place in sub_folders(folder):
        if place.name not in class_names:
            raise DataError(place, f"not a class of the training folder: {', '.join(class_names)}")
        above = _with_parents(folder) | _with_parents(place.resolve().parent)
        entered = set(above)
        found = sorted(file for file in files_below(place, entered) if file.suffix.lower() in SUFFIXES)
        for real in entered - above:
            if class_of.setdefault(real, place) != place:
                raise DataError(place, f"{real} belongs to this class and, by a link, to {class_of[real].name} too")
        files += found
        labels += [class_names.index(place.name)] * len(found)
    return files, labels


def _with_parents(folder: Path) -> set[str]:
    """Return the real paths of a folder and of all that it lies in: a link to one of them would go round in circles."""
    real = Path(os.path.realpath(folder))
    return {str(real), *map(str, real.parents)}


def read_images(images: ImageFiles) -> Contents:
    """Open a listed directory."""

    def chunks() -> Iterator[Chunk]:
        for first in range(0, len(images.files), _FILES):
            items = images.files[first : first + _FILES]
            yield Chunk(items[0], first, items)

    return Contents(np.array(images.labels, dtype=np.int64), images.num_test, images.class_names, chunks)
