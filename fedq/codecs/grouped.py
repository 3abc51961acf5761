"""What the scaled codecs share: groups of elements, one bfloat16 scale a group, and the guards around scales.

`Grouped` settles how a tensor falls into groups (block, tensor, channel), runs the passes in cache-sized chunks and
lays out ``codes | scales``; a codec adds its own rule from values to scale and codes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedq import kernels
from fedq.codecs.base import Codec, Payload, Shape
from fedq.errors import FieldError

_CHUNK = 1 << 15
"""A fifth of the elements a pass works on at a time, so that its temporaries stay in cache; never visible in the
bytes. Five of them are whole bytes of trits too."""
_SMALLEST = 2.0**-126
"""Scales below the smallest normal number count as zero: their reciprocal would overflow."""


def safe_inverse(scale: Tensor) -> Tensor:
    """Return 1/scale, and 0 where the scale is zero or denormal (NaN stays NaN)."""
    return torch.where(scale < _SMALLEST, torch.zeros_like(scale), 1.0 / scale)


def rounded_scale(scale: Tensor, *, up: bool = False) -> Tensor:
    """Return the scale as bfloat16 in float32, denormal as zero, rounded up if nothing may be clipped."""
    rounded = scale.to(torch.bfloat16)
    if up:
        bits = rounded.view(torch.int16)
        rounded = torch.where(rounded.to(torch.float32) < scale, bits + 1, bits).view(torch.bfloat16)
    rounded = rounded.to(torch.float32)
    return torch.where(rounded < _SMALLEST, torch.zeros_like(rounded), rounded)


@dataclass(frozen=True)
class Grouped(Codec):
    """A codec with one scale a group of elements."""

    smallest_block: ClassVar[int] = 8

    block: int = 256
    rotate: str = "auto"
    scale: str = "block"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        name = self.spec.partition(":")[0]
        if self.block < self.smallest_block or self.block & (self.block - 1) or self.block > 1 << 20:
            raise FieldError(f"{name}:block", self.block, f"a power of two from {self.smallest_block} to 2^20")
        if self.scale not in ("block", "tensor", "channel"):
            raise FieldError(f"{name}:scale", self.scale, "block, tensor, channel")
        if self.rounding not in ("nearest", "stochastic"):
            raise FieldError(f"{name}:rounding", self.rounding, "nearest, stochastic")
        if self.scale != "block" and self.block != type(self).block:
            raise FieldError(f"{name}:block", self.block, "left out unless scale=block")
        if self.rotate not in ("auto", "true", "false"):
            raise FieldError(f"{name}:rotate", self.rotate, "auto, true, false")
        if self.rotates and self.scale == "channel":
            raise FieldError(f"{name}:rotate", self.rotate, "false when scale=channel (rotation mixes channels)")
        if self.rotates and self.block < kernels.reference.ROTATION:
            raise FieldError(f"{name}:block", self.block, "at least 256 when rotate=true")

    @property
    def rotates(self) -> bool:
        """Whether values are rotated before they are coded."""
        return self.rotate == "true" or (self.rotate == "auto" and self._auto_rotates())

    def _auto_rotates(self) -> bool:
        return False

    @property
    def unbiased(self) -> bool:
        """True for stochastic rounding: its grid spans the largest magnitude, so nothing is clipped."""
        return self.rounding == "stochastic"

    # ---- a codec's own rule --------------------------------------------------------------------------------------

    @abstractmethod
    def _quantize(self, groups: Tensor, counts: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (uint8 codes like ``groups``, float32 scales that bfloat16 holds exactly).

        Args:
            groups: (g, 2^n) float32, zeros where a group has no element.
            counts: (g, 1) float32, elements of each group.
            noise: Uniform [0, 1) like ``groups`` for stochastic rounding.
        """

    @abstractmethod
    def _levels(self, codes: Tensor) -> Tensor:
        """Return the float32 values of codes at scale 1."""

    @abstractmethod
    def _pack(self, codes: Tensor) -> Tensor:
        """Pack flat codes of one chunk into bytes."""

    @abstractmethod
    def _unpack(self, data: Tensor, num: int) -> Tensor:
        """Undo `_pack`."""

    @abstractmethod
    def _codes_nbytes(self, num: int) -> int:
        """Return the packed bytes of ``num`` codes."""

    # ---- the passes ----------------------------------------------------------------------------------------------

    def _num_codes(self, num: int) -> int:
        """Codes of ``num`` elements: rotation codes its padding too."""
        return -(-num // kernels.reference.ROTATION) * kernels.reference.ROTATION if self.rotates else num

    def _group_width(self, shape: Shape) -> int:
        num = self._num_codes(math.prod(shape))
        if self.scale == "block":
            return self.block
        return num // shape[0] if self.scale == "channel" and len(shape) > 1 else num

    def _chunk(self, shape: Shape) -> int:
        """Elements a chunk: whole groups and whole bytes of codes."""
        return 5 * max(self.block, _CHUNK) if self.scale == "block" else max(1, math.prod(shape))

    def _encode(self, x: Tensor, shape: Shape, seed: int) -> list[Tensor]:
        step = self._chunk(shape)
        codes, scales = [], []
        for start in range(0, x.numel(), step):
            chunk_codes, chunk_scales = self._encode_chunk(x[start : start + step], shape, seed, start)
            codes.append(chunk_codes)
            scales.append(kernels.bf16_bytes(chunk_scales))
        return codes + scales

    def _encode_chunk(self, x: Tensor, shape: Shape, seed: int, start: int) -> tuple[Tensor, Tensor]:
        y = kernels.rotate(x, seed, start=start) if self.rotates else x
        width = self._group_width(shape)
        groups = kernels.to_groups(y, width)
        counts = torch.full((groups.shape[0], 1), float(width), device=x.device)
        counts[-1] = y.numel() - width * (groups.shape[0] - 1)
        noise = None
        if self.rounding == "stochastic":
            noise = kernels.to_groups(kernels.uniform(y.numel(), seed, start=start, device=x.device), width)
        codes, scales = self._quantize(groups, counts, noise)
        return self._pack(kernels.from_groups(codes, width, y.numel())), scales

    def _decode(self, data: Tensor, shape: Shape, seed: int) -> Tensor:
        num, width, step = math.prod(shape), self._group_width(shape), self._chunk(shape)
        scales = kernels.bf16_from_bytes(data[self._codes_nbytes(self._num_codes(num)) :])
        out = torch.empty(num, device=data.device)
        for start in range(0, num, step):
            size = min(step, num - start)
            at = self._codes_nbytes(start)
            codes = self._unpack(data[at : at + self._codes_nbytes(self._num_codes(size))], self._num_codes(size))
            levels = kernels.to_groups(self._levels(codes), width)
            first = start // width
            y = kernels.from_groups(levels * scales[first : first + levels.shape[0]].unsqueeze(1), width, codes.numel())
            out[start : start + size] = kernels.unrotate(y, seed, size, start=start) if self.rotates else y
        return out

    def codes(self, payload: Payload) -> Tensor:
        """Return the unpacked codes, flat uint8; with rotation those of the padding too."""
        num = self._num_codes(math.prod(payload.shape))
        return self._unpack(payload.data[: self._codes_nbytes(num)], num)

    def _sections(self, shape: Shape, data: Tensor | None = None) -> dict[str, int]:
        num = self._num_codes(math.prod(shape))
        return {"codes": self._codes_nbytes(num), "scales": 2 * -(-num // self._group_width(shape))}


def element_mask(groups: Tensor, counts: Tensor) -> Tensor:
    """Return 1 where a group has an element and 0 in its padding, (g, 2^n) or (1, 1) if all groups are full."""
    if bool((counts == groups.shape[1]).all()):
        return groups.new_ones(1, 1)
    return (torch.arange(groups.shape[1], device=groups.device) < counts).to(torch.float32)
