"""The kernels of the sparse codecs: one pass over the tensor, and short ones over what is kept.

A program covers one group of 4,096 elements, the ones that share a scale, and every plan runs the same pass: keep,
code, leave the rest in the residual. Only what is kept differs from plan to plan (`_kept`). Positions and codes of the
kept values, which are few, are packed by a pass of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fedq.kernels.plan import SCALE_GROUP
from fedq.kernels.triton.primitives import (
    absmax,
    add_finite,
    bf16_bits,
    bf16_float,
    bits_float,
    clamp,
    divide,
    float_bits,
    floor,
    largest_of_sign,
    load_bytes,
    load_code,
    load_float,
    magnitude_bits,
    safe_inverse,
    scale_bits,
    store_bytes,
    tree_sum,
)


class SparseCode(NamedTuple):
    """What a kernel is compiled for.

    Args:
        kind: ``topk``, ``blocktopk``, ``randk`` or ``threshold``.
        bits: Bits of a kept value.
        k: Number of values kept of a block.
        block: Number of elements of a block; 4,096 without blocks.
        index_bits: Bits of a position inside a block.
        unbias: Whether kept values are multiplied by the length of their run.
        largest: Bits of the largest scale that decodes to finite values.
    """

    kind: str
    bits: int
    k: int = 0
    block: int = SCALE_GROUP
    index_bits: int = 0
    unbias: bool = False
    largest: int = 0


# ---- what is kept ------------------------------------------------------------------------------------------------


@triton.jit
def _load_total(x_ptr, residual_ptr, start, num, BF16: tl.constexpr, FEEDBACK: tl.constexpr, GROUP: tl.constexpr):
    """Return ``x + residual`` of a group as float32, zeros beyond the last element."""
    place = start + tl.arange(0, GROUP)
    if start + GROUP <= num:  # without a mask the loads are 16 bytes a thread
        total = load_float(x_ptr + place, place < num, BF16, False)
    else:
        total = load_float(x_ptr + place, place < num, BF16, True)
    if FEEDBACK:
        if start + GROUP <= num:
            total += load_float(residual_ptr + place, place < num, False, False)
        else:
            total += load_float(residual_ptr + place, place < num, False, True)
    return total


@triton.jit
def _sortable(total):
    """Return magnitudes as int32 that order like them, NaN as infinity."""
    return tl.minimum(magnitude_bits(total), 0x7F800000)


@triton.jit
def _strongest_of_blocks(total, C: tl.constexpr, GROUP: tl.constexpr):
    """Return where the k largest magnitudes of each block are, flat; of equal ones the first wins."""
    key = tl.reshape(_sortable(total), (GROUP // C.block, C.block))
    local = tl.arange(0, C.block)[None, :]
    for _ in range(C.k):
        first = tl.min(tl.where(key == tl.max(key, axis=1, keep_dims=True), local, C.block), axis=1, keep_dims=True)
        key = tl.where(local == first, -1, key)
    return tl.reshape(key < 0, (GROUP,))


@triton.jit
def _ranks(kept):
    """Return how many are kept before each position, int32."""
    count = kept.to(tl.int32)
    return tl.cumsum(count, 0) - count


@triton.jit(do_not_specialize=["num", "value"])
def count_kernel(
    x_ptr,
    residual_ptr,
    cut_ptr,
    counts_ptr,
    num,
    value,
    C: tl.constexpr,
    BF16: tl.constexpr,
    FEEDBACK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Count by group what surely is kept, and with ``topk`` what equals the cut: int64 (2, groups)."""
    group = tl.program_id(0).to(tl.int64)
    place = group * GROUP + tl.arange(0, GROUP)
    total = _load_total(x_ptr, residual_ptr, group * GROUP, num, BF16, FEEDBACK, GROUP)
    if C.kind == "topk":
        cut = tl.load(cut_ptr)
        key = tl.where(place < num, _sortable(total), -1)
        tl.store(counts_ptr + group, tl.sum((key > cut).to(tl.int32), axis=0).to(tl.int64))
        ties = tl.sum((key == cut).to(tl.int32), axis=0).to(tl.int64)
        tl.store(counts_ptr + tl.num_programs(0) + group, ties)
    else:
        kept = (place < num) & ~(tl.abs(total) < value)
        tl.store(counts_ptr + group, tl.sum(kept.to(tl.int32), axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["num"])
def sortable_kernel(x_ptr, residual_ptr, out_ptr, num, BF16: tl.constexpr, FEEDBACK: tl.constexpr, GROUP: tl.constexpr):
    """Write what `torch.topk` looks at: magnitudes of ``x + residual`` as int32, NaN as infinity."""
    start = tl.program_id(0).to(tl.int64) * GROUP
    place = start + tl.arange(0, GROUP)
    total = _load_total(x_ptr, residual_ptr, start, num, BF16, FEEDBACK, GROUP)
    tl.store(out_ptr + place, _sortable(total), mask=place < num)


# ---- the pass over the tensor ------------------------------------------------------------------------------------


@triton.jit
def _quantize(sent, counted, C: tl.constexpr, GROUP: tl.constexpr):
    """Return sign-and-magnitude codes (int32), what they decode to, and the group's scale as bfloat16 bits (1, 1).

    Args:
        sent: Values of the group, float32 (1, GROUP).
        counted: Whether each value is kept and inside the tensor.
        C: The code, a `SparseCode`.
        GROUP: Number of elements of a group: 4,096.
    """
    LEVELS: tl.constexpr = 1 << (C.bits - 1)
    magnitude = tl.where(counted, tl.abs(sent), 0.0)
    top = absmax(magnitude)
    # From 2^96 on finite values count times 2^-64, so that no sum leaves float32's range; the scale gets it back.
    is_large = (magnitude_bits(top) >= 0x6F800000) & (magnitude_bits(top) < 0x7F800000)
    unit = tl.where(is_large, 2.0**-64, 1.0)
    magnitude = magnitude * unit
    if C.bits > 2:
        step = divide(top * unit, LEVELS * 1.0)
    else:
        count = tl.sum(counted.to(tl.int32), axis=1, keep_dims=True).to(tl.float32)
        mean = divide(tree_sum(magnitude, 1, GROUP, 12), tl.where(count < 1.0, 1.0, count))
        step = mean * (5.0 / 3.0)
    cell = floor(clamp(magnitude * safe_inverse(step), 0.0, LEVELS - 0.5))
    level = tl.where(cell != cell, 0.0, cell) + 0.5
    products = tree_sum(tl.where(counted, magnitude * level, 0.0), 1, GROUP, 12)
    squares = tree_sum(tl.where(counted, level * level, 0.0), 1, GROUP, 12)
    largest = tl.where(is_large, C.largest - (64 << 7), C.largest)
    bits = scale_bits(products * safe_inverse(squares), False, largest)
    bits = tl.where(is_large & (bits > 0), bits + (64 << 7), bits).to(tl.uint32)
    negative = sent < 0.0
    codes = (level - 0.5).to(tl.int32) + tl.where(negative, LEVELS, 0)
    return codes, tl.where(negative, -level, level) * bf16_float(bits), bits


@triton.jit
def _kept(total, inside, cut_ptr, before_ptr, marks_ptr, group, num_kept, value, C: tl.constexpr, GROUP: tl.constexpr):
    """Return which elements of a group are kept, flat, and how many are kept before it; see `encode_kernel`."""
    if C.kind == "blocktopk":
        before = group * (GROUP // C.block * C.k)
        kept = _strongest_of_blocks(total, C, GROUP)
        kept = kept & (_ranks(kept) < tl.minimum(num_kept - before, GROUP).to(tl.int32))
    elif C.kind == "topk":
        cut = tl.load(cut_ptr)
        groups = tl.num_programs(0)
        # Of those equal to the cut, the first ones of the tensor fill up to num_kept.
        room = num_kept - tl.load(before_ptr + groups)
        ties_before = tl.minimum(tl.load(before_ptr + groups + 1 + group), room)
        before = tl.load(before_ptr + group) + ties_before
        tie = inside & (_sortable(total) == cut)
        tie = tie & (_ranks(tie) < tl.minimum(room - ties_before, GROUP).to(tl.int32))
        kept = tie | (inside & (_sortable(total) > cut))
    elif C.kind == "threshold":
        before = tl.load(before_ptr + group)
        kept = inside & ~(tl.abs(total) < value)
    else:
        before = tl.load(before_ptr + group)
        kept = tl.load(marks_ptr + group * GROUP + tl.arange(0, GROUP), mask=inside, other=0) != 0
    return kept, before


@triton.jit
def _store_kept(sent, inside, kept, rank, before, codes_ptr, scale_ptr, C: tl.constexpr, GROUP: tl.constexpr):
    """Code the kept values of a group, store codes and scale, and return what they decode to, flat."""
    if C.bits == 32:
        bits = tl.where(sent != sent, 0x7FC00000, float_bits(sent))
        store_bytes(codes_ptr + before * 4, rank * 4, bits, kept, 4)
        decoded = sent
    elif C.bits == 16:
        bits = bf16_bits(sent)
        store_bytes(codes_ptr + before * 2, rank * 2, bits, kept, 2)
        decoded = bf16_float(bits)
    else:
        counted = tl.reshape(kept & inside, (1, GROUP))
        codes, levels, bits = _quantize(tl.reshape(sent, (1, GROUP)), counted, C, GROUP)
        tl.store(codes_ptr + before + rank, tl.reshape(codes, (GROUP,)).to(tl.uint8), mask=kept)
        store_bytes(scale_ptr, tl.arange(0, 1)[:, None], bits, tl.full((1, 1), 1, tl.int1), 2)
        decoded = tl.reshape(levels, (GROUP,))
    return decoded


@triton.jit(do_not_specialize=["num", "num_kept", "value"])
def encode_kernel(
    x_ptr,
    residual_ptr,
    cut_ptr,
    before_ptr,
    marks_ptr,
    lengths_ptr,
    places_ptr,
    codes_ptr,
    scales_ptr,
    num,
    num_kept,
    value,
    C: tl.constexpr,
    BF16: tl.constexpr,
    FEEDBACK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Keep, code and leave the rest in the residual.

    Args:
        x_ptr: The input; bfloat16 comes as int16.
        residual_ptr: The residual, float32, replaced in place.
        cut_ptr: Bits of the smallest kept magnitude, int32; ``topk`` only.
        before_ptr: Number kept before each group, int64; ``topk``: above the cut, then equal to it, (2, groups).
        marks_ptr: Marks, uint8: 1 where a value is kept; ``randk`` only.
        lengths_ptr: Lengths of the runs, float32; ``randk`` with unbias only.
        places_ptr: Output: positions of the kept ones in order, int64; ``blocktopk``: in their block, int32.
        codes_ptr: Output: codes of the kept ones, one a byte, or at 16 and 32 bits the payload's values.
        scales_ptr: Output: the payload's scales.
        num: Number of elements.
        num_kept: Number of elements that are kept.
        value: Smallest magnitude that is kept; ``threshold`` only.
    """
    group = tl.program_id(0).to(tl.int64)
    start = group * GROUP
    local = tl.arange(0, GROUP)
    inside = local < tl.minimum(num - start, GROUP).to(tl.int32)
    total = _load_total(x_ptr, residual_ptr, start, num, BF16, FEEDBACK, GROUP)
    kept, before = _kept(total, inside, cut_ptr, before_ptr, marks_ptr, group, num_kept, value, C, GROUP)
    rank = _ranks(kept)
    if C.kind == "blocktopk":
        tl.store(places_ptr + before + rank, local % C.block, mask=kept)
    elif C.kind != "randk":
        tl.store(places_ptr + before + rank, start + local, mask=kept)
    sent = total
    if FEEDBACK:
        # The sum of two finite numbers is sent as one; loaded once more, as hardly ever needed.
        overflows = inside & (magnitude_bits(total) == 0x7F800000)
        x = load_float(x_ptr + start + local, overflows, BF16, True)
        old = tl.load(residual_ptr + start + local, mask=overflows, other=0.0)
        sent = tl.where(overflows, add_finite(x, old), total)
    if C.unbias:
        longer = sent * tl.load(lengths_ptr + before + rank, mask=kept, other=0.0)
        overflows = (magnitude_bits(longer) == 0x7F800000) & (magnitude_bits(sent) < 0x7F800000)
        sent = tl.where(overflows, largest_of_sign(sent), longer)
    decoded = _store_kept(sent, inside, kept, rank, before, codes_ptr, scales_ptr + group * 2, C, GROUP)
    if FEEDBACK:
        new = total - tl.where(kept, decoded, 0.0)
        # What stays is loaded once more: hardly ever needed, and one register an element less.
        stays = inside & (magnitude_bits(new) >= 0x7F800000)
        new = tl.where(stays, tl.load(residual_ptr + start + local, mask=stays, other=0.0), new)
        if start + GROUP <= num:
            tl.store(residual_ptr + start + local, new)
        else:
            tl.store(residual_ptr + start + local, new, mask=inside)


# ---- the passes over what is kept --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_codes", "num_bytes"])
def pack_kernel(codes_ptr, out_ptr, num_codes, num_bytes, BITS: tl.constexpr, SIZE: tl.constexpr):
    """Pack codes of 1 to 20 bits, least significant first: a program gathers the codes of its bytes."""
    byte = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    first = byte * 8 // BITS
    shift = (byte * 8 - first * BITS).to(tl.int32)
    word = tl.load(codes_ptr + first, mask=first < num_codes, other=0).to(tl.int32) >> shift
    for more in tl.static_range(1, (BITS + 6) // BITS + 1):
        at = more * BITS - shift
        wanted = (first + more < num_codes) & (at < 8)
        word |= tl.load(codes_ptr + first + more, mask=wanted, other=0).to(tl.int32) << tl.minimum(at, 8)
    tl.store(out_ptr + byte, (word & 255).to(tl.uint8), mask=byte < num_bytes)


@triton.jit(do_not_specialize=["codes_at", "scales_at", "weight", "num", "num_kept"])
def scatter_kernel(
    data_ptr,
    places_ptr,
    codes_at,
    scales_at,
    out_ptr,
    weight,
    num,
    num_kept,
    C: tl.constexpr,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Decode kept values and store them, or add ``weight`` times them, where they belong."""
    rank = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    valid = rank < num_kept
    if C.kind == "blocktopk":
        place = rank // C.k * C.block + load_code(data_ptr, rank, codes_at, valid, C.index_bits).to(tl.int64)
    else:
        place = tl.load(places_ptr + rank, mask=valid, other=num)
    if C.bits == 32:
        values = bits_float(load_bytes(data_ptr + codes_at, rank * 4, valid, 4))
    elif C.bits == 16:
        values = bf16_float(load_bytes(data_ptr + codes_at, rank * 2, valid, 2))
    else:
        LEVELS: tl.constexpr = 1 << (C.bits - 1)
        code = load_code(data_ptr + codes_at, rank, scales_at - codes_at, valid, C.bits).to(tl.int32)
        group = tl.minimum(place, num - 1) // GROUP
        scale = bf16_float(load_bytes(data_ptr + scales_at, group * 2, valid, 2))
        level = (code & (LEVELS - 1)).to(tl.float32) + 0.5
        values = tl.where(code >= LEVELS, -level, level) * scale
    valid = valid & (place < num)
    if ADD:
        values = tl.load(out_ptr + place, mask=valid, other=0.0) + weight * values
    tl.store(out_ptr + place, values, mask=valid)
