"""Readers of CIFAR-10's pickles and MNIST's idx files, in the layouts that torchvision downloads.

Pickles go through an unpickler that builds nothing but containers and numpy arrays.
"""

from __future__ import annotations

import codecs
import gzip
import io
import pickle
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fedq.data.source import Chunk, Contents, DataError, array_chunks, check_labels

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MNIST_CLASSES = tuple(str(digit) for digit in range(10))
CIFAR10_FILES = (*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch")
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# Both numpy 1 and numpy 2 names: pickles keep the name of the version that wrote them.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("_codecs", "encode"): codecs.encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; only plain containers and numpy arrays are read"
            )
        return _ALLOWED[module, name]


def load_arrays(file: Path) -> Any:
    """Unpickle containers and numpy arrays, and refuse everything else.

    Raises:
        DataError: The file is damaged, or asks for any other class or function (which is then not called).
    """
    try:
        return _ArrayUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(file, f"not a readable CIFAR pickle: {error}") from error


def read_cifar10(folder: Path) -> Contents:
    """Read ``data_batch_1`` to ``data_batch_5`` and ``test_batch``."""
    files = cifar10_files(folder)
    batches = [_cifar_batch(file) for file in files]

    def chunks() -> Iterator[Chunk]:
        return chain.from_iterable(array_chunks(file, images) for file, (images, _) in zip(files, batches, strict=True))

    labels = np.concatenate([labels for _, labels in batches])
    return Contents(labels, len(batches[-1][1]), CIFAR10_CLASSES, chunks, native_size=(32, 32))


def cifar10_files(folder: Path) -> tuple[Path, ...]:
    """Return the six pickles of a folder, whether they exist or not."""
    return tuple(folder / name for name in CIFAR10_FILES)


def _cifar_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    entry = load_arrays(file)
    keys = sorted(map(str, entry)) if isinstance(entry, dict) else [type(entry).__name__]
    if not {"data", "labels"} <= set(keys):
        raise DataError(file, f"expected the keys data and labels, found {', '.join(keys)}")
    data = entry["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise DataError(file, "data must be a uint8 array of (images, 3072)")
    labels = _integers(entry["labels"], file)
    if len(labels) != len(data):
        raise DataError(file, f"{len(data)} images but {len(labels)} labels")
    check_labels(labels, len(CIFAR10_CLASSES), file)
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)


def _integers(values: Any, file: Path) -> np.ndarray:
    for row, value in enumerate(values):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise DataError(file, f"label {value!r} is not an integer", row=row)
    return np.array(list(values), dtype=object)  # of any size, so that a wrong one can be told


def read_mnist(folder: Path) -> Contents:
    """Read the four idx files, plain or gzipped."""
    paths = mnist_files(folder)
    train_images, train_labels, test_images, test_labels = (
        _idx(path, num_axes) for path, num_axes in zip(paths, (3, 1, 3, 1), strict=True)
    )
    for file, images, labels in ((paths[1], train_images, train_labels), (paths[3], test_images, test_labels)):
        if len(images) != len(labels):
            raise DataError(file, f"{len(labels)} labels for {len(images)} images")
        check_labels(labels, len(MNIST_CLASSES), file)

    def chunks() -> Iterator[Chunk]:
        return chain(array_chunks(paths[0], train_images), array_chunks(paths[2], test_images))

    labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
    return Contents(labels, len(test_labels), MNIST_CLASSES, chunks)


def mnist_files(folder: Path) -> tuple[Path, ...]:
    """Return the four idx files of a folder, plain or gzipped, whether they exist or not."""
    plain_or_gzipped = ((folder / name, folder / f"{name}.gz") for name in MNIST_FILES)
    return tuple(zipped if zipped.exists() and not plain.exists() else plain for plain, zipped in plain_or_gzipped)


def _idx(file: Path, num_axes: int) -> np.ndarray:
    opened: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            raw = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(file, f"not a readable file: {error}") from error
    header_bytes = 4 + 4 * num_axes
    if len(raw) < header_bytes or raw[:4] != bytes([0, 0, 8, num_axes]):
        raise DataError(file, f"not an idx file of unsigned bytes with {num_axes} axes")
    shape = np.frombuffer(raw, dtype=">i4", count=num_axes, offset=4).astype(np.int64)
    expected = header_bytes + int(np.prod(shape))
    if len(raw) != expected:
        raise DataError(file, f"{len(raw):,} bytes, but its header says {expected:,}")
    return np.frombuffer(raw, dtype=np.uint8, offset=header_bytes).reshape(tuple(shape))
