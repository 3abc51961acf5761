"""The sparse codecs in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fedq.errors import FieldError
from fedq.kernels.cpu.library import call, dtype_code, num_threads, pointer
from fedq.kernels.plan import SparsePlan
from fedq.kernels.reference import shared_key
from fedq.kernels.reference.primitives import out_of_order
from fedq.kernels.reference.sparse import num_kept

_KINDS = {"topk": 0, "blocktopk": 1, "randk": 2, "threshold": 3}
_SMALL = 1 << 15
"""Number of elements below which waking other threads costs more than it gains."""

_OUT_OF_ORDER = -2


class _Plan(ctypes.Structure):
    """``SparsePlan`` of csrc/sparse.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "bits", "k", "block", "unbias", "key")),
        ("value", ctypes.c_float),
        ("largest_scale", ctypes.c_float),
    ]


class _Input(ctypes.Structure):
    """``SparseInput`` of csrc/sparse.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("num", ctypes.c_int64),
    ]


def supports(plan: SparsePlan, num: int, dtype: torch.dtype) -> bool:
    """Return whether the library serves this plan: all of them."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def encode(
    plan: SparsePlan, x: Tensor, *, seed: int, out: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Encode ``x + residual``; see `fedq.kernels.encode`."""
    num, threads = x.numel(), _threads(x.numel())
    given, selection = _plan_of(plan, seed), ctypes.c_void_p()
    source = _Input(x.data_ptr(), dtype_code(x.dtype), 0 if residual is None else residual.data_ptr(), num)
    kept = _checked(
        call(
            "sparse_select",
            ctypes.byref(given),
            ctypes.byref(source),
            plan.num_kept(num),
            threads,
            ctypes.byref(selection),
        )
    )
    try:
        data = torch.empty(plan.nbytes(num, kept), dtype=torch.uint8) if out is None else out
        _checked(call("sparse_write", ctypes.byref(given), ctypes.byref(source), selection, pointer(data), threads))
    finally:
        call("sparse_free", selection)
    return data


def decode(plan: SparsePlan, data: Tensor, num: int, *, seed: int, out: Tensor, weight: float | None = None) -> None:
    """Decode into ``out``, or add ``weight`` times the kept values to it; see `fedq.kernels.decode`.

    Raises:
        FieldError: The payload is too short or too long, or its positions are damaged.
    """
    data = data.contiguous()
    kept = _num_kept(plan, data, num)
    found = call(
        "sparse_decode",
        ctypes.byref(_plan_of(plan, seed)),
        pointer(data),
        num,
        kept,
        pointer(out),
        int(weight is not None),
        ctypes.c_float(weight or 0.0),
        _threads(num),
    )
    _check_found(plan, found, kept, num)


def check(plan: SparsePlan, data: Tensor, num: int) -> None:
    """Raise `FieldError` unless a payload decodes; see `fedq.kernels.check`."""
    data = data.contiguous()
    kept = _num_kept(plan, data, num)
    given = ctypes.byref(_plan_of(plan, 0))
    _check_found(plan, call("sparse_check", given, pointer(data), num, kept, _threads(num)), kept, num)


def _num_kept(plan: SparsePlan, data: Tensor, num: int) -> int:
    """Return how many values a payload of the right size holds; the library reads exactly as many."""
    kept = num_kept(plan, num, data)
    if data.numel() != plan.nbytes(num, kept):
        raise FieldError(f"{plan.kind}:payload bytes", data.numel(), f"{plan.nbytes(num, kept)} for {num} elements")
    return kept


def _check_found(plan: SparsePlan, found: int, kept: int, num: int) -> None:
    if found == _OUT_OF_ORDER:
        raise out_of_order("blocktopk" if plan.kind == "blocktopk" else "elias-fano", num)
    if _checked(found) != kept:
        raise FieldError("elias-fano:indices", found, f"{kept}")


def _plan_of(plan: SparsePlan, seed: int) -> _Plan:
    kind, key = _KINDS[plan.kind], shared_key(seed)
    return _Plan(kind, plan.bits, plan.k, plan.block, int(plan.unbias), key, plan.value, plan.largest_scale)


def _threads(num: int) -> int:
    return num_threads() if num >= _SMALL else 1


def _checked(result: int) -> int:
    if result < 0:
        raise MemoryError("no memory for the positions of the kept values")
    return result
