"""Casts in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fedq.kernels.plan import CastPlan
from fedq.kernels.reference.primitives import bf16_bytes, saturated

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LARGEST_FP16 = 65504.0
_FP16_NAN = 0x7E00


def encode(plan: CastPlan, x: Tensor, *, seed: int) -> list[Tensor]:
    """Return the values' bytes.

    A large finite value stays finite, NaN and infinity pass through; in 16 bits there is one NaN, in 32 any.
    """
    if plan.dtype == "bf16":
        return [bf16_bytes(x)]
    if plan.dtype == "fp16":
        half = saturated(x, _LARGEST_FP16).to(torch.float16)
        return [half.view(torch.int16).masked_fill(x.isnan(), _FP16_NAN).view(torch.uint8)]
    return [x.to(_DTYPES[plan.dtype], copy=True).view(torch.uint8)]  # a payload never shares the input's memory


def decode(plan: CastPlan, data: Tensor, num: int, *, seed: int) -> Tensor:
    """Return the values in float32."""
    return data.clone().view(_DTYPES[plan.dtype]).to(torch.float32)
