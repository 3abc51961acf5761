"""Casts and block codecs in Triton: from a plan and tensors to the launch of a kernel of `block_kernels`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

from fedq.kernels.plan import ROTATION, BlockPlan, CastPlan, Plan, bf16_bits
from fedq.kernels.reference import noise_key, shared_key
from fedq.kernels.reference.blocks import GAUSSIAN_STEP, MEAN_TO_SIGMA
from fedq.kernels.triton.block_kernels import BlockCode, decode_kernel, encode_kernel, reduce_kernel

_TILE = 512
"""Elements a program where blocks do not ask for more: 16 a thread of one warp, which leaves registers for 32 warps
on a multiprocessor, 128 KiB in flight with feedback."""
_WARP = 1024
"""Elements a warp in larger tiles: a row of 1,024 still lies inside one warp."""
_LARGEST_TILE = 16384
"""Largest number of elements of a program: 16 warps."""


def supports(plan: CastPlan | BlockPlan) -> bool:
    """Return whether a tile holds a block: powers of two from 8 to 16,384, ternary to 2,048."""
    if isinstance(plan, CastPlan):
        return True
    return plan.block >= 8 and plan.block & (plan.block - 1) == 0 and _cover(plan)[1] <= _LARGEST_TILE


def fits(plan_in: CastPlan | BlockPlan, plan_out: CastPlan | BlockPlan) -> bool:
    """Return whether one tile holds whole blocks of both, so that one kernel can decode, sum and encode."""
    return supports(plan_in) and supports(plan_out) and _cover(plan_out, _unit(plan_in))[1] <= _LARGEST_TILE


def encode(
    plan: CastPlan | BlockPlan, x: Tensor, *, seed: int, out: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Encode ``x + residual``."""
    num = x.numel()
    data = torch.empty(plan.nbytes(num), dtype=torch.uint8, device=x.device) if out is None else out
    cover, tile = _cover(plan)
    bf16 = x.dtype == torch.bfloat16
    encode_kernel[(triton.cdiv(_num_codes(plan, num), cover),)](
        x.view(torch.int16) if bf16 else x,
        x if residual is None else residual,
        data,
        _scales_at(plan, num),
        num,
        _num_codes(plan, num),
        _signed(shared_key(seed)),
        _signed(noise_key(seed)),
        C=_code(plan, _aligned(plan, data)),
        BF16=bf16,
        FEEDBACK=residual is not None,
        COVER=cover,
        TILE=tile,
        num_warps=max(1, tile // _WARP),
        enable_fp_fusion=False,
    )
    return data


def decode(
    plan: CastPlan | BlockPlan, data: Tensor, num: int, *, seed: int, out: Tensor, weight: float | None = None
) -> None:
    """Decode into ``out``, or add ``weight`` times it."""
    tile = max(_TILE, _unit(plan))
    decode_kernel[(triton.cdiv(num, tile),)](
        data,
        _scales_at(plan, num),
        out,
        0.0 if weight is None else float(weight),
        num,
        _num_codes(plan, num),
        _signed(shared_key(seed)),
        C=_code(plan, _aligned(plan, data)),
        ADD=weight is not None,
        TILE=tile,
        num_warps=max(1, tile // _WARP),
        enable_fp_fusion=False,
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
    """Encode ``sum(weight · decoded) + residual`` in one kernel."""
    device = datas[0].device
    data = torch.empty(plan_out.nbytes(num), dtype=torch.uint8, device=device) if out is None else out
    cover, tile = _cover(plan_out, _unit(plan_in))
    table = _table(datas, weights, seeds)
    reduce_kernel[(triton.cdiv(_num_codes(plan_out, num), cover),)](
        table,
        len(datas),
        _scales_at(plan_in, num),
        _num_codes(plan_in, num),
        table if residual is None else residual,
        data,
        _scales_at(plan_out, num),
        num,
        _num_codes(plan_out, num),
        _signed(shared_key(seed)),
        _signed(noise_key(seed)),
        IN=_code(plan_in, all(_aligned(plan_in, data) for data in datas)),
        C=_code(plan_out, _aligned(plan_out, data)),
        FEEDBACK=residual is not None,
        COVER=cover,
        TILE=tile,
        num_warps=max(1, tile // _WARP),
        enable_fp_fusion=False,
    )
    return data


def _table(datas: Sequence[Tensor], weights: Sequence[float], seeds: Sequence[int]) -> Tensor:
    """Return addresses, bits of the float32 weights and shared keys, int64 (3, payloads), on the payloads' device.

    It goes over in pinned memory, so the host waits for nothing.
    """
    addresses = [data.data_ptr() for data in datas]
    bits = [int.from_bytes(struct.pack("<f", weight), "little", signed=True) for weight in weights]
    keys = [_signed(shared_key(seed)) for seed in seeds]
    on_gpu = datas[0].is_cuda
    table = torch.tensor([addresses, bits, keys], dtype=torch.int64, pin_memory=on_gpu)
    return table.to(datas[0].device, non_blocking=True)


@lru_cache(maxsize=1024)
def _code(plan: CastPlan | BlockPlan, aligned: bool) -> BlockCode:
    """Reduce a plan to what decides a kernel's instructions."""
    if isinstance(plan, CastPlan):
        return BlockCode(plan.dtype, itemsize=plan.itemsize, aligned=aligned)
    mode: str = plan.kind
    if plan.kind == "integer":
        mode = "midrise" if plan.midrise else "midtread"
    elif plan.unbiased and not plan.stochastic:
        mode = "sign-unbiased"
    return BlockCode(
        mode=mode,
        stochastic=plan.stochastic,
        bits=0 if plan.kind == "ternary" else plan.bits,
        step=GAUSSIAN_STEP[plan.bits] * MEAN_TO_SIGMA if plan.kind == "integer" else 0.0,
        block=plan.block,
        log_block=plan.block.bit_length() - 1,
        rotate=plan.rotate,
        largest=bf16_bits(plan.largest_scale),
    )


def _unit(plan: Plan) -> int:
    """Return how many elements a tile must hold whole: a block and a rotation."""
    return max(plan.block, ROTATION if plan.rotate else 1) if isinstance(plan, BlockPlan) else 1


def _cover(plan: Plan, unit: int = 1) -> tuple[int, int]:
    """Return the elements that a program encodes and those of its tile, multiples of ``unit`` and the plan's own."""
    unit = max(unit, _unit(plan))
    if isinstance(plan, BlockPlan) and plan.kind == "ternary":
        tile = max(_TILE, 8 * unit)
        return tile * 5 // 8, tile
    tile = max(_TILE, unit)
    return tile, tile


def _num_codes(plan: CastPlan | BlockPlan, num: int) -> int:
    return plan.num_codes(num) if isinstance(plan, BlockPlan) else num


def _scales_at(plan: CastPlan | BlockPlan, num: int) -> int:
    return plan.codes_nbytes(num) if isinstance(plan, BlockPlan) else plan.nbytes(num)


def _aligned(plan: CastPlan | BlockPlan, data: Tensor) -> bool:
    return isinstance(plan, CastPlan) and data.data_ptr() % plan.itemsize == 0


def _signed(word: int) -> int:
    """Return 32 bits as a signed number: Triton passes that as int32 whatever its value."""
    return word - (1 << 32) if word >> 31 else word
