"""Decoded images on disk: one file a data set, written atomically, verified and mapped when it is read.

A file is the images, the labels, the channel sums, a JSON header and its length, and the CRC-32 of all before it. The
images come first so that a large file can be mapped and written in place.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import mmap
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from fedq.data.source import DataError, Source

log = logging.getLogger(__name__)

Allocate: TypeAlias = Callable[[tuple[int, ...]], np.ndarray]
"""Makes an empty uint8 array of a shape, in memory or in a file."""

_LENGTH = struct.Struct("<Q")  # bytes of the header
_TRAILER = struct.Struct("<I4s")  # CRC-32, magic
_MAGIC = b"FQD1"
_BLOCK_BYTES = 1 << 24
_DECODING = 2  # goes up when the same files become other pixels or labels, so that kept ones are made again


@dataclass(frozen=True)
class Examples:
    """Decoded examples.

    Args:
        images: Images, uint8 (N, C, H, W), in memory or mapped.
        labels: Labels, int64 (N,).
        sums: Each image's sum and sum of squares a channel, int64 (N, C, 2): mean and deviation of any subset follow
            exactly, without another pass over its pixels.
        counts: Sizes of consecutive parts: (train, test), or (train, val, test) once split.
        class_names: One name a class.
        notes: What a user must know of how the examples were chosen and changed, a sentence each.
    """

    images: np.ndarray
    labels: np.ndarray
    sums: np.ndarray
    counts: tuple[int, ...]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def channel_sums(images: np.ndarray) -> np.ndarray:
    """Return int64 (N, C, 2): sum and sum of squares of the pixels of uint8 (N, C, H, W) images."""
    pixels = images.reshape(*images.shape[:2], -1).astype(np.int64)
    return np.stack([pixels.sum(-1), np.einsum("ncp,ncp->nc", pixels, pixels)], axis=-1)


def release(images: np.ndarray) -> None:
    """Give back the pages of a mapped array; those that were read count as this process's memory until then.

    The values stay readable. An array in memory is left alone.
    """
    owner: object = images
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/fedq``, or ``~/.cache/fedq`` where that is unset."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedq"


def source_key(source: Source, image_size: int | None) -> str:
    """Return a name for a source's decoded images: it changes with any file's path, size or time of change.

    The path counts as it is listed, for it says the class, and as links resolve it.
    """
    files = [_stat(file) for file in source.files]
    identity = json.dumps([_DECODING, source.name, source.version, files, image_size])
    return f"{source.name[:40]}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"


def _stat(file: Path) -> tuple[str, str, int, int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise DataError(file, f"this file of the data set cannot be read: {error.strerror}") from error
    return os.path.abspath(file), str(file.resolve()), stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class Cache:
    """A folder of decoded data sets; what it returns is mapped, and above ``memory_limit_bytes`` never in memory."""

    folder: Path
    memory_limit_bytes: int

    def maps(self, examples: Examples) -> bool:
        """Say whether these images are over the limit, and mapped."""
        return isinstance(examples.images, np.memmap) and examples.images.nbytes > self.memory_limit_bytes

    def load(self, name: str) -> Examples | None:
        """Return what is kept under a name, or None if there is nothing, or nothing intact (which is logged)."""
        path = self._path(name)
        try:
            return _read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            log.warning("the cached images in %s cannot be used (%s); they are made again", path, error)
            return None

    def build(self, name: str, make: Callable[[Allocate], Examples]) -> Examples:
        """Call ``make`` and keep its result; a folder that cannot be written costs one logged warning."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f"{name}-", suffix=".part")
        except OSError as error:
            self._warn(error)
            return make(_in_memory)
        os.close(handle)
        path = Path(temporary)
        try:
            return self._keep(name, path, make(partial(self._allocate, path)))
        finally:
            path.unlink(missing_ok=True)

    def remove_others(self, prefix: str, name: str) -> None:
        """Remove every file under ``prefix`` but that of ``name``; jobs that have mapped one keep it."""
        for path in self.folder.glob(f"{glob.escape(prefix)}*.examples"):
            if path != self._path(name):
                with suppress(OSError):  # another job was faster, or the folder is read-only
                    path.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.examples"

    def _warn(self, error: OSError) -> None:
        log.warning("decoded images are not kept: %s cannot be written (%s)", self.folder, error)

    def _allocate(self, path: Path, shape: tuple[int, ...]) -> np.ndarray:
        num_bytes = math.prod(shape)
        if num_bytes <= self.memory_limit_bytes:
            return _in_memory(shape)
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes:  # a mapped file on a full disk would end the process without a message
            log.warning("images stay in memory: %s has %d bytes free, they need %d", self.folder, free, num_bytes)
            return _in_memory(shape)
        return np.memmap(path, dtype=np.uint8, mode="w+", shape=shape)

    def _keep(self, name: str, path: Path, examples: Examples) -> Examples:
        try:
            _write(path, examples)
            images = np.memmap(path, np.uint8, "r", shape=examples.images.shape)
            os.replace(path, self._path(name))
            return replace(examples, images=images)  # frees the array that was filled
        except OSError as error:
            self._warn(error)
            return examples


def _in_memory(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, dtype=np.uint8)


def _write(path: Path, examples: Examples) -> None:
    images = examples.images
    header = {
        "shape": images.shape,
        "counts": examples.counts,
        "class_names": examples.class_names,
        "notes": examples.notes,
    }
    tail = (
        examples.labels.astype("<i8").tobytes(),
        examples.sums.astype("<i8").tobytes(),
        encoded := json.dumps(header).encode(),
        _LENGTH.pack(len(encoded)),
    )
    checksum = zlib.crc32(b"".join(tail), _crc32(images))
    if isinstance(images, np.memmap):
        images.flush()
    with path.open("ab") as file:
        if not isinstance(images, np.memmap):
            images.tofile(file)
        file.writelines((*tail, _TRAILER.pack(checksum, _MAGIC)))


def _read(path: Path) -> Examples:
    if path.stat().st_size < _LENGTH.size + _TRAILER.size:
        raise ValueError("it is cut short")
    data = np.memmap(path, np.uint8, "r")
    body, trailer = data[: -_TRAILER.size], data[-_TRAILER.size :]
    checksum, magic = _TRAILER.unpack(trailer.tobytes())
    if magic != _MAGIC or _crc32(body) != checksum:
        raise ValueError("its checksum does not match")
    body, length = body[: -_LENGTH.size], body[-_LENGTH.size :]
    header = json.loads(body[len(body) - _LENGTH.unpack(length.tobytes())[0] :].tobytes())
    num, channels, height, width = header["shape"]
    ends = np.cumsum([num * channels * height * width, 8 * num, 16 * num * channels])
    images, labels, sums = np.split(body[: ends[-1]], ends[:-1])
    return Examples(
        images.reshape(num, channels, height, width),
        np.frombuffer(labels.tobytes(), "<i8").astype(np.int64),
        np.frombuffer(sums.tobytes(), "<i8").astype(np.int64).reshape(num, channels, 2),
        tuple(header["counts"]),
        tuple(header["class_names"]),
        tuple(header["notes"]),
    )


def _crc32(data: np.ndarray) -> int:
    flat = data.reshape(-1)
    checksum = 0
    for start in range(0, flat.size, _BLOCK_BYTES):
        checksum = zlib.crc32(flat[start : start + _BLOCK_BYTES].data, checksum)
        release(flat)
    return checksum
