"""From a name to a `Dataset`: find the files, decode them or take them from the cache, split, measure."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedq.data.cache import Allocate, Cache, Examples, default_cache_dir, release, source_key
from fedq.data.dataset import Dataset, Split
from fedq.data.decode import decode
from fedq.data.find import find_source
from fedq.data.source import Contents, Source
from fedq.data.split import split_indices
from fedq.errors import FieldError

_BLOCK = 1024  # images copied at a time


def load_dataset(
    dataset: str,
    *,
    data_dir: Path,
    download: bool = False,
    image_size: int | None = None,
    train_examples: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    memory_limit_bytes: int = 4 << 30,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> Dataset:
    """Load a data set as whole uint8 tensors on the CPU.

    Images are decoded once and kept on disk. Several processes may call this at once and get the same tensors, but each
    of them decodes what is not kept yet (and downloads what is missing): let one go first.

    Args:
        dataset: ``auto``, ``cifar10``, ``mnist``, ``digits``, or a folder (ImageFolder or Parquet), here or under
            ``data_dir``. ``auto``: CIFAR-10 if it is there, otherwise digits.
        data_dir: Folder of the data sets on disk.
        download: Whether to fetch CIFAR-10 or MNIST if it is missing.
        image_size: Side of the square images. Default: 32 for digits, MNIST and image folders, else as they are.
        train_examples: Training images to keep, a seeded stratified subset. Default: all.
        val_fraction: Share of the training set to hold out, in [0, 1).
        seed: Seed of the splits.
        memory_limit_bytes: Bytes of images above which a set is mapped from the cache, in the order of its splits.
        cache_dir: Folder for decoded images. Default: ``$XDG_CACHE_HOME/fedq`` or ``~/.cache/fedq``.
        progress: Whether to show a progress bar on standard error while decoding.

    Raises:
        FieldError: A setting cannot be used, or the data were not found.
        DataError: A file is missing, damaged or mislabelled; the error names the file and the row.
    """
    _check(image_size=image_size, train_examples=train_examples, val_fraction=val_fraction, seed=seed)
    source = find_source(dataset, Path(data_dir), download=download)
    size = image_size or source.image_size
    cache = Cache(default_cache_dir() if cache_dir is None else Path(cache_dir), memory_limit_bytes)

    def split(examples: Examples) -> tuple[np.ndarray, ...]:
        return split_indices(
            examples.labels, examples.counts[1], val_fraction=val_fraction, train_examples=train_examples, seed=seed
        )

    def decoded(allocate: Allocate) -> Examples:
        return decode(_opened(source), size, allocate, title=source.name, progress=progress)

    settings = json.dumps([val_fraction, train_examples, seed])
    return _dataset(source, _arranged(cache, source_key(source, size), settings, decoded, split))


def _check(*, image_size: int | None, train_examples: int | None, val_fraction: float, seed: int) -> None:
    if image_size is not None and image_size < 1:
        raise FieldError("image_size", image_size, "1 or more pixels")
    if train_examples is not None and train_examples < 1:
        raise FieldError("train_examples", train_examples, "1 or more")
    if not 0 <= val_fraction < 1:
        raise FieldError("val_fraction", val_fraction, "0 or more and below 1")
    if seed < 0:
        raise FieldError("seed", seed, "0 or more")


def _opened(source: Source) -> Contents:
    contents = source.read()
    num_train = len(contents.labels) - contents.num_test
    if num_train < 3:
        raise FieldError("dataset", source.name, f"3 or more training images ({source.title}: {num_train})")
    return contents


def _arranged(
    cache: Cache,
    key: str,
    settings: str,
    decoded: Callable[[Allocate], Examples],
    split: Callable[[Examples], tuple[np.ndarray, ...]],
) -> Examples:
    """Return the examples in the order train, val, test; sets over the memory limit are kept on disk in that order."""
    name = f"{key}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    kept = cache.load(name)
    if kept is not None:
        return kept
    examples = cache.load(key)
    if examples is None:
        examples = cache.build(key, decoded)
    parts = split(examples)
    if not cache.maps(examples):
        return _arrange(examples, parts, lambda shape: np.empty(shape, dtype=np.uint8))
    arranged = cache.build(name, lambda allocate: _arrange(examples, parts, allocate))
    cache.remove_others(f"{key}-", name)  # one order at a time: large sets would fill the disk seed by seed
    return arranged


def _arrange(examples: Examples, parts: tuple[np.ndarray, ...], allocate: Allocate) -> Examples:
    order = np.concatenate(parts)
    images = allocate((len(order), *examples.images.shape[1:]))
    for start in range(0, len(order), _BLOCK):
        images[start : start + _BLOCK] = examples.images[order[start : start + _BLOCK]]
        release(examples.images)
    counts = tuple(map(len, parts))
    return replace(examples, images=images, labels=examples.labels[order], sums=examples.sums[order], counts=counts)


def _dataset(source: Source, examples: Examples) -> Dataset:
    with warnings.catch_warnings():  # a mapped file is read-only, and torch has no read-only tensors
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        images = torch.from_numpy(examples.images)
    labels = torch.from_numpy(examples.labels)
    parts = zip(images.split(examples.counts), labels.split(examples.counts), strict=True)
    train, val, test = (Split(*part) for part in parts)
    mean, std = _mean_and_std(examples.sums[: len(train)], num_pixels=images[0, 0].numel())
    shape = "x".join(map(str, images.shape[1:]))
    sizes = f"{len(train):,} train, {len(val):,} validation, {len(test):,} test images, {shape}"
    flip = not all(len(name) == 1 or name.isdigit() for name in examples.class_names)
    description = f"{source.title}: {sizes}"
    return Dataset(source.name, description, train, val, test, examples.class_names, mean, std, flip, examples.notes)


def _mean_and_std(sums: np.ndarray, num_pixels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    total, squares = sums.sum(axis=0).T / (len(sums) * num_pixels)
    deviation = np.sqrt(np.maximum(squares - total**2, 0))
    std = np.where(deviation > 0, deviation / 255, 1.0)
    return tuple(map(float, total / 255)), tuple(map(float, std))
