"""Sparse codecs in Triton: from a plan and tensors to the launches of the kernels of `sparse_kernels`.

``blocktopk`` finds what it keeps in the pass itself; ``topk`` compares with the cut that `torch.topk` found and
``threshold`` with its value, both after a pass that counts; ``randk`` marks its positions beforehand.

Only ``threshold`` waits for the device when it encodes (its size depends on the values), and only Elias-Fano positions
(``topk``, ``threshold``) when they are decoded (bytes that hold another number of them are an error).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fedq.kernels.plan import SCALE_GROUP, SparsePlan, bf16_bits
from fedq.kernels.reference import elias_fano_decode, elias_fano_encode
from fedq.kernels.reference.sparse import num_kept, positions
from fedq.kernels.triton.sparse_kernels import (
    SparseCode,
    count_kernel,
    encode_kernel,
    pack_kernel,
    scatter_kernel,
    sortable_kernel,
)

_NUM_WARPS = 8
"""Number of warps for a group: 16 elements a thread (at 32 the registers run out)."""
_LARGEST_K = 32
"""Largest number of values of a block that are found one after another."""
_PACKED = 512
"""Number of bytes or kept values of a program in the passes over the kept ones."""


def supports(plan: SparsePlan) -> bool:
    """Return whether these kernels serve a plan: ``blocktopk`` up to blocks of 4,096 and 32 values of each."""
    return plan.kind != "blocktopk" or (plan.block <= SCALE_GROUP and plan.k <= _LARGEST_K)


def encode(
    plan: SparsePlan, x: Tensor, *, seed: int, out: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Encode ``x + residual``."""
    num, device = x.numel(), x.device
    values = _Values(x, residual)
    marked = _mark(plan, values, seed)
    count = plan.num_kept(num) if marked.num_kept is None else marked.num_kept
    nbytes = plan.nbytes(num, count)
    data = torch.empty(nbytes, dtype=torch.uint8, device=device) if out is None else out
    codes_at = plan.indices_nbytes(num, count)
    scales_at = nbytes - plan.scales_nbytes(num)
    packed = plan.bits <= 8
    local = plan.kind == "blocktopk"
    places = torch.empty(count, dtype=torch.int32 if local else torch.int64, device=device)
    codes = torch.empty(count, dtype=torch.uint8, device=device) if packed else data[codes_at:]
    encode_kernel[(triton.cdiv(num, SCALE_GROUP),)](
        values.x,
        values.residual,
        x if marked.cut is None else marked.cut,
        x if marked.before is None else marked.before,
        x if marked.marks is None else marked.marks,
        x if marked.lengths is None else marked.lengths,
        places,
        codes,
        data[scales_at:],
        num,
        count,
        plan.value,
        C=_code(plan),
        BF16=values.bf16,
        FEEDBACK=values.feedback,
        GROUP=SCALE_GROUP,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )
    if packed:
        _pack(codes, plan.bits, data[codes_at:scales_at])
    if local:
        _pack(places, _index_bits(plan), data[:codes_at])
    elif plan.kind != "randk":
        _store_positions(plan, places, num, data[:codes_at])
    return data


def decode(plan: SparsePlan, data: Tensor, num: int, *, seed: int, out: Tensor, weight: float | None = None) -> None:
    """Decode into ``out``, or add ``weight`` times it.

    Raises:
        FieldError: ``topk`` or ``threshold`` bytes do not hold as many positions as they should.
    """
    count = num_kept(plan, num, data)
    codes_at = plan.indices_nbytes(num, count)
    places = data
    if plan.kind == "randk":
        places = positions(plan, num, seed, data.device)
    elif plan.kind != "blocktopk":
        places = elias_fano_decode(data[8 if plan.kind == "threshold" else 0 : codes_at], count, num)
    if weight is None:
        out.zero_()
    if count == 0:
        return
    scatter_kernel[(triton.cdiv(count, _PACKED),)](
        data,
        places,
        codes_at,
        codes_at + plan.codes_nbytes(count),
        out,
        0.0 if weight is None else float(weight),
        num,
        count,
        C=_code(plan),
        ADD=weight is not None,
        GROUP=SCALE_GROUP,
        SIZE=_PACKED,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )


class _Values:
    """The input and residual as the kernels take them."""

    def __init__(self, x: Tensor, residual: Tensor | None) -> None:
        self.num = x.numel()
        self.bf16 = x.dtype == torch.bfloat16
        self.x = x.view(torch.int16) if self.bf16 else x
        self.feedback = residual is not None
        self.residual = x if residual is None else residual
        self.groups = triton.cdiv(self.num, SCALE_GROUP)


class _Marks(NamedTuple):
    """How the pass over the tensor knows what is kept; see `encode_kernel`. ``num_kept``: None if the plan says it."""

    num_kept: int | None = None
    cut: Tensor | None = None
    before: Tensor | None = None
    marks: Tensor | None = None
    lengths: Tensor | None = None


def _mark(plan: SparsePlan, values: _Values, seed: int) -> _Marks:
    if plan.kind == "randk":
        return _mark_random(plan, values, seed)
    if plan.kind == "blocktopk":
        return _Marks()
    cut = None
    if plan.kind == "topk":
        keys = torch.empty(values.num, dtype=torch.int32, device=values.x.device)
        sortable_kernel[(values.groups,)](
            values.x,
            values.residual,
            keys,
            values.num,
            BF16=values.bf16,
            FEEDBACK=values.feedback,
            GROUP=SCALE_GROUP,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )
        cut = keys.topk(plan.num_kept(values.num), sorted=False).values.min()
        del keys
    counts = torch.zeros(2, values.groups, dtype=torch.int64, device=values.x.device)
    count_kernel[(values.groups,)](
        values.x,
        values.residual,
        values.x if cut is None else cut,
        counts,
        values.num,
        plan.value,
        C=_code(plan),
        BF16=values.bf16,
        FEEDBACK=values.feedback,
        GROUP=SCALE_GROUP,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )
    before = torch.nn.functional.pad(counts.cumsum(dim=1), (1, 0))
    return _Marks(num_kept=int(before[0, -1]) if plan.kind == "threshold" else None, cut=cut, before=before)


def _mark_random(plan: SparsePlan, values: _Values, seed: int) -> _Marks:
    device = values.x.device
    kept = positions(plan, values.num, seed, device)
    marks = torch.zeros(values.num, dtype=torch.uint8, device=device)
    marks[kept] = 1
    before = torch.searchsorted(kept, SCALE_GROUP * torch.arange(values.groups, device=device))
    lengths = None
    if plan.unbias:
        edges = torch.arange(kept.numel() + 1, device=device) * values.num // kept.numel()
        lengths = edges.diff().to(torch.float32)
    return _Marks(before=before, marks=marks, lengths=lengths)


def _store_positions(plan: SparsePlan, places: Tensor, num: int, out: Tensor) -> None:
    """Write sorted positions as Elias-Fano, with ``threshold`` after their number."""
    if plan.kind == "threshold":
        out[:8] = torch.tensor([places.numel()], dtype=torch.int64).view(torch.uint8)
        out = out[8:]
    out.copy_(elias_fano_encode(places, num))


def _pack(codes: Tensor, bits: int, out: Tensor) -> None:
    """Pack codes (uint8 or int32) of 1 to 20 bits into ``out``."""
    if out.numel():
        pack_kernel[(triton.cdiv(out.numel(), _PACKED),)](
            codes,
            out,
            codes.numel(),
            out.numel(),
            BITS=bits,
            SIZE=_PACKED,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )


def _index_bits(plan: SparsePlan) -> int:
    return plan.block.bit_length() - 1


def _code(plan: SparsePlan) -> SparseCode:
    """Reduce a plan to what decides a kernel's instructions."""
    largest = bf16_bits(plan.largest_scale)
    if plan.kind == "blocktopk":
        return SparseCode(plan.kind, plan.bits, plan.k, plan.block, _index_bits(plan), largest=largest)
    return SparseCode(plan.kind, plan.bits, unbias=plan.unbias, largest=largest)
