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
_DEEP = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N", "F"})  # more than 8 bits; PIL's own conversion clips them
_GREY = _DEEP | {"1", "L", "LA", "La"}
_STRAIGHT = {"P": "RGBA", "PA": "RGBA", "LA": "RGBA", "RGBa": "RGBA", "La": "LA"}
"""Mode in which a mode with transparency is put first: PIL warns of losing it in one step, or cannot do it."""
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that undoes each orientation of EXIF."""
_FIRST_ON_ITS_SIDE = 5


def decode(
    contents: Contents, image_size: int | None, allocate: Allocate, *, title: str = "", progress: bool = False
) -> Examples:
    """Decode one image or more, to RGB, upright as their EXIF says; of several frames the first.

    With ``image_size``, images are cropped about their centre to a square and resized (bilinear, antialiased); without
    it all must have one size. Transparency is dropped, 16 bits become their upper 8, floats in 0..1 are scaled.

    Raises:
        DataError: An image cannot be decoded, has another size, or has values of which no picture follows; names the
            file and the row.
    """
    height, width = (image_size, image_size) if image_size else contents.native_size or _first_size(contents)
    num = len(contents.labels)
    images = allocate((num, 3, height, width))
    sums = np.empty((num, 3, 2), dtype=np.int64)
    origins = np.empty((num, 3), dtype=np.int64)
    with _advance(title, num, shown=progress) as advance:
        _fill(contents, images, sums, origins, resize=image_size is not None, advance=advance)
    counts = (num - contents.num_test, contents.num_test)
    notes = (*contents.notes, *_changes(origins, width, height))
    return Examples(images, contents.labels, sums, counts, contents.class_names, notes)


def _changes(origins: np.ndarray, width: int, height: int) -> Iterator[str]:
    """Say what was done to images, from each one's width, height and whether it was grey; int (N, 3)."""

    def words(chosen: np.ndarray) -> str:
        some = f"{chosen.sum():,} of {len(chosen):,}"
        return f"{'all' if chosen.all() else some} images are"

    sizes = origins[:, :2]
    is_cropped = sizes[:, 0] * height != sizes[:, 1] * width
    is_resized = (sizes != (width, height)).any(axis=1)
    is_grey = origins[:, 2] == 1
    if is_resized.any():
        (width_from, height_from), (width_to, height_to) = sizes[is_resized].min(axis=0), sizes[is_resized].max(axis=0)
        span = f"widths of {width_from} to {width_to} and heights of {height_from} to {height_to}"
        is_one = width_from == width_to and height_from == height_to
        yield f"{words(is_resized)} resized to {width}x{height}, from {f'{width_to}x{height_to}' if is_one else span}"
    if is_cropped.any():
        yield f"{words(is_cropped)} cropped about their centre to that shape, the rest of the longer side is lost"
    if is_grey.any():
        yield f"{words(is_grey)} grey, and repeated in three channels"


def _first_size(contents: Contents) -> tuple[int, int]:
    height, width, _ = _pillow(next(contents.chunks()), 0, lambda image: _rgb(image, None)[0].shape)
    return height, width


def _fill(
    contents: Contents,
    images: np.ndarray,
    sums: np.ndarray,
    origins: np.ndarray,
    *,
    resize: bool,
    advance: Callable[[int], None],
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
            job = pool.submit(_decode_chunk, chunk, images[span], sums[span], origins[span], resize)
            pending.append((job, len(chunk.items)))
            start = span.stop
            if len(pending) > 2 * workers:  # keeps the encoded images in memory few
                finish_one()
        while pending:
            finish_one()


def _decode_chunk(chunk: Chunk, images: np.ndarray, sums: np.ndarray, origins: np.ndarray, resize: bool) -> None:
    height, width = images.shape[2:]
    for position in range(len(chunk.items)):
        pixels, origins[position] = _pillow(
            chunk, position, lambda image: _rgb(image, (width, height) if resize else None)
        )
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


def _rgb(image: Image.Image, size: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int, bool]]:
    """Return an image's pixels, uint8 (H, W, 3), and its origin: upright width and height, and whether it was grey."""
    width, height = image.size
    # Large JPEGs are decoded at a fraction of their size.
    is_drafted = size is not None and image.draft(None, (2 * size[0], 2 * size[1])) is not None
    image.load()  # PNG may have its EXIF at its end; PIL itself turns TIFF, and then says that it is upright
    if not is_drafted:
        width, height = image.size
    is_grey = image.mode in _GREY
    orientation = _orientation(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if orientation >= _FIRST_ON_ITS_SIDE:
        width, height = height, width
    image = _opaque(image)
    if size is not None and image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.asarray(image), (width, height, is_grey)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF raises nearly anything; viewers show such an image as it is stored
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _opaque(image: Image.Image) -> Image.Image:
    """Return an image in RGB, as deep as that and without transparency.

    Raises:
        ValueError: No picture follows from the image's values.
    """
    if image.mode in _DEEP:
        image = Image.fromarray(_eight_bits(image))
    while image.mode in _STRAIGHT:
        image = image.convert(_STRAIGHT[image.mode])
    if image.mode == "RGBA":
        is_flat = [channel.getextrema()[0] == channel.getextrema()[1] for channel in image.split()]
        if is_flat == [True, True, True, False]:
            raise ValueError("it has one colour, and its shape in its transparency alone; put it on a background")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"its floats are in {low:g}..{high:g}; those in 0..1 can be scaled")
        scaled = np.rint(values * 255)
    else:
        if low < 0 or high >= 1 << 16:
            raise ValueError(f"its integers are in {low}..{high}; those in 0..65535 can be scaled")
        scaled = values >> (min(tags.get(_BITS_PER_SAMPLE, (16,))[0], 16) - 8)  # TIFF has 12 bits too
    if high > 0 and scaled.max() == 0:
        raise ValueError(f"its values are at most {high:g}, and all of them are black in 8 bits")
    is_white = tags.get(_PHOTOMETRIC) == 0  # what 0 means; PIL minds it up to 8 bits
    return 255 - scaled.astype(np.uint8) if is_white else scaled.astype(np.uint8)


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
