"""The kernels in plain torch: readable, for every plan and every device, and the oracle of the faster ones.

`primitives` holds the hash, sums, rotation and packing; `cast`, `blocks` and `sparse` the codes of each plan;
`checksum` CRC32C. The three functions here turn them into the common interface (see `fedq.kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedq.kernels import unfused
from fedq.kernels.plan import ROTATION, BlockPlan, CastPlan, Plan, SparsePlan, elias_fano_nbytes
from fedq.kernels.reference import blocks, cast, sparse
from fedq.kernels.reference.checksum import crc32c
from fedq.kernels.reference.primitives import (
    absmax,
    add_finite,
    bf16_bytes,
    bf16_from_bytes,
    derive_seed,
    element_mask,
    elias_fano_decode,
    elias_fano_encode,
    from_groups,
    hash32,
    hash_int,
    join_bytes,
    message_seed,
    mix32,
    noise_key,
    pack_bits,
    pack_trits,
    packed_nbytes,
    rotate,
    rounded_scale,
    safe_inverse,
    saturated,
    shared_key,
    signs,
    span_seed,
    to_groups,
    tree_sum,
    uniform,
    unpack_bits,
    unpack_trits,
    unrotate,
)

__all__ = [
    "ROTATION",
    "absmax",
    "add_finite",
    "bf16_bytes",
    "bf16_from_bytes",
    "check",
    "crc32c",
    "decode",
    "derive_seed",
    "element_mask",
    "elias_fano_decode",
    "elias_fano_encode",
    "elias_fano_nbytes",
    "encode",
    "from_groups",
    "hash32",
    "hash_int",
    "join_bytes",
    "message_seed",
    "mix32",
    "noise_key",
    "pack_bits",
    "pack_trits",
    "packed_nbytes",
    "reduce",
    "rotate",
    "rounded_scale",
    "safe_inverse",
    "saturated",
    "shared_key",
    "signs",
    "span_seed",
    "to_groups",
    "tree_sum",
    "uniform",
    "unpack_bits",
    "unpack_trits",
    "unrotate",
]

_PASSES: dict[type, Any] = {CastPlan: cast, BlockPlan: blocks, SparsePlan: sparse}


def encode(plan: Plan, x: Tensor, *, seed: int, out: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Encode ``x + residual``: sections joined to a payload, and what it lost into ``residual``."""
    values = total = x.to(torch.float32)
    if residual is not None:
        values, total = add_finite(values, residual), values + residual
    ranked = {"ranked": total} if isinstance(plan, SparsePlan) else {}
    data = join_bytes(_PASSES[type(plan)].encode(plan, values, seed=seed, **ranked), out)
    if residual is not None:
        new = total - _decoded(plan, data, x.numel(), seed)
        residual.copy_(torch.where(new.isfinite(), new, residual))
    return data


def decode(plan: Plan, data: Tensor, num: int, *, seed: int, out: Tensor, weight: float | None = None) -> None:
    """Decode into ``out``, or add ``weight`` times the decoded values to it."""
    if weight is not None and isinstance(plan, SparsePlan):
        sparse.add(plan, data, num, seed=seed, out=out, weight=weight)
        return
    decoded = _decoded(plan, data, num, seed)
    if weight is None:
        out.copy_(decoded)
    else:
        out.add_(decoded.mul_(weight))


def check(plan: Plan, data: Tensor, num: int) -> None:
    """Raise `FieldError` unless a payload of the right size decodes: only positions can be wrong."""
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
    """Encode ``sum(weight · decoded) + residual``; the sum starts from zero and runs in the order given."""
    return unfused.reduce(
        encode, decode, plan_in, datas, weights, seeds, plan_out, num, seed=seed, out=out, residual=residual
    )


def _decoded(plan: Plan, data: Tensor, num: int, seed: int) -> Tensor:
    values: Tensor = _PASSES[type(plan)].decode(plan, data, num, seed=seed)
    return values
