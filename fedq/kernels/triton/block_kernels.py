"""The kernels of casts and block codecs: encode with feedback, decode (set or add), reduce; one fused pass each.

A program covers one tile of whole blocks. A warp takes up to 1,024 elements, so a row of up to 1,024 lies inside one
warp: trees and butterflies are register adds and shuffles, without shared memory. A tile that is full takes a branch
without masks (its loads are 16 bytes a thread); only the last tile masks.

Five trits a byte do not align with blocks of 2^n: a ternary program covers five eighths of its tile, so that it covers
whole blocks *and* whole bytes (5·2^n elements, 2^n bytes), and gathers the digits of its bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fedq.kernels.triton.primitives import (
    absmax,
    add_finite,
    bf16_bits,
    bf16_float,
    bits_float,
    clamp,
    divide,
    flips,
    float_bits,
    floor,
    load_bytes,
    load_code,
    load_float,
    magnitude_bits,
    rotate,
    safe_inverse,
    scale_bits,
    store_bytes,
    tree_sum,
    uniform,
    unrotate,
    whole,
)


class BlockCode(NamedTuple):
    """What a kernel is compiled for: a plan, reduced to what decides its instructions.

    Args:
        mode: ``fp32``, ``fp16``, ``bf16``, ``midrise``, ``midtread``, ``ternary``, ``sign`` or ``sign-unbiased``.
        stochastic: Whether rounding takes noise.
        bits: Bits of a code; 0 for ternary and casts.
        step: Factor of the mean magnitude that gives the step of the Gaussian grid.
        block: Elements of a block.
        log_block: Binary logarithm of `block`.
        rotate: Whether runs of 256 are rotated.
        largest: Bits of the largest scale that decodes to finite values.
        itemsize: Bytes of a cast value; 0 if this is no cast.
        aligned: Whether the payload is aligned to the cast values.
    """

    mode: str
    stochastic: bool = False
    bits: int = 0
    step: float = 0.0
    block: int = 1
    log_block: int = 0
    rotate: bool = False
    largest: int = 0
    itemsize: int = 0
    aligned: bool = False


# ---- from values to codes and back -------------------------------------------------------------------------------


@triton.jit
def _quantize(y, counts, inside, noise, largest, C: tl.constexpr, ROWS: tl.constexpr):
    """Turn rows into int32 codes (ROWS, block), bfloat16 bits of their scales, and what they measure, (ROWS, 1).

    Args:
        y: Values of the rows, float32 (ROWS, block), zeros where there is no element.
        counts: Number of elements of each row, float32 (ROWS, 1).
        inside: Whether each position is an element.
        noise: Noise in [0, 1), float32 like ``y``, read by stochastic codes.
        largest: Bits of the largest scale that there may be.
        C: The code, a `BlockCode`.
        ROWS: Number of blocks.

    Returns:
        Codes, bits of the scales, and each row's largest magnitude or sum of magnitudes: that which gives the scale.
    """
    # A value is clamped before it is rounded down, which gives what the reference's other order does.
    if C.stochastic or C.mode == "midtread":  # noqa: SIM108 (a constant branch)
        measured = absmax(y)
    else:
        measured = tree_sum(tl.abs(y), ROWS, C.block, C.log_block)
    if C.mode == "midrise" and not C.stochastic:
        mean = divide(measured, counts)
        cell = floor(clamp(y * safe_inverse(mean * C.step), 0.0 - (1 << (C.bits - 1)), (1 << (C.bits - 1)) - 0.5))
        levels = tl.where(inside, cell + 0.5, 0.0)
        products = tree_sum(y * levels, ROWS, C.block, C.log_block)
        bits = scale_bits(divide(products, tree_sum(levels * levels, ROWS, C.block, C.log_block)), False, largest)
        codes = _codes(cell, C.bits)
    elif C.mode == "midtread" and not C.stochastic:
        bits = scale_bits(divide(measured, (1 << (C.bits - 1)) - 1.0), False, largest)
        q = y * safe_inverse(bf16_float(bits))
        codes = _codes(whole(clamp(q, 1.0 - (1 << (C.bits - 1)), (1 << (C.bits - 1)) - 1.0)), C.bits)
    elif C.mode == "midrise":
        bits = scale_bits(divide(measured, (1 << (C.bits - 1)) - 0.5), True, largest)
        q = y * safe_inverse(bf16_float(bits)) - 0.5 + noise
        codes = _codes(floor(clamp(q, 0.0 - (1 << (C.bits - 1)), (1 << (C.bits - 1)) - 0.5)), C.bits)
    elif C.mode == "midtread":
        bits = scale_bits(divide(measured, (1 << (C.bits - 1)) - 1.0), True, largest)
        q = y * safe_inverse(bf16_float(bits)) + noise
        codes = _codes(floor(clamp(q, 1.0 - (1 << (C.bits - 1)), (1 << (C.bits - 1)) - 0.5)), C.bits)
    elif C.mode == "ternary" and not C.stochastic:
        magnitude = tl.abs(y)
        keep = magnitude > 0.75 * divide(measured, counts)
        kept = tl.sum(keep.to(tl.int32), axis=1, keep_dims=True).to(tl.float32)
        counted = tl.where(keep | (magnitude_bits(y) >= 0x7F800000), magnitude, 0.0)
        total = tree_sum(counted, ROWS, C.block, C.log_block)
        bits = scale_bits(divide(total, tl.where(kept < 1.0, 1.0, kept)), False, largest)
        codes = tl.where(keep, tl.where(y < 0.0, 0, 2), 1)
    elif C.mode == "ternary":
        bits = scale_bits(measured, True, largest)
        keep = tl.abs(y) * safe_inverse(bf16_float(bits)) > noise
        codes = tl.where(keep, tl.where(y < 0.0, 0, 2), 1)
    elif C.stochastic:
        bits = scale_bits(measured, True, largest)
        positive = y * safe_inverse(bf16_float(bits)) > 2.0 * noise - 1.0
        codes = tl.where(positive, 0, 1)
    else:
        if C.mode == "sign-unbiased":
            scale = tree_sum(y * (y * safe_inverse(measured)), ROWS, C.block, C.log_block)
        else:
            scale = divide(measured, counts)
        bits = scale_bits(scale, False, largest)
        codes = tl.where(y < 0.0, 1, 0)
    return codes, bits, measured


@triton.jit
def _codes(cell, BITS: tl.constexpr):
    """Return int32 codes of whole cells; a NaN cell becomes the lowest code."""
    return tl.where(cell != cell, 0.0, cell + (1 << (BITS - 1))).to(tl.int32)


@triton.jit
def _levels(codes, C: tl.constexpr):
    """Return the float32 values of int32 codes at scale 1."""
    values = codes.to(tl.float32)
    if C.mode == "midrise":
        values = values - ((1 << (C.bits - 1)) - 0.5)
    elif C.mode == "midtread":
        values = values - (1 << (C.bits - 1))
    elif C.bits == 0:
        values = values - 1.0
    else:
        values = 1.0 - 2.0 * values
    return values


@triton.jit
def _cast_bits(x, C: tl.constexpr):
    """Return the bits of cast float32 values as uint32."""
    if C.mode == "fp32":
        bits = float_bits(x)
    elif C.mode == "bf16":
        bits = bf16_bits(x)
    else:
        finite = tl.where(tl.abs(x) == float("inf"), x, clamp(x, -65504, 65504))
        half = finite.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        bits = tl.where(x != x, 0x7E00, half).to(tl.uint32)
    return bits


@triton.jit
def _cast_float(bits, C: tl.constexpr):
    """Return the float32 values of cast values' bits."""
    if C.mode == "fp32":
        x = bits_float(bits)
    elif C.mode == "bf16":
        x = bf16_float(bits)
    else:
        x = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return x


# ---- from codes to bytes and back --------------------------------------------------------------------------------


@triton.jit
def _store_codes(pointer, start, codes, limit, C: tl.constexpr, TILE: tl.constexpr):
    """Pack the flat int32 codes of elements ``start ...`` and store the bytes of the first ``limit`` of them.

    ``pointer`` is the first byte of all codes. ``start`` is a multiple of 8, ternary of 5. Codes beyond are 0.
    """
    if C.bits == 0:
        digit = tl.arange(0, 8)
        weight = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, 27)))
        weight = tl.where(digit == 4, 81, tl.where(digit > 4, 0, weight))
        index = tl.arange(0, TILE // 8)[:, None] * 5 + digit[None, :]
        digits = tl.reshape(tl.gather(codes, tl.reshape(index, (TILE,)), 0), (TILE // 8, 8))
        byte = tl.arange(0, TILE // 8)
        packed = tl.sum(digits * weight[None, :], axis=1).to(tl.uint8)
        tl.store(pointer + start // 5 + byte, packed, mask=byte * 5 < limit)
    elif C.bits == 8:
        byte = tl.arange(0, TILE)
        tl.store(pointer + start + byte, codes.to(tl.uint8), mask=byte < limit)
    elif 8 % C.bits == 0:
        shift = tl.arange(0, 8 // C.bits) * C.bits
        rows = tl.reshape(codes, (TILE * C.bits // 8, 8 // C.bits))
        byte = tl.arange(0, TILE * C.bits // 8)
        packed = tl.sum(rows << shift[None, :], axis=1).to(tl.uint8)
        tl.store(pointer + start // (8 // C.bits) + byte, packed, mask=byte * (8 // C.bits) < limit)
    else:  # eight codes are ``bits`` whole bytes
        place = tl.arange(0, 8)
        rows = tl.reshape(codes, (TILE // 8, 8)).to(tl.int64)
        words = tl.sum(rows << (place * C.bits).to(tl.int64)[None, :], axis=1)
        packed = (words[:, None] >> (place * 8).to(tl.int64)[None, :]).to(tl.uint8)
        byte = tl.arange(0, TILE // 8)[:, None] * C.bits + place[None, :]
        inside = (place < C.bits)[None, :] & (byte * 8 < limit * C.bits)
        tl.store(pointer + start // 8 * C.bits + byte, packed, mask=inside)


@triton.jit
def _load_codes(pointer, start, limit, C: tl.constexpr, TILE: tl.constexpr):
    """Load the codes of elements ``start ...`` (a multiple of 8) as flat int32; those from ``limit`` on are any."""
    local = tl.arange(0, TILE)
    if C.bits == 0:
        place = local + (start % 5).to(tl.int32)
        digit = place % 5
        packed = tl.load(pointer + start // 5 + place // 5, mask=local < limit, other=0).to(tl.int32)
        # byte // 3^digit as a product: ceil(2^16 / 3^digit) is exact for a byte.
        factor = tl.where(digit == 0, 65536, tl.where(digit == 1, 21846, tl.where(digit == 2, 7282, 2428)))
        quotient = (packed * tl.where(digit == 4, 810, factor)) >> 16
        codes = quotient - 3 * ((quotient * 21846) >> 16)
    elif C.bits == 8:
        codes = tl.load(pointer + start + local, mask=local < limit, other=0).to(tl.int32)
    elif 8 % C.bits == 0:
        byte = tl.arange(0, TILE * C.bits // 8)
        first = pointer + start // (8 // C.bits)
        packed = tl.load(first + byte, mask=byte * (8 // C.bits) < limit, other=0).to(tl.int32)
        shift = tl.arange(0, 8 // C.bits) * C.bits
        codes = tl.reshape((packed[:, None] >> shift[None, :]) & ((1 << C.bits) - 1), (TILE,))
    else:
        num_bytes = (limit * C.bits + 7) // 8
        codes = load_code(pointer + start // 8 * C.bits, local, num_bytes, local < limit, C.bits).to(tl.int32)
    return codes


@triton.jit
def _store_values(pointer, bits, limit, C: tl.constexpr, TILE: tl.constexpr):
    """Store cast values, given as uint32 bits: whole if the payload is aligned to them, otherwise byte by byte."""
    local = tl.arange(0, TILE)
    if not C.aligned:
        store_bytes(pointer, local * C.itemsize, bits, local < limit, C.itemsize)
    elif C.itemsize == 4:
        tl.store(pointer.to(tl.pointer_type(tl.uint32)) + local, bits, mask=local < limit)
    else:
        tl.store(pointer.to(tl.pointer_type(tl.uint16)) + local, bits.to(tl.uint16), mask=local < limit)


@triton.jit
def _load_values(pointer, limit, C: tl.constexpr, TILE: tl.constexpr):
    """Load cast values as uint32 bits, zero from ``limit`` on."""
    local = tl.arange(0, TILE)
    if not C.aligned:
        bits = load_bytes(pointer, local * C.itemsize, local < limit, C.itemsize)
    elif C.itemsize == 4:
        bits = tl.load(pointer.to(tl.pointer_type(tl.uint32)) + local, mask=local < limit, other=0)
    else:
        bits = tl.load(pointer.to(tl.pointer_type(tl.uint16)) + local, mask=local < limit, other=0).to(tl.uint32)
    return bits


# ---- tiles -------------------------------------------------------------------------------------------------------


@triton.jit
def _decode_tile(data_ptr, scales_at, start, num_codes, key, C: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr):
    """Return the decoded values of TILE elements from ``start`` on, flat float32; any beyond ``num_codes``.

    Args:
        data_ptr: The payload.
        scales_at: Offset of the scales in the payload, in bytes.
        start: Index of the first element, a multiple of the block and, if rotated, of 256.
        num_codes: Number of codes in the payload.
        key: Shared key of the payload's seed.
        C: The code, a `BlockCode`.
        TILE: Number of elements.
        FULL: Whether the payload has codes for all of them.
    """
    limit = TILE if FULL else tl.minimum(num_codes - start, TILE).to(tl.int32)
    if C.itemsize > 0:
        decoded = _cast_float(_load_values(data_ptr + start * C.itemsize, limit, C, TILE), C)
    else:
        codes = tl.reshape(_load_codes(data_ptr, start, limit, C, TILE), (TILE // C.block, C.block))
        row = tl.arange(0, TILE // C.block)[:, None]
        scales_ptr = data_ptr + scales_at + start // C.block * 2
        bits = load_bytes(scales_ptr, row * 2, row * C.block < limit, 2)
        if C.rotate:
            decoded = tl.reshape(_levels(codes, C) * bf16_float(_shrunk(bits)), (TILE,))
            decoded = _unrotated(decoded, bits, flips(start, key, TILE), C, TILE)
        else:
            decoded = tl.reshape(_levels(codes, C) * bf16_float(bits), (TILE,))
    return decoded


@triton.jit
def _is_large(bits):
    """Return which bfloat16 scales, given by their bits, are at least 2^96 in size and finite."""
    size = bits & 0x7FFF
    return (size >= 0x6F80) & (size < 0x7F80)


@triton.jit
def _shrunk(bits):
    """Return the bits of scales, large ones times 2^-64, so that no sum of a rotation leaves float32's range."""
    return tl.where(_is_large(bits), bits - (64 << 7), bits).to(tl.uint32)


@triton.jit
def _unrotated(values, bits, flip, C: tl.constexpr, TILE: tl.constexpr):
    """Undo the rotation of flat values that have shrunk scales; what is beyond float32 is its largest number.

    Args:
        values: The rotated values, flat float32 of TILE elements.
        bits: Bits of the scales before they shrank, (rows, 1).
        flip: Whether the rotation flipped the sign of each value, 0 or 1.
        C: The code, a `BlockCode`.
        TILE: Number of elements.
    """
    values = unrotate(values, flip, TILE)
    is_large = _is_large(bits)
    if tl.max(tl.reshape(is_large.to(tl.int32), (TILE // C.block,)), axis=0) != 0:
        rows = tl.reshape(values, (TILE // C.block, C.block))
        grown = clamp(rows, -18446742974197923840.0, 18446742974197923840.0) * 18446744073709551616.0
        values = tl.reshape(tl.where(is_large, grown, rows), (TILE,))
    return values


@triton.jit
def _encode_tile(
    total,
    data_ptr,
    scales_at,
    start,
    num_codes,
    key,
    noise_key,
    C: tl.constexpr,
    COVER: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
):
    """Encode a tile's values, store codes and scales, and return what a receiver decodes, flat float32.

    Args:
        total: Values of the tile, flat float32 of TILE elements, zeros beyond the last element and beyond COVER.
        data_ptr: The payload.
        scales_at: Offset of the scales in the payload, in bytes.
        start: Index of the tile's first element.
        num_codes: Number of codes of the whole tensor.
        key: Shared key of the seed.
        noise_key: Noise key of the seed.
        C: The code, a `BlockCode`.
        COVER: Number of elements of the tile that are this program's.
        TILE: Number of elements of the tile.
        FULL: Whether all of them have a code.
    """
    limit = TILE if FULL else tl.minimum(num_codes - start, COVER).to(tl.int32)
    if C.itemsize > 0:
        bits = _cast_bits(total, C)
        _store_values(data_ptr + start * C.itemsize, bits, limit, C, TILE)
        decoded = _cast_float(bits, C)
    else:
        ROWS: tl.constexpr = TILE // C.block
        local = tl.arange(0, TILE)
        row = tl.arange(0, ROWS)[:, None]
        y = total
        if C.rotate:
            flip = flips(start, key, TILE)
            y = rotate(total, flip, TILE)
        noise = uniform(start + local, noise_key) if C.stochastic else y
        if FULL:
            counts = tl.full((ROWS, 1), C.block, tl.float32)
            inside = tl.full((1, 1), 1, tl.int1)
        else:
            counts = tl.minimum(tl.maximum(limit - row * C.block, 1), C.block).to(tl.float32)
            inside = tl.reshape(local < limit, (ROWS, C.block))
        noise = tl.reshape(noise, (ROWS, C.block))
        codes, bits, measured = _quantize(tl.reshape(y, (ROWS, C.block)), counts, inside, noise, C.largest, C, ROWS)
        is_large = magnitude_bits(measured) >= 0x6F800000  # 2^96, or not finite
        if tl.max(tl.reshape(is_large.to(tl.int32), (ROWS,)), axis=0) != 0:
            # Finite values once more, times 2^-64, so that no sum leaves float32's range; the scale gets it back.
            is_large = is_large & (magnitude_bits(absmax(tl.reshape(total, (ROWS, C.block)))) < 0x7F800000)
            y = total * (2.0**-64)
            if C.rotate:
                y = rotate(y, flip, TILE)
            shrunk, smaller, _ = _quantize(
                tl.reshape(y, (ROWS, C.block)), counts, inside, noise, C.largest - (64 << 7), C, ROWS
            )
            codes = tl.where(is_large, shrunk, codes)
            bits = tl.where(is_large, tl.where(smaller == 0, 0, smaller + (64 << 7)), bits).to(tl.uint32)
        flat = tl.reshape(codes, (TILE,))
        if not FULL:
            flat = tl.where(local < limit, flat, 0)
        _store_codes(data_ptr, start, flat, limit, C, TILE)
        store_bytes(data_ptr + scales_at + start // C.block * 2, row * 2, bits, row * C.block < limit, 2)
        if C.rotate:
            # Gathered, not broadcast: up to Triton 3.6 the layout of the few scales, which every thread holds, would
            # spread over the whole butterfly, and every thread would compute the whole tile.
            scale = tl.gather(tl.reshape(bf16_float(_shrunk(bits)), (ROWS,)), local // C.block, 0)
            decoded = _unrotated(_levels(flat, C) * scale, bits, flip, C, TILE)
        else:
            decoded = tl.reshape(_levels(codes, C) * bf16_float(bits), (TILE,))
    return decoded


@triton.jit
def _encode_total(
    total,
    residual_ptr,
    data_ptr,
    scales_at,
    start,
    num,
    num_codes,
    key,
    noise_key,
    C: tl.constexpr,
    FEEDBACK: tl.constexpr,
    COVER: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
):
    """Encode ``total + residual`` and replace the residual by what was lost; where that is not finite it stays."""
    local = tl.arange(0, TILE)
    mask = (start + local < num) & (local < COVER)
    values = total
    if FEEDBACK:
        old = load_float(residual_ptr + start + local, mask, False, not FULL)
        values = add_finite(total, old)
        total = total + old
    decoded = _encode_tile(values, data_ptr, scales_at, start, num_codes, key, noise_key, C, COVER, TILE, FULL)
    if FEEDBACK:
        new = total - decoded
        new = tl.where(magnitude_bits(new) < 0x7F800000, new, old)
        if FULL:
            tl.store(residual_ptr + start + local, new)
        else:
            tl.store(residual_ptr + start + local, new, mask=mask)


# ---- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _encode_part(
    x_ptr,
    residual_ptr,
    data_ptr,
    scales_at,
    start,
    num,
    num_codes,
    key,
    noise_key,
    C: tl.constexpr,
    BF16: tl.constexpr,
    FEEDBACK: tl.constexpr,
    COVER: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
):
    local = tl.arange(0, TILE)
    mask = (start + local < num) & (local < COVER)
    x = load_float(x_ptr + start + local, mask, BF16, not FULL)
    _encode_total(
        x, residual_ptr, data_ptr, scales_at, start, num, num_codes, key, noise_key, C, FEEDBACK, COVER, TILE, FULL
    )


@triton.jit(do_not_specialize=["scales_at", "num", "num_codes", "key", "noise_key"])
def encode_kernel(
    x_ptr,
    residual_ptr,
    data_ptr,
    scales_at,
    num,
    num_codes,
    key,
    noise_key,
    C: tl.constexpr,
    BF16: tl.constexpr,
    FEEDBACK: tl.constexpr,
    COVER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Encode ``x + residual`` into ``data`` and replace the residual in place.

    Args:
        x_ptr: The input; bfloat16 comes as int16.
        residual_ptr: The residual, float32.
        data_ptr: The payload.
        scales_at: Offset of the scales in the payload, in bytes.
        num: Number of elements.
        num_codes: Number of codes; with rotation those of the padding too.
        key: Shared key of the seed.
        noise_key: Noise key of the seed.
    """
    start = tl.program_id(0).to(tl.int64) * COVER
    if COVER == TILE and start + TILE <= num:
        _encode_part(
            x_ptr, residual_ptr, data_ptr, scales_at, start, num, num_codes, key, noise_key,
            C, BF16, FEEDBACK, COVER, TILE, True,
        )  # fmt: skip
    else:
        _encode_part(
            x_ptr, residual_ptr, data_ptr, scales_at, start, num, num_codes, key, noise_key,
            C, BF16, FEEDBACK, COVER, TILE, False,
        )  # fmt: skip


@triton.jit
def _decode_part(
    data_ptr,
    scales_at,
    out_ptr,
    weight,
    start,
    num,
    num_codes,
    key,
    C: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
):
    place = start + tl.arange(0, TILE)
    values = _decode_tile(data_ptr, scales_at, start, num_codes, key, C, TILE, FULL)
    if ADD:
        values = load_float(out_ptr + place, place < num, False, not FULL) + weight * values
    if FULL:
        tl.store(out_ptr + place, values)
    else:
        tl.store(out_ptr + place, values, mask=place < num)


@triton.jit(do_not_specialize=["scales_at", "weight", "num", "num_codes", "key"])
def decode_kernel(
    data_ptr,
    scales_at,
    out_ptr,
    weight,
    num,
    num_codes,
    key,
    C: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Decode into ``out``, or add ``weight`` times the decoded values; see `encode_kernel`."""
    start = tl.program_id(0).to(tl.int64) * TILE
    if start + TILE <= num:
        _decode_part(data_ptr, scales_at, out_ptr, weight, start, num, num_codes, key, C, ADD, TILE, True)
    else:
        _decode_part(data_ptr, scales_at, out_ptr, weight, start, num, num_codes, key, C, ADD, TILE, False)


@triton.jit
def _sum_tile(
    table_ptr, num_payloads, scales_in, start, codes_in, IN: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr
):
    """Return the weighted sum of a tile of all payloads, in order, from zero."""
    total = tl.zeros((TILE,), tl.float32)
    payload = 0
    while payload < num_payloads:  # Triton 3.4 with a recent numpy cannot interpret `range` of a tensor
        data_ptr = tl.load(table_ptr + payload).to(tl.pointer_type(tl.uint8))
        weight = tl.load(table_ptr + num_payloads + payload).to(tl.int32).to(tl.float32, bitcast=True)
        key = tl.load(table_ptr + 2 * num_payloads + payload).to(tl.int32)
        total += weight * _decode_tile(data_ptr, scales_in, start, codes_in, key, IN, TILE, FULL)
        payload += 1
    return total


@triton.jit(
    do_not_specialize=["num_payloads", "scales_in", "scales_at", "num", "codes_in", "num_codes", "key", "noise_key"]
)
def reduce_kernel(
    table_ptr,
    num_payloads,
    scales_in,
    codes_in,
    residual_ptr,
    data_ptr,
    scales_at,
    num,
    num_codes,
    key,
    noise_key,
    IN: tl.constexpr,
    C: tl.constexpr,
    FEEDBACK: tl.constexpr,
    COVER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Decode, weight and sum payloads, then encode; see `encode_kernel`.

    Args:
        table_ptr: Addresses of the payloads, bits of their float32 weights, their shared keys: int64 (3, payloads).
        num_payloads: Number of payloads.
        scales_in: Offset of the scales in these payloads, in bytes.
        codes_in: Number of codes of each of these payloads.
    """
    start = tl.program_id(0).to(tl.int64) * COVER
    if COVER == TILE and start + TILE <= num:
        total = _sum_tile(table_ptr, num_payloads, scales_in, start, codes_in, IN, TILE, True)
        _encode_total(
            total, residual_ptr, data_ptr, scales_at, start, num, num_codes, key, noise_key,
            C, FEEDBACK, COVER, TILE, True,
        )  # fmt: skip
    else:
        local = tl.arange(0, TILE)
        total = _sum_tile(table_ptr, num_payloads, scales_in, start, codes_in, IN, TILE, False)
        total = tl.where((start + local < num) & (local < COVER), total, 0.0)
        _encode_total(
            total, residual_ptr, data_ptr, scales_at, start, num, num_codes, key, noise_key,
            C, FEEDBACK, COVER, TILE, False,
        )  # fmt: skip
