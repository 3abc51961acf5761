"""Few-bit integers: 1 to 8 bits and ternary, with one bfloat16 scale a group."""

from __future__ import annotations

from dataclasses import dataclass

from fedq.codecs.base import Shape, register
from fedq.codecs.grouped import PlannedScaled
from fedq.errors import FieldError
from fedq.kernels import BlockPlan
from fedq.kernels.reference import ROTATION


@register("int1", bits=1)
@register("int2", bits=2)
@register("int3", bits=3)
@register("int4", bits=4)
@register("int5", bits=5)
@register("int6", bits=6)
@register("int7", bits=7)
@register("int8", bits=8)
@dataclass(frozen=True)
class Integer(PlannedScaled):
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
        return 2 <= self.bits <= 4 and self.scale != "channel" and self.block >= ROTATION

    def _plan(self, shape: Shape) -> BlockPlan:
        return BlockPlan("integer", self.bits, self._group_width(shape), self.rotates, self.rounding == "stochastic")


@register("ternary")
@dataclass(frozen=True)
class Ternary(PlannedScaled):
    """Three levels ``{-s, 0, +s}``, five to a byte: ``1.6 + 16/block`` bits an element.

    Magnitudes above 3/4 of the group's mean magnitude are kept and ``s`` is their mean, close to the best ternary
    grid of a Gaussian (Ternary Weight Networks, Li et al. 2016, use 0.7). ``rounding=stochastic``: ``s = absmax`` and
    P(keep) = |x|/s, unbiased (TernGrad, Wen et al. 2017).
    """

    def _plan(self, shape: Shape) -> BlockPlan:
        return BlockPlan("ternary", 0, self._group_width(shape), self.rotates, self.rounding == "stochastic")
