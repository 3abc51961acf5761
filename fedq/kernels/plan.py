"""Plans: what to compute, as plain values that every implementation reads, and the sizes that follow from them.

A codec turns its options and a shape into a plan; kernels know plans and no codecs.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fedq.errors import FieldError

ROTATION = 256
"""Width of the Hadamard rotation; its norm is 1/16."""
SCALE_GROUP = 4096
"""Number of elements of a tensor that share one scale of their kept values."""
LARGE = 2.0**96
"""Least sum of a block that may leave float32's range on the way to its scale: such a block is coded times `SHRINK`."""
SHRINK = 2.0**-64
"""Factor of `LARGE` blocks: a power of two, so that codes stay the same and the scale is exact times its inverse."""


def largest_scale(level: float) -> float:
    """Return the largest scale, a bfloat16 number, whose product with a level is finite in float32."""
    largest = (2.0 - 2.0**-23) * 2.0**127
    mantissa, exponent = math.frexp(min(largest, largest / level))
    return math.ldexp(math.floor(mantissa * 256) / 256, exponent)


def bf16_bits(number: float) -> int:
    """Return the bits of a bfloat16 number."""
    return int.from_bytes(struct.pack("<f", number), "little") >> 16


@dataclass(frozen=True)
class CastPlan:
    """Cast every value, nearest even; the payload is the values.

    Args:
        dtype: Type of the values: ``fp32``, ``fp16`` (finite values saturate at +-65,504) or ``bf16``.
    """

    dtype: Literal["fp32", "fp16", "bf16"]

    @property
    def itemsize(self) -> int:
        """Bytes a value."""
        return 4 if self.dtype == "fp32" else 2

    def nbytes(self, num: int) -> int:
        """Payload bytes of ``num`` elements."""
        return num * self.itemsize


@dataclass(frozen=True)
class BlockPlan:
    """Few-bit codes with one bfloat16 scale a block: ``codes | scales``.

    Args:
        kind: Kind of the codes: ``integer`` (uniform grid), ``ternary`` (five to a byte) or ``sign``.
        bits: Bits of an integer code, 1 to 8; 1 for ``sign``, 0 for ``ternary``.
        block: Number of elements that share a scale, at least 1. The fast kernels serve powers of two from 8 to 2^20.
        rotate: Whether runs of 256 are rotated first; their padding is coded too. ``block`` is then at least 256 or
            the whole tensor.
        stochastic: Whether rounding is stochastic and unbiased (the scale spans the largest magnitude).
        unbiased: Whether the scale is ``|x|_2^2 / |x|_1`` instead of ``|x|_1 / n``; ``sign`` only.
    """

    kind: Literal["integer", "ternary", "sign"]
    bits: int
    block: int
    rotate: bool = False
    stochastic: bool = False
    unbiased: bool = False

    @property
    def midrise(self) -> bool:
        """Whether an integer grid is ``(c + 1/2)·s``, not ``c·s``."""
        return self.rotate or self.bits == 1

    @property
    def by_absmax(self) -> bool:
        """Whether the scale follows from the block's largest magnitude, not from sums of all."""
        return self.stochastic or (self.kind == "integer" and not self.midrise)

    @cached_property
    def largest_scale(self) -> float:
        """The largest scale that a block may have; see `largest_scale`."""
        half = 1 << max(0, self.bits - 1)
        return largest_scale(1.0 if self.kind != "integer" else half - 0.5 if self.midrise else half - 1.0)

    def num_codes(self, num: int) -> int:
        """Codes of ``num`` elements: rotation codes its padding too."""
        return -(-num // ROTATION) * ROTATION if self.rotate else num

    def num_blocks(self, num: int) -> int:
        """Blocks, and so scales, of ``num`` elements."""
        return -(-self.num_codes(num) // self.block)

    def codes_nbytes(self, num: int) -> int:
        """Bytes of the packed codes of ``num`` elements."""
        codes = self.num_codes(num)
        return -(-codes // 5) if self.kind == "ternary" else (codes * self.bits + 7) // 8

    def nbytes(self, num: int) -> int:
        """Payload bytes of ``num`` elements."""
        return self.codes_nbytes(num) + 2 * self.num_blocks(num)


@dataclass(frozen=True)
class SparsePlan:
    """A few values with their positions: ``indices | codes | scales``.

    Args:
        kind: Rule by which values are kept: ``topk``, ``blocktopk``, ``randk`` or ``threshold``.
        bits: Bits of a kept value: 1 to 8, 16 (bfloat16) or 32 (float32).
        k: Number of values kept of each block; ``blocktopk`` only.
        block: Number of elements of a block; ``blocktopk`` only.
        density: Fraction of the elements that is kept; ``topk`` and ``randk`` only.
        value: Smallest magnitude that is kept; ``threshold`` only.
        unbias: Whether kept values are multiplied by the length of their run; ``randk`` only.
    """

    kind: Literal["topk", "blocktopk", "randk", "threshold"]
    bits: int
    k: int = 0
    block: int = 0
    density: float = 0.0
    value: float = 0.0
    unbias: bool = False

    @cached_property
    def largest_scale(self) -> float:
        """The largest scale of values of at most 8 bits; see `largest_scale`."""
        return largest_scale((1 << (min(self.bits, 8) - 1)) - 0.5)

    def num_kept(self, num: int) -> int:
        """Kept values of ``num`` elements; with ``threshold``, whose number depends on the values, the most there are.

        Padding of the last block counts too.

        Raises:
            FieldError: ``randk`` is asked for more elements than its runs can be counted for in 64 bits.
        """
        if self.kind == "threshold":
            return num
        if self.kind == "blocktopk":
            return self.k * -(-num // self.block)
        kept = min(num, max(1, round(self.density * num)))
        if self.kind == "randk" and num * (kept + 1) >= 1 << 63:
            raise FieldError("randk:elements", num, "elements times kept elements below 2^63")
        return kept

    def indices_nbytes(self, num: int, kept: int) -> int:
        """Bytes of the positions of ``kept`` of ``num`` elements, the count included."""
        if self.kind == "blocktopk":
            return (kept * (self.block.bit_length() - 1) + 7) // 8
        if self.kind == "randk":
            return 0
        return elias_fano_nbytes(kept, num) + (8 if self.kind == "threshold" else 0)

    def codes_nbytes(self, kept: int) -> int:
        """Bytes of the codes of ``kept`` values."""
        return (kept * self.bits + 7) // 8

    def scales_nbytes(self, num: int) -> int:
        """Bytes of the scales of ``num`` elements."""
        return 2 * -(-num // SCALE_GROUP) if self.bits <= 8 else 0

    def nbytes(self, num: int, kept: int | None = None) -> int:
        """Payload bytes of ``num`` elements; ``threshold`` needs the number that is kept."""
        kept = self.num_kept(num) if kept is None else kept
        return self.indices_nbytes(num, kept) + self.codes_nbytes(kept) + self.scales_nbytes(num)


def elias_fano_low_bits(num: int, universe: int) -> int:
    """Return how many low bits of each of ``num`` sorted indices below ``universe`` are stored as they are."""
    return max(0, (universe // num).bit_length() - 1) if num else 0


def elias_fano_nbytes(num: int, universe: int) -> int:
    """Return the bytes of ``num`` sorted indices below ``universe``: about ``num·(2 + log2(universe/num)) / 8``.

    ``l = floor(log2(universe/num))`` low bits each, and a bit vector of ``num + (universe - 1 >> l)`` bits.
    """
    if num == 0:
        return 0
    low = elias_fano_low_bits(num, universe)
    return (num * low + 7) // 8 + (num + ((universe - 1) >> low) + 7) // 8


Plan = CastPlan | BlockPlan | SparsePlan
