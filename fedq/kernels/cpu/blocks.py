"""The casts and the block codecs in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedq.errors import FieldError
from fedq.kernels.cpu.library import call, dtype_code, num_threads, pointer
from fedq.kernels.plan import BlockPlan, CastPlan
from fedq.kernels.reference.blocks import GAUSSIAN_STEP, MEAN_TO_SIGMA

_KINDS = {"integer": 0, "ternary": 1, "sign": 2, "fp32": 3, "bf16": 4, "fp16": 5}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Plan(ctypes.Structure):
    """``BlockPlan`` of ``csrc/blocks.h``."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("block", ctypes.c_int64),
        ("rotate", ctypes.c_int32),
        ("stochastic", ctypes.c_int32),
        ("unbiased", ctypes.c_int32),
        ("step", ctypes.c_float),
        ("largest_scale", ctypes.c_float),
    )


class _Part(ctypes.Structure):
    """``Part`` of ``csrc/blocks.h``."""

    _fields_ = (("data", ctypes.c_void_p), ("seed", ctypes.c_uint64), ("weight", ctypes.c_float))


def supports(plan: CastPlan | BlockPlan, num: int, dtype: torch.dtype) -> bool:
    """Return whether the library serves this plan."""
    if dtype not in _DTYPES or num < 1:
        return False
    return isinstance(plan, CastPlan) or (8 <= plan.block <= 1 << 20 and plan.block & (plan.block - 1) == 0)


def encode(
    plan: CastPlan | BlockPlan, x: Tensor, *, seed: int, out: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Encode ``x + residual``; see `fedq.kernels.encode`."""
    data = _buffer(plan.nbytes(x.numel()), out)
    _call(
        "encode_blocks",
        _plan(plan),
        pointer(x),
        dtype_code(x.dtype),
        pointer(residual),
        x.numel(),
        seed,
        pointer(data),
        num_threads(),
    )
    return data if out is None or data is out else out.copy_(data)


def decode(
    plan: CastPlan | BlockPlan, data: Tensor, num: int, *, seed: int, out: Tensor, weight: float | None = None
) -> None:
    """Decode into ``out``; see `fedq.kernels.decode`."""
    data, weighted = _payload(plan, data, num), weight is not None
    _call(
        "decode_blocks",
        _plan(plan),
        pointer(data),
        num,
        seed,
        pointer(out),
        int(weighted),
        ctypes.c_float(0.0 if weight is None else weight),
        num_threads(),
    )


def reduce(
    plan_in: CastPlan | BlockPlan,
    datas: Sequence[Tensor],
    weights: Sequence[float],
    seeds: Sequence[int],
    plan_out: CastPlan | BlockPlan,
    num: int,
    *,
    seed: int,
    out: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Encode the weighted sum of payloads, chunk by chunk in cache; see `fedq.kernels.reduce`."""
    datas = [_payload(plan_in, data, num) for data in datas]
    parts = (_Part * len(datas))(
        *(_Part(data.data_ptr(), s % 2**64, w) for data, s, w in zip(datas, seeds, weights, strict=True))
    )
    data = _buffer(plan_out.nbytes(num), out)
    _call(
        "reduce_blocks",
        _plan(plan_in),
        parts,
        len(datas),
        _plan(plan_out),
        num,
        seed,
        pointer(data),
        pointer(residual),
        num_threads(),
    )
    return data if out is None or data is out else out.copy_(data)


@cache
def _plan(plan: CastPlan | BlockPlan) -> Any:
    """Return a reference to the plan as the library reads it."""
    if isinstance(plan, CastPlan):
        return ctypes.byref(_Plan(kind=_KINDS[plan.dtype], block=1))
    return ctypes.byref(
        _Plan(
            kind=_KINDS[plan.kind],
            bits=plan.bits,
            block=plan.block,
            rotate=plan.rotate,
            stochastic=plan.stochastic,
            unbiased=plan.unbiased,
            step=GAUSSIAN_STEP[plan.bits] * MEAN_TO_SIGMA if plan.kind == "integer" else 0.0,
            largest_scale=plan.largest_scale,
        )
    )


def _payload(plan: CastPlan | BlockPlan, data: Tensor, num: int) -> Tensor:
    """Return the payload's bytes side by side; the library reads exactly as many as the plan says."""
    if data.numel() != plan.nbytes(num):
        raise FieldError("payload bytes", data.numel(), f"{plan.nbytes(num)} for {num} elements of {plan}")
    return data.contiguous()


def _buffer(nbytes: int, out: Tensor | None) -> Tensor:
    """Return where the payload is written: ``out`` itself if it can be."""
    if out is not None and out.numel() != nbytes:
        raise FieldError("out bytes", out.numel(), str(nbytes))
    return out if out is not None and out.is_contiguous() else torch.empty(nbytes, dtype=torch.uint8)


def _call(name: str, *args: object) -> None:
    if call(name, *args) != 0:
        raise MemoryError(f"no memory for the blocks of {name}")
