"""Casts: float32, float16 and bfloat16, one value after another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedq import kernels
from fedq.codecs.base import Codec, Shape, register
from fedq.errors import FieldError

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@register("fp32", dtype="fp32")
@register("fp16", dtype="fp16")
@register("bf16", dtype="bf16")
@dataclass(frozen=True)
class Cast(Codec):
    """Cast to a float type, nearest even: 32 or 16 bits an element, nothing else.

    float16 saturates at +-65,504 so that a large finite value stays finite; NaN and infinity pass through.
    """

    dtype: str = "bf16"

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

    def _encode(self, x: Tensor, shape: Shape, seed: int) -> list[Tensor]:
        if self.dtype == "fp16":
            x = torch.where(x.isinf(), x, x.clamp(-65504.0, 65504.0))
        if self.dtype == "bf16":
            return [kernels.bf16_bytes(x)]
        return [x.to(_DTYPES[self.dtype], copy=True).view(torch.uint8)]  # a payload never shares the input's memory

    def _decode(self, data: Tensor, shape: Shape, seed: int) -> Tensor:
        return data.clone().view(_DTYPES[self.dtype]).to(torch.float32)

    def _sections(self, shape: Shape, data: Tensor | None = None) -> dict[str, int]:
        return {"codes": math.prod(shape) * _DTYPES[self.dtype].itemsize}
