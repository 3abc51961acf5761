"""The types that readers and decoder share: a `Source` lists files, its `Contents` know labels and yield raw images.

No reader and no pixel is touched here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

Item: TypeAlias = "bytes | Path | np.ndarray"
"""One image before decoding: an encoded file's bytes, its path, or pixels as uint8 (H, W) or (H, W, 3)."""


class DataError(ValueError):
    """A data file that cannot be used.

    Args:
        file: The file (or folder) at fault.
        problem: What is wrong with it, and what is expected.
        row: Row in the file, counted from 0, where one is at fault.
    """

    def __init__(self, file: Path, problem: str, *, row: int | None = None) -> None:
        super().__init__(f"{file}{'' if row is None else f', row {row}'}: {problem}")
        self.file = file
        self.row = row


@dataclass(frozen=True)
class Chunk:
    """Consecutive raw images of one file; a `Path` item is a file of its own."""

    file: Path
    first_row: int
    items: Sequence[Item] | np.ndarray

    def place(self, position: int) -> tuple[Path, int | None]:
        """Return the file, and the row in it where it has rows, that item ``position`` came from."""
        item: Item = self.items[position]
        return (item, None) if isinstance(item, Path) else (self.file, self.first_row + position)


@dataclass(frozen=True)
class Contents:
    """An opened source: every label, and the raw images in the same order.

    Args:
        labels: Labels, int64 (N,), training rows first, then test rows; all in 0..C-1.
        num_test: Number of test rows at the end; 0 where the data define no test set.
        class_names: Names of the C classes.
        chunks: Starts a new pass over all N raw images, in order.
        native_size: (height, width) that every image must have unless it is resized; None: that of the first image.
        notes: What a user must know of how the rows were chosen, a sentence each.
    """

    labels: np.ndarray
    num_test: int
    class_names: tuple[str, ...]
    chunks: Callable[[], Iterator[Chunk]]
    native_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A data set found on disk and not opened yet.

    Args:
        name: Short name of the data set, such as ``cifar10`` or a folder's name.
        title: Name of the data set for a reader, with the place: "CIFAR-10 from data/cifar10".
        files: Every file that `read` opens; their path, size and time of change identify the contents.
        read: Opens the files, and returns their contents.
        image_size: Side to which images are resized unless the user asks for another; None: left as they are.
        version: Version that identifies the contents as well, for data that come with a library; otherwise empty.
    """

    name: str
    title: str
    files: tuple[Path, ...]
    read: Callable[[], Contents]
    image_size: int | None = None
    version: str = ""


def check_labels(labels: np.ndarray, num_classes: int, file: Path) -> None:
    """Raise `DataError` naming the first row whose label, of any integer type, is outside 0..num_classes-1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        row = int(wrong[0])
        raise DataError(file, f"label {labels[row]} is outside 0..{num_classes - 1}", row=row)


def array_chunks(file: Path, images: np.ndarray, rows: int = 512) -> Iterator[Chunk]:
    """Yield decoded images (N, H, W) or (N, H, W, 3) of one file as chunks."""
    for first in range(0, len(images), rows):
        yield Chunk(file, first, images[first : first + rows])
