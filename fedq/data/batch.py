"""Whole batches on their device: which examples, cropped and flipped, normalised. There is no DataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from fedq.errors import FieldError


def normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Return (images / 255 - mean) / std, computed in float32 as images * a + b and rounded to ``dtype`` once.

    Args:
        images: Images, uint8 (N, C, H, W).
        mean: C means of pixels in 0..1.
        std: C standard deviations of pixels in 0..1.
        dtype: Floating type of the result.
        channels_last: Whether to lay the result out channels last.
    """
    scale, shift = _affine(tuple(mean), tuple(std), images.device)
    scaled = (images * scale).add_(shift).to(dtype)
    return scaled.contiguous(memory_format=torch.channels_last) if channels_last else scaled


@lru_cache(maxsize=32)  # a copy to the device every batch would wait for it
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    means, stds = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
    return (1 / (255 * stds)).float().to(device), (-means / stds).float().to(device)


def augment(images: Tensor, *, generator: torch.Generator, flip: bool, padding: int = 4) -> Tensor:
    """Return each image padded with black, cropped back to its size at a random place, and flipped by a fair coin.

    The draws are made on the CPU, in this order: tops and lefts as one (2, N) draw from 0..2*padding, then, with
    ``flip``, N coins. The generator alone decides the result, whatever the device.

    Args:
        images: Images, uint8 (N, C, H, W).
        generator: Random generator on the CPU.
        flip: Whether to flip left-right.
        padding: Pixels on each side.
    """
    return crop_and_flip(
        images, *draw_crops(len(images), generator=generator, flip=flip, padding=padding), padding=padding
    )


def draw_crops(num: int, *, generator: torch.Generator, flip: bool, padding: int = 4) -> Tensor:
    """Return what `augment` draws for ``num`` images: int64 (3, num) on the CPU, tops, lefts and flips."""
    corners = torch.randint(2 * padding + 1, (2, num), generator=generator)
    flips = torch.randint(2, (1, num), generator=generator) if flip else torch.zeros_like(corners[:1])
    return torch.cat((corners, flips))


def crop_and_flip(images: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor, *, padding: int = 4) -> Tensor:
    """Pad each image with black, crop it at its (top, left), then flip it left-right where ``flips``.

    One gather for the batch: the column index runs backwards where an image is flipped.

    Args:
        images: Images, uint8 (N, C, H, W).
        tops: Top row of each crop in the padded image, int64 (N,), 0..2*padding.
        lefts: Left column of each crop in the padded image, int64 (N,), 0..2*padding.
        flips: Whether each image is flipped, int64 (N,), 0 or 1.
        padding: Pixels on each side.
    """
    num, channels, height, width = images.shape
    tops, lefts, flips = torch.stack([tops, lefts, flips]).to(images.device)
    columns = torch.arange(width, device=images.device)
    columns = lefts[:, None] + torch.where(flips[:, None].bool(), columns.flip(0), columns)
    rows = (tops[:, None] + torch.arange(height, device=images.device)) * (width + 2 * padding)
    index = (rows[:, :, None] + columns[:, None, :]).view(num, 1, height * width)
    padded = functional.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, index.expand(num, channels, height * width)).view_as(images)


def batches(num_examples: int, batch_size: int, *, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Return the index batches of one pass over the examples; the last may be smaller.

    With a generator (training) the order is random, and a last batch of a single example is left out if there are
    others: BatchNorm cannot train on one image. Without one (evaluation) the order is 0, 1, ... and nothing is left
    out.

    Returns:
        Index tensors of the batches, int64, on the CPU.
    """
    if batch_size < 1:
        raise FieldError("batch_size", batch_size, "1 or more")
    order = torch.arange(num_examples) if generator is None else torch.randperm(num_examples, generator=generator)
    parts = list(order.split(batch_size)) if num_examples else []
    if generator is not None and batch_size > 1 and len(parts) > 1 and len(parts[-1]) == 1:
        parts = parts[:-1]
    return iter(parts)
