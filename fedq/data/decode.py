"""Raw images to one uint8 array, in parallel: PIL releases the interpreter lock while it decodes and resizes."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from fedq.data.cache import Allocate, Examples, channel_sums
from fedq.data.source import Chunk, Contents, DataError, Item

_Result = TypeVar("_Result")
_DEEP_GREY = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})  # 16 bits a pixel; PIL's own conversion clips them


def decode(
    contents: Contents, image_size: int | None, allocate: Allocate, *, title: str = "", progress: bool = False
) -> Examples:
    """Decode one image or more, to RGB.

    With ``image_size``, images are cropped about their centre to a square and resized (bilinear, antialiased); without
    it all must have one size.

    Raises:
        DataError: An image cannot be decoded or has another size; names the file and the row.
    """
    height, width = (image_size, image_size) if image_size else contents.native_size or _first_size(contents)
    num = len(contents.labels)
    images = allocate((num, 3, height, width))
    sums = np.empty((num, 3, 2), dtype=np.int64)
    with _advance(title, num, shown=progress) as advance:
        _fill(contents, images, sums, resize=image_size is not None, advance=advance)
    counts = (num - contents.num_test, contents.num_test)
    return Examples(images, contents.labels, sums, counts, contents.class_names)


def _first_size(contents: Contents) -> tuple[int, int]:
    width, height = _pillow(next(contents.chunks()), 0, lambda image: image.size)
    return height, width


def _fill(
    contents: Contents, images: np.ndarray, sums: np.ndarray, *, resize: bool, advance: Callable[[int], None]
) -> None:
    workers = os.cpu_count() or 1
    pending: deque = deque()
    start = 0

    def finish_one() -> None:
        future, num = pending.popleft()
        future.result()
        advance(num)

    with ThreadPoolExecutor(workers) as pool:
        for chunk in contents.chunks():
            span = slice(start, start + len(chunk.items))
            pending.append((pool.submit(_decode_chunk, chunk, images[span], sums[span], resize), len(chunk.items)))
            start = span.stop
            if len(pending) > 2 * workers:  # keeps the encoded images in memory few
                finish_one()
        while pending:
            finish_one()


def _decode_chunk(chunk: Chunk, images: np.ndarray, sums: np.ndarray, resize: bool) -> None:
    height, width = images.shape[2:]
    for position in range(len(chunk.items)):
        pixels = _pillow(chunk, position, lambda image: _rgb(image, (width, height) if resize else None))
        if pixels.shape[:2] != (height, width):
            file, row = chunk.place(position)
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise DataError(file, f"the image is {size}, expected {width}x{height}; --image-size resizes", row=row)
        images[position] = pixels.transpose(2, 0, 1)
    sums[:] = channel_sums(images)


def _pillow(chunk: Chunk, position: int, use: Callable[[Image.Image], _Result]) -> _Result:
    try:
        with _open(chunk.items[position]) as image:
            return use(image)
    except Exception as error:  # PIL's plugins raise nearly anything on damaged files
        file, row = chunk.place(position)
        raise DataError(file, f"the image cannot be decoded: {error}", row=row) from error


def _open(item: Item) -> Image.Image:
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    return Image.open(item if isinstance(item, Path) else io.BytesIO(item))


def _rgb(image: Image.Image, size: tuple[int, int] | None) -> np.ndarray:
    if size is not None:
        image.draft(None, (2 * size[0], 2 * size[1]))  # large JPEGs are decoded at a fraction of their size
    if image.mode in _DEEP_GREY:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # PIL warns when a palette's transparency is dropped in one step
    image = image.convert("RGB")
    if size is not None and image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.asarray(image)


@contextmanager
def _advance(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda num: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"decoding {title}", total=total)
        yield lambda num: bar.advance(task, num)
