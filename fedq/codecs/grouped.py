"""What the scaled codecs share: groups of elements, one bfloat16 scale a group, and the guards around scales.

`Scaled` holds the options and how a tensor falls into groups (block, tensor, channel); the built-in codecs turn it
into a plan of the kernels. `Grouped` is for a codec that brings its own rule from values to scale and codes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedq.codecs.base import Codec, Payload, Planned, Shape
from fedq.errors import FieldError
from fedq.kernels import BlockPlan, reference
from fedq.kernels.reference import ROTATION, rounded_scale, safe_inverse
from fedq.kernels.reference.blocks import Blocks, Rule, decode_blocks, encode_blocks, sum_of_magnitudes

__all__ = ["Grouped", "PlannedScaled", "Scaled", "rounded_scale", "safe_inverse"]


@dataclass(frozen=True)
class Scaled(Codec):
    """A codec with one bfloat16 scale a group of elements."""

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
        if self.rotates and self.block < ROTATION:
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

    def _num_codes(self, num: int) -> int:
        """Codes of ``num`` elements: rotation codes its padding too."""
        return -(-num // ROTATION) * ROTATION if self.rotates else num

    def _group_width(self, shape: Shape) -> int:
        num = self._num_codes(math.prod(shape))
        if self.scale == "block":
            return self.block
        return num // shape[0] if self.scale == "channel" and len(shape) > 1 else num


@dataclass(frozen=True)
class PlannedScaled(Planned, Scaled):
    """A scaled codec that the kernels know: a subclass writes `_plan`."""

    @abstractmethod
    def _plan(self, shape: Shape) -> BlockPlan:
        """Return the plan; the groups of ``scale=tensor`` and ``scale=channel`` are blocks of another width."""

    def codes(self, payload: Payload) -> Tensor:
        """Return the unpacked codes, flat uint8; with rotation those of the padding too."""
        num = math.prod(payload.shape)
        if num == 0:
            return payload.data
        return reference.blocks.codes(self._plan(payload.shape), payload.data, num)

    def _sections(self, shape: Shape, data: Tensor | None = None) -> dict[str, int]:
        plan, num = self._plan(shape), math.prod(shape)
        return {"codes": plan.codes_nbytes(num), "scales": 2 * plan.num_blocks(num)}


@dataclass(frozen=True)
class Grouped(Scaled):
    """A scaled codec with its own rule, in plain torch."""

    @abstractmethod
    def _quantize(self, groups: Tensor, counts: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (uint8 codes like ``groups``, float32 scales that bfloat16 holds exactly).

        Args:
            groups: Values in groups, (g, 2^n) float32, zeros where a group has no element.
            counts: Number of elements of each group, (g, 1) float32.
            noise: Uniform noise in [0, 1) like ``groups`` for stochastic rounding; None: round to nearest.
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

    def _rule(self) -> Rule:
        return Rule(
            quantize=lambda groups, counts, noise, largest: self._quantize(groups, counts, noise),
            levels=self._levels,
            pack=self._pack,
            unpack=self._unpack,
            codes_nbytes=self._codes_nbytes,
            measure=sum_of_magnitudes,
        )

    def _blocks(self, shape: Shape) -> Blocks:
        return Blocks(self._group_width(shape), self.rotates, self.rounding == "stochastic")

    def _encode(self, x: Tensor, shape: Shape, seed: int) -> list[Tensor]:
        return encode_blocks(self._rule(), self._blocks(shape), x, seed=seed)

    def _decode(self, data: Tensor, shape: Shape, seed: int) -> Tensor:
        return decode_blocks(self._rule(), self._blocks(shape), data, math.prod(shape), seed=seed)

    def codes(self, payload: Payload) -> Tensor:
        """Return the unpacked codes, flat uint8; with rotation those of the padding too."""
        num = self._num_codes(math.prod(payload.shape))
        return self._unpack(payload.data[: self._codes_nbytes(num)], num)

    def _sections(self, shape: Shape, data: Tensor | None = None) -> dict[str, int]:
        num = self._num_codes(math.prod(shape))
        return {"codes": self._codes_nbytes(num), "scales": 2 * -(-num // self._group_width(shape))}
