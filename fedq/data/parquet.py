"""Reader of Parquet in the Hub's column layout: ``img`` or ``image`` (struct with ``bytes``) and ``label``.

Images stay encoded here and are read a batch of rows at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedq.data.files import TEST_NAMES, TRAIN_NAMES, entries, files_below, is_folder, split_folder
from fedq.data.source import Chunk, Contents, DataError, check_labels

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

IMAGE_COLUMNS = ("img", "image")
_SUFFIX = ".parquet"
_SHARD = re.compile(r"[-_. ]?(?P<number>\d+)(?:[-_]of[-_](?P<total>\d+)(?:-[0-9A-Za-z]+)?)?$")
"""End of a shard's name, which may have a fingerprint of its own: ``-00000-of-00003-0a1b2c3d4e5f6071``, ``0000``."""
_ROWS = 512
_HIDDEN = -1
"""Label of every row of a test split whose labels its owner keeps."""


@dataclass(frozen=True)
class ParquetFiles:
    """The files of one data set: of training, and of every split to test with, the first choice first."""

    train: tuple[Path, ...]
    tests: tuple[tuple[Path, ...], ...]

    @property
    def every(self) -> tuple[Path, ...]:
        """All of the files."""
        return (*self.train, *chain.from_iterable(self.tests))


def find_parquet(folder: Path) -> ParquetFiles | None:
    """Return the Parquet files of the one data set in a folder, in its ``data/``, or in one sub-folder of either.

    Raises:
        DataError: There are several data sets (the Hub's configurations, for example), or `parquet_in` raises it.
    """
    places = [folder, *_other_folders(folder), *_other_folders(folder / "data")]
    found = {place: files for place in places if (files := parquet_in(place))}
    if len(found) > 1:
        names = ", ".join(str(place.relative_to(folder)) for place in found)
        raise DataError(folder, f"Parquet of more than one data set, in {names}; give the folder of one of them")
    return next(iter(found.values()), None)


def _other_folders(folder: Path) -> list[Path]:
    return [place for place in _folders(folder) if place.name.lower() not in (*TRAIN_NAMES, *TEST_NAMES)]


def parquet_in(folder: Path) -> ParquetFiles | None:
    """Return the Parquet files that lie in a folder, or in its sub-folders ``train``, ``test`` and their kind.

    Which split a file in the folder is of, a word of its name says.

    Raises:
        DataError: A split has a shard too few or too many, files of more than one set, or is the Hub's first part of a
            large one.
    """
    files, folders = _parquet(folder), _folders(folder)
    train = _split(files, folders, TRAIN_NAMES)
    if not train:
        return None
    return ParquetFiles(train, tuple(found for name in TEST_NAMES if (found := _split(files, folders, (name,)))))


def parquet_below(folder: Path) -> Path | None:
    """Return the first Parquet file anywhere below a folder, as seen from it, or None."""
    found = sorted(file for file in files_below(folder, set()) if file.suffix.lower() == _SUFFIX)
    return found[0].relative_to(folder) if found else None


def _split(files: list[Path], folders: list[Path], names: tuple[str, ...]) -> tuple[Path, ...]:
    part, inside = split_folder(folders, [f"partial-{name}" for name in names]), split_folder(folders, names)
    if part is not None and _parquet(part):
        raise DataError(part, "only the first part of a split, all that the Hub has converted; rename it to use that")
    here = [file for file in files if _split_of(file) in names]
    return _one_set(here + ([] if inside is None else _parquet(inside)))


def _parquet(folder: Path) -> list[Path]:
    return [Path(e) for e in entries(folder) if e.name.lower().endswith(_SUFFIX) and not is_folder(e)]


def _folders(folder: Path) -> list[Path]:
    return [Path(entry) for entry in entries(folder) if is_folder(entry)]


def _split_of(file: Path) -> str | None:
    """Return the last word of a file's name that names a split, or None."""
    words = re.split(r"[-_. ]+", _SHARD.sub("", file.stem).lower())
    return next((word for word in reversed(words) if word in (*TRAIN_NAMES, *TEST_NAMES)), None)


def _one_set(files: list[Path]) -> tuple[Path, ...]:
    """Return the shards of a split in the order of their numbers.

    Raises:
        DataError: A shard is missing or there twice, or the names differ in more than their numbers.
    """
    sets = {_pattern(file): file for file in reversed(files)}
    if len(sets) > 1:
        names = ", ".join(sorted(f"{file.parent.name}/{file.name}" for file in sets.values()))
        raise DataError(files[0].parent, f"files of more than one set: {names}; leave those of one")
    by_number: dict[int, Path] = {}
    for file in files:
        other = by_number.setdefault(_number(file), file)
        if other != file:
            raise DataError(
                files[0].parent, f"two files of one shard: {other.name}, {file.name}; leave one set of them"
            )
    for pattern in sets:
        _check_complete(pattern, by_number)
    return tuple(by_number[number] for number in sorted(by_number))


def _pattern(file: Path) -> Path:
    """Return a file's path with a star for its number and without its fingerprint: one for all shards of a set."""
    shard = _SHARD.search(file.stem)
    if shard is None:
        return file
    start, end = shard.span("number")
    total = file.stem[end : shard.end("total")] if shard["total"] else ""
    return file.with_name(f"{file.stem[:start]}*{total}{_SUFFIX}")


def _number(file: Path) -> int:
    shard = _SHARD.search(file.stem)
    return int(shard["number"]) if shard else 0


def _check_complete(pattern: Path, by_number: dict[int, Path]) -> None:
    """Raise if a number is missing from 0 or 1 to the total, or where the names have none to the last one."""
    file = next(iter(by_number.values()))
    shard = _SHARD.search(file.stem)
    if shard is None or (len(by_number) == 1 and not shard["total"] and shard.start("number") == shard.start() > 0):
        return  # a name without a number, or with one that is part of a word: train2017
    total = int(shard["total"] or 0)
    first = int(0 not in by_number and max(1, total) in by_number)
    last = first + total - 1 if total else max(by_number)
    missing = list(islice((number for number in range(first, last + 1) if number not in by_number), 6))
    if missing:
        words = f"shard {missing[0]}" if len(missing) == 1 else f"shards {', '.join(map(str, missing[:5]))}"
        more = " and more" if len(missing) > 5 else ""
        verb = "is" if len(missing) == 1 else "are"
        raise DataError(pattern.parent, f"{words}{more} of {pattern.name} {verb} missing")
    if max(by_number) > last:
        raise DataError(by_number[max(by_number)], f"its number is beyond {last}, the last of {pattern.name}")


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

    Class names come from ``class_names``, else from the training files, else they are the numbers 0 to their largest
    label. A file with names of its own is matched by name. A test split whose labels are all hidden is passed over.
    """
    train = {file: _labels(file) for file in files.train}
    names = class_names or next(filter(None, map(parquet_class_names, files.train)), None) or _numbers(train)
    test, notes = _test_labels(files.tests)
    if files.tests and not sum(map(len, test.values())):
        raise DataError(next(iter(test)), "no rows")
    labels = {file: _matched(file, values, names) for file, values in (train | test).items()}

    def chunks() -> Iterator[Chunk]:
        return chain.from_iterable(map(_image_chunks, labels))

    num_test = sum(map(len, test.values()))
    return Contents(np.concatenate(list(labels.values())), num_test, names, chunks, native_size, notes)


def _test_labels(tests: tuple[tuple[Path, ...], ...]) -> tuple[dict[Path, np.ndarray], tuple[str, ...]]:
    """Return the labels of the first test split whose labels are there, and what is to be said of others.

    Raises:
        DataError: The labels of every test split are hidden.
    """
    hidden: list[Path] = []
    for files in tests:
        labels = {file: _labels(file) for file in files}
        if not any(map(len, labels.values())) or any((values != _HIDDEN).any() for values in labels.values()):
            note = f"every label in {', '.join(map(str, hidden))} is {_HIDDEN}, that is hidden: tested on {files[0]}"
            return labels, ((note,) if hidden else ())
        hidden.append(files[0])
    if hidden:
        words = "put a validation split beside it, or move it away to test on a fifth of the training images"
        raise DataError(hidden[0], f"every label is {_HIDDEN}, that is hidden, so nothing can be tested on it; {words}")
    return {}, ()


def _matched(file: Path, labels: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Return a file's labels as places in ``names``, int64 (N,).

    Raises:
        DataError: A label is none of the training files' classes.
    """
    own = parquet_class_names(file) or names
    check_labels(labels, len(own), file)
    places = np.array([names.index(name) if name in names else -1 for name in own], dtype=np.int64)
    matched = places[labels.astype(np.int64)] if own != names else labels.astype(np.int64)
    unknown = np.flatnonzero(matched < 0)
    if unknown.size:
        row = int(unknown[0])
        words = f"label {labels[row]}, {own[labels[row]]}, is not a class of the training files: {', '.join(names)}"
        raise DataError(file, words, row=row)
    return matched


def _numbers(labels: dict[Path, np.ndarray]) -> tuple[str, ...]:
    num_rows = sum(map(len, labels.values()))
    for file, values in labels.items():
        check_labels(values, max(num_rows, 1), file)  # more classes than images: a wrong column, or a wrong label
    largest = max((int(values.max()) for values in labels.values() if len(values)), default=-1)
    return tuple(str(number) for number in range(1 + largest))


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
    """Return the labels as the file has them: of any integer type, or bool, also as a dictionary's entries."""
    import pyarrow

    schema = _opened(file).schema_arrow
    _image_column(file)
    if "label" not in schema.names:
        raise DataError(file, f"no column label; columns found: {', '.join(schema.names)}")
    kind = schema.field("label").type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_integer(value) or pyarrow.types.is_boolean(value)):
        raise DataError(file, f"column label holds {kind}, not integers")
    parts = [np.empty(0, dtype=value.to_pandas_dtype())]
    for batch in _batches(file, "label"):
        part = batch if value is kind else batch.dictionary_decode()
        if part.null_count:
            row = sum(len(earlier) for earlier in parts) + int(np.flatnonzero(part.is_null())[0])
            raise DataError(file, "the label is null", row=row)
        parts.append(part.to_numpy(zero_copy_only=False))
    labels = np.concatenate(parts)
    return labels.astype(np.uint8) if labels.dtype == bool else labels


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
