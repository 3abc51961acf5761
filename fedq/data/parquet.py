"""Reader of Parquet in the Hub's column layout: ``img`` or ``image`` (struct with ``bytes``) and ``label``.

Images stay encoded here and are read a batch of rows at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedq.data.source import Chunk, Contents, DataError, check_labels

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

IMAGE_COLUMNS = ("img", "image")
SUB_FOLDERS = ("", "data")
TEST_NAMES = ("test", "validation", "valid", "val")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
_ROWS = 512


@dataclass(frozen=True)
class ParquetFiles:
    """The files of one data set; ``test`` is empty where there are none."""

    train: tuple[Path, ...]
    test: tuple[Path, ...]


def find_parquet(folder: Path, sub_folders: tuple[str, ...] = SUB_FOLDERS) -> ParquetFiles | None:
    """Return the Parquet files of the first of a folder's sub-folders ("" is itself) that has any, or None.

    Raises:
        DataError: A shard of ``train-00000-of-00002.parquet`` and its kind is missing.
    """
    for place in (folder / name for name in sub_folders):
        train = _shards(place, "train")
        if train:
            test = next((found for name in TEST_NAMES if (found := _shards(place, name))), ())
            return ParquetFiles(train, test)
    return None


def _shards(folder: Path, split: str) -> tuple[Path, ...]:
    files = tuple(sorted(folder.glob(f"{split}*.parquet")))
    numbered = [match for file in files if (match := _SHARD.search(file.name))]
    if numbered:
        missing = sorted(set(range(int(numbered[0][2]))) - {int(match[1]) for match in numbered})
        if missing:
            raise DataError(folder, f"shard {missing[0]} of {split}-*-of-{numbered[0][2]}.parquet is missing")
    return files


def parquet_class_names(file: Path) -> tuple[str, ...] | None:
    """Return the class names that the Hub writes into a file's metadata, or None."""
    metadata = _opened(file).schema_arrow.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def read_parquet(
    files: ParquetFiles, class_names: tuple[str, ...] | None = None, native_size: tuple[int, int] | None = None
) -> Contents:
    """Open the files and read every label.

    Class names come from ``class_names``, else from the files, else they are the numbers 0 to the largest label of the
    training files.
    """
    labels = {file: _labels(file) for file in files.train + files.test}
    names = class_names or parquet_class_names(files.train[0]) or _numbers(labels, files.train)
    for file, values in labels.items():
        check_labels(values, len(names), file)
    num_test = sum(len(labels[file]) for file in files.test)
    if files.test and num_test == 0:
        raise DataError(files.test[0], "no rows")

    def chunks() -> Iterator[Chunk]:
        return chain.from_iterable(map(_image_chunks, labels))

    return Contents(np.concatenate(list(labels.values())), num_test, names, chunks, native_size)


def _numbers(labels: dict[Path, np.ndarray], train: tuple[Path, ...]) -> tuple[str, ...]:
    num_rows = sum(len(labels[file]) for file in train)
    for file in train:
        check_labels(labels[file], max(num_rows, 1), file)  # more classes than images: a wrong column, or a wrong label
    return tuple(str(number) for number in range(1 + max(int(labels[file].max(initial=-1)) for file in train)))


def _opened(file: Path) -> pyarrow.parquet.ParquetFile:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(file, f"not a readable Parquet file: {error}") from error


def _batches(file: Path, column: str) -> Iterator[pyarrow.Array]:
    import pyarrow

    try:
        for batch in _opened(file).iter_batches(batch_size=_ROWS, columns=[column]):
            yield batch.column(0)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(file, f"column {column} cannot be read: {error}") from error


def _labels(file: Path) -> np.ndarray:
    import pyarrow

    schema = _opened(file).schema_arrow
    _image_column(file)
    if "label" not in schema.names:
        raise DataError(file, f"no column label; columns found: {', '.join(schema.names)}")
    if not pyarrow.types.is_integer(schema.field("label").type):
        raise DataError(file, f"column label holds {schema.field('label').type}, not integers")
    parts = [np.empty(0, dtype=np.int64)]
    for part in _batches(file, "label"):
        if part.null_count:
            row = sum(len(earlier) for earlier in parts) + int(np.flatnonzero(part.is_null())[0])
            raise DataError(file, "the label is null", row=row)
        parts.append(part.to_numpy().astype(np.int64))
    return np.concatenate(parts)


def _image_column(file: Path) -> str:
    import pyarrow

    schema = _opened(file).schema_arrow
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if not pyarrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise DataError(file, f"column {name} holds {kind}, not a struct with bytes")
            return name
    raise DataError(file, f"no column img or image; columns found: {', '.join(schema.names)}")


def _image_chunks(file: Path) -> Iterator[Chunk]:
    import pyarrow.compute

    first_row = 0
    for part in _batches(file, _image_column(file)):
        items = pyarrow.compute.struct_field(part, "bytes").to_pylist()
        if None in items:
            raise DataError(file, "the image has no bytes", row=first_row + items.index(None))
        yield Chunk(file, first_row, items)
        first_row += len(items)
