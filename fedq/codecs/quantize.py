"""Few-bit integers: 1 to 8 bits and ternary, with one bfloat16 scale a group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedq import kernels
from fedq.codecs.base import register
from fedq.codecs.grouped import Grouped, element_mask, rounded_scale, safe_inverse
from fedq.errors import FieldError

_GAUSSIAN_STEP = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""Step of the best uniform mid-rise grid for a unit Gaussian (Max 1960, table II), by bits."""
_MEAN_TO_SIGMA = math.sqrt(math.pi / 2.0)


@register("int1", bits=1)
@register("int2", bits=2)
@register("int3", bits=3)
@register("int4", bits=4)
@register("int5", bits=5)
@register("int6", bits=6)
@register("int7", bits=7)
@register("int8", bits=8)
@dataclass(frozen=True)
class Integer(Grouped):
    """Uniform quantizer: ``bits + 16/block`` bits an element.

    Rotated (the default at 2-4 bits) or at 1 bit: mid-rise grid ``(c + 1/2 - 2^(bits-1))·s``. Codes are chosen with
    the step of the best Gaussian grid (Max 1960) times the group's sigma, estimated from its mean magnitude; then
    ``s = <y, l> / <l, l>`` is the least-squares scale of the chosen levels. Otherwise: mid-tread grid ``q·s`` with
    ``s = absmax / (2^(bits-1) - 1)``. ``rounding=stochastic`` (QSGD, Alistarh et al. 2017) spans the largest
    magnitude and is unbiased.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FieldError("int:bits", self.bits, "1 to 8")
        super().__post_init__()

    def _auto_rotates(self) -> bool:
        return 2 <= self.bits <= 4 and self.scale != "channel" and self.block >= kernels.reference.ROTATION

    @property
    def _half(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def _midrise(self) -> bool:
        return self.rotates or self.bits == 1

    def _quantize(self, groups: Tensor, counts: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        if noise is not None:
            return self._quantize_stochastic(groups, noise)
        return self._quantize_gaussian(groups, counts) if self._midrise else self._quantize_absmax(groups)

    def _quantize_gaussian(self, groups: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        mean = kernels.tree_sum(groups.abs()).unsqueeze(1) / counts
        inverse = safe_inverse(mean * (_GAUSSIAN_STEP[self.bits] * _MEAN_TO_SIGMA))
        cell = (groups * inverse).floor_().clamp_(-self._half, self._half - 1)
        levels = (cell + 0.5) * element_mask(groups, counts)
        scale = kernels.tree_sum(groups * levels) / kernels.tree_sum(levels * levels)
        return self._codes(cell), rounded_scale(scale)

    def _quantize_absmax(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        scale = rounded_scale(kernels.absmax(groups) / (self._half - 1))
        q = (groups * safe_inverse(scale).unsqueeze(1)).round_().clamp_(1 - self._half, self._half - 1)
        return self._codes(q), scale

    def _quantize_stochastic(self, groups: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        offset = 0.5 if self._midrise else 0.0
        top = self._half - 1 + offset
        scale = rounded_scale(kernels.absmax(groups) / top, up=True)
        cell = (groups * safe_inverse(scale).unsqueeze(1) - offset + noise).floor_()
        return self._codes(cell.clamp_(-top - offset, top - offset)), scale

    def _codes(self, cell: Tensor) -> Tensor:
        """Return uint8 codes; a NaN cell becomes the lowest code (its group's scale carries the NaN)."""
        return cell.add_(self._half).nan_to_num_(0.0).to(torch.uint8)

    def _levels(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32) - (self._half - 0.5 if self._midrise else float(self._half))

    def _pack(self, codes: Tensor) -> Tensor:
        return kernels.pack_bits(codes, self.bits)

    def _unpack(self, data: Tensor, num: int) -> Tensor:
        return kernels.unpack_bits(data, self.bits, num)

    def _codes_nbytes(self, num: int) -> int:
        return kernels.packed_nbytes(num, self.bits)


@register("ternary")
@dataclass(frozen=True)
class Ternary(Grouped):
    """Three levels ``{-s, 0, +s}``, five to a byte: ``1.6 + 16/block`` bits an element.

    Magnitudes above 3/4 of the group's mean magnitude are kept and ``s`` is their mean, close to the best ternary
    grid of a Gaussian (Ternary Weight Networks, Li et al. 2016, use 0.7). ``rounding=stochastic``: ``s = absmax`` and
    P(keep) = |x|/s, unbiased (TernGrad, Wen et al. 2017).
    """

    def _quantize(self, groups: Tensor, counts: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        magnitude = groups.abs()
        if noise is not None:
            scale = rounded_scale(kernels.absmax(groups), up=True)
            keep = magnitude * safe_inverse(scale).unsqueeze(1) > noise
        else:
            keep = magnitude > 0.75 * (kernels.tree_sum(magnitude).unsqueeze(1) / counts)
            kept = kernels.tree_sum(keep.to(torch.float32))
            total = kernels.tree_sum(torch.where(keep | ~magnitude.isfinite(), magnitude, 0.0))
            scale = rounded_scale(total / kept.clamp(min=1.0))
        trit = torch.where(keep, groups.sign(), 0.0)
        return (trit + 1.0).to(torch.uint8), scale

    def _levels(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32) - 1.0

    def _pack(self, codes: Tensor) -> Tensor:
        return kernels.pack_trits(codes)

    def _unpack(self, data: Tensor, num: int) -> Tensor:
        return kernels.unpack_trits(data, num)

    def _codes_nbytes(self, num: int) -> int:
        return -(-num // 5)
