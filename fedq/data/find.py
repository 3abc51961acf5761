"""Which data set a name means and where its files are; `digits`, which comes with scikit-learn, is read here too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fedq.data.folder import find_images, read_images
from fedq.data.parquet import find_parquet, parquet_below, parquet_class_names, parquet_in, read_parquet
from fedq.data.source import Chunk, Contents, DataError, Source, array_chunks
from fedq.data.split import stratified
from fedq.data.torchvision_files import (
    CIFAR10_CLASSES,
    CIFAR10_FILES,
    MNIST_CLASSES,
    MNIST_FILES,
    cifar10_files,
    mnist_files,
    read_cifar10,
    read_mnist,
)
from fedq.errors import FieldError, one_of
from fedq.proxies import download_proxies, loopback_is_direct
from fedq.waiting import Wait, speaking

DIGITS_TEST_FRACTION = 0.2
_LAYOUTS = (
    "a sub-folder of images for every class (also under train/ and test/ or val/), or Parquet: train*.parquet and "
    "test*.parquet, or train/*.parquet and test/*.parquet, in the folder, in data/ or in one sub-folder"
)


@dataclass(frozen=True)
class _Known:
    """A published data set: its name, and how to recognise and read both of its layouts."""

    name: str
    title: str
    torchvision_name: str
    torchvision_folders: tuple[str, ...]
    parquet_folders: tuple[str, ...]
    marks: tuple[str, ...]  # any of these files makes a folder torchvision's layout
    files: Callable[[Path], tuple[Path, ...]]
    read: Callable[[Path], Contents]
    class_names: tuple[str, ...]
    image_size: int | None = None
    native_size: tuple[int, int] | None = None


_CIFAR10 = _Known(
    name="cifar10",
    title="CIFAR-10",
    torchvision_name="CIFAR10",
    torchvision_folders=("cifar-10-batches-py", ""),
    parquet_folders=("", "data", "default", "plain_text"),
    marks=CIFAR10_FILES,
    files=cifar10_files,
    read=read_cifar10,
    class_names=CIFAR10_CLASSES,
    native_size=(32, 32),
)
_MNIST = _Known(
    name="mnist",
    title="MNIST",
    torchvision_name="MNIST",
    torchvision_folders=("MNIST/raw", ""),
    parquet_folders=("", "data", "default", "mnist"),
    marks=(*MNIST_FILES, *(f"{name}.gz" for name in MNIST_FILES)),
    files=mnist_files,
    read=read_mnist,
    class_names=MNIST_CLASSES,
    image_size=32,
)
_KNOWN = {known.name: known for known in (_CIFAR10, _MNIST)}
NAMED = (*_KNOWN, "auto", "digits")
"""Data sets that have a name; every other is a folder."""


def find_source(dataset: str, data_dir: Path, *, download: bool) -> Source:
    """Find a data set by name or folder.

    ``auto`` is CIFAR-10 if it is on disk (or ``download`` may fetch it) and otherwise `digits`; every other name means
    what it says.

    Raises:
        FieldError: There is no such name, or nothing usable where the data set was looked for.
        DataError: The layout is there but incomplete.
    """
    if dataset == "digits":
        return _digits()
    known = _KNOWN.get("cifar10" if dataset == "auto" else dataset)
    if known is None:
        return _folder(dataset, data_dir)
    source = _find(known, data_dir)
    if source is None and download:
        _fetch(known, data_dir)
        source = _find(known, data_dir)
    if source is None and dataset == "auto":
        return _digits()
    if source is None:
        raise FieldError("dataset", dataset, _where(known, data_dir))
    return source


def _places(known: _Known, data_dir: Path) -> tuple[Path, Path]:
    return data_dir, data_dir / known.name


def _find(known: _Known, data_dir: Path) -> Source | None:
    for place in _places(known, data_dir):
        for folder in (place / name for name in known.torchvision_folders):
            if any((folder / mark).exists() for mark in known.marks):
                return _as_source(known, known.files(folder), partial(known.read, folder))
    for place in _places(known, data_dir):
        files = next((found for name in known.parquet_folders if (found := parquet_in(place / name))), None)
        if files is not None and parquet_class_names(files.train[0]) in (None, known.class_names):
            read = partial(read_parquet, files, known.class_names, known.native_size)
            return _as_source(known, files.every, read)
    return None


def _as_source(known: _Known, files: tuple[Path, ...], read: Callable[[], Contents]) -> Source:
    return Source(known.name, f"{known.title} from {files[0].parent}", files, read, known.image_size)


def _where(known: _Known, data_dir: Path) -> str:
    here, there = _places(known, data_dir)
    torchvision = known.torchvision_folders[0]
    return (
        f"{known.title} on disk, which was not found in {here} or {there}; layouts: torchvision's {torchvision}/, or "
        f"train*.parquet and test*.parquet in the folder or in its data/. --download fetches it"
    )


def _fetch(known: _Known, data_dir: Path) -> None:
    import torchvision

    kind = getattr(torchvision.datasets, known.torchvision_name)
    urls = [*getattr(kind, "mirrors", []), *filter(None, [getattr(kind, "url", None)])]
    proxies = download_proxies(urls, os.environ)
    through = f"; the proxy of {proxies} is in between" if proxies else ""
    whom = f"{known.title} from {' or '.join(urls)}{through}"
    try:
        with loopback_is_direct(urls), speaking(Wait(lambda: whom)):
            kind(data_dir, download=True)
    except (OSError, RuntimeError) as error:
        raise FieldError(
            "download", True, f"a working connection ({known.title} could not be fetched: {error}{through})"
        ) from error


def _folder(dataset: str, data_dir: Path) -> Source:
    folder = next((place for place in (Path(dataset), data_dir / dataset) if place.is_dir()), None)
    if folder is None:
        names = one_of(NAMED, dataset)
        raise FieldError("dataset", dataset, f"{names}, or a folder, here or under {data_dir}")
    name = folder.resolve().name
    files = find_parquet(folder)
    if files is not None:
        return Source(name, f"{name} from {folder}", files.every, partial(read_parquet, files))
    try:
        images = find_images(folder)
    except DataError as error:
        below, problem = parquet_below(folder), f"; as images: {error}"
        if below is None:
            raise
    else:
        if images is not None:
            return Source(name, f"{name} from {folder}", images.files, partial(read_images, images), image_size=32)
        below, problem = parquet_below(folder), ""
    found = "neither" if below is None else f"Parquet elsewhere: {below}{problem}"
    raise FieldError("dataset", dataset, f"a folder with {_LAYOUTS} ({folder} has {found})")


def _digits() -> Source:
    return Source(
        name="digits",
        title="handwritten digits from scikit-learn",
        files=(),
        read=_read_digits,
        image_size=32,
        version=f"scikit-learn {version('scikit-learn')}",
    )


def _read_digits() -> Contents:
    """Read scikit-learn's 1,797 digits; the last fifth of the result, stratified, is the test set whatever the seed."""
    from sklearn import datasets

    digits = datasets.load_digits()
    labels = digits.target.astype(np.int64)
    test = stratified(labels, round(DIGITS_TEST_FRACTION * len(labels)), np.random.default_rng(0))
    order = np.concatenate([np.setdiff1d(np.arange(len(labels)), test), test])
    images = np.rint(digits.images[order] * (255 / 16)).astype(np.uint8)

    def chunks() -> Iterator[Chunk]:
        return array_chunks(Path(datasets.__file__), images)

    return Contents(labels[order], len(test), MNIST_CLASSES, chunks)
