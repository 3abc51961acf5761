"""The kernels in C++: the reference's functions with the same bytes, for tensors on the CPU.

`library` finds and loads the shared object; `blocks` (casts and block codecs), `sparse` and `checksum` call it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedq.kernels import unfused
from fedq.kernels.cpu import blocks, sparse
from fedq.kernels.cpu.checksum import crc32c
from fedq.kernels.cpu.library import isa, load, select_isa, why_missing
from fedq.kernels.plan import Plan, SparsePlan

__all__ = ["check", "crc32c", "decode", "encode", "isa", "load", "reduce", "select_isa", "supports", "why_missing"]


def supports(plan: Plan, num: int, dtype: torch.dtype) -> bool:
    """Return whether the library is there and serves this plan for ``num`` elements of ``dtype``."""
    if load() is None:
        return False
    return sparse.supports(plan, num, dtype) if isinstance(plan, SparsePlan) else blocks.supports(plan, num, dtype)


def encode(plan: Plan, x: Tensor, *, seed: int, out: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Encode ``x + residual``; see `fedq.kernels.encode`."""
    if isinstance(plan, SparsePlan):
        return sparse.encode(plan, x, seed=seed, out=out, residual=residual)
    return blocks.encode(plan, x, seed=seed, out=out, residual=residual)


def decode(plan: Plan, data: Tensor, num: int, *, seed: int, out: Tensor, weight: float | None = None) -> None:
    """Decode into ``out``, or add ``weight`` times it; see `fedq.kernels.decode`."""
    if isinstance(plan, SparsePlan):
        sparse.decode(plan, data, num, seed=seed, out=out, weight=weight)
    else:
        blocks.decode(plan, data, num, seed=seed, out=out, weight=weight)


def check(plan: Plan, data: Tensor, num: int) -> None:
    """Raise `FieldError` unless a payload decodes; see `fedq.kernels.check`."""
    if isinstance(plan, SparsePlan):
        sparse.check(plan, data, num)


def reduce(
    plan_in: Plan,
    datas: Sequence[Tensor],
    weights: Sequence[float],
    seeds: Sequence[int],
    plan_out: Plan,
    num: int,
    *,
    seed: int,
    out: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Encode ``sum(weight · decoded) + residual``; see `fedq.kernels.reduce`."""
    if not isinstance(plan_in, SparsePlan) and not isinstance(plan_out, SparsePlan):
        return blocks.reduce(plan_in, datas, weights, seeds, plan_out, num, seed=seed, out=out, residual=residual)
    return unfused.reduce(
        encode, decode, plan_in, datas, weights, seeds, plan_out, num, seed=seed, out=out, residual=residual
    )
