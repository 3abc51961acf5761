"""Casts: float32, float16 and bfloat16, one value after another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedq.codecs.base import Planned, Shape, register
from fedq.errors import FieldError
from fedq.kernels import CastPlan

_DTYPES = ("fp32", "fp16", "bf16")


@register("fp32", dtype="fp32")
@register("fp16", dtype="fp16")
@register("bf16", dtype="bf16")
@dataclass(frozen=True)
class Cast(Planned):
    """Cast to a float type, nearest even: 32 or 16 bits an element, nothing else.

    float16 saturates at +-65,504 so that a large finite value stays finite; NaN and infinity pass through.
    """

    dtype: Literal["fp32", "fp16", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise FieldError("cast:dtype", self.dtype, ", ".join(_DTYPES))

    @property
    def reducible(self) -> bool:
        """True: plain values, no scales."""
        return True

    @property
    def wants_feedback(self) -> bool:
        """False: what a cast loses is below the noise of training."""
        return False

    def _plan(self, shape: Shape) -> CastPlan:
        return CastPlan(self.dtype)

    def _sections(self, shape: Shape, data: Tensor | None = None) -> dict[str, int]:
        return {"codes": self._plan(shape).nbytes(math.prod(shape))}
