"""What the Triton kernels are built of: hash, halving trees, rotation, rounding, packing.

The rules that make the bytes those of `fedq.kernels.reference`:

- Sums inside a block run as its halving tree. Every step adds over an axis of two elements (``a + b`` has one order
  only), so nothing depends on how Triton orders a longer `tl.sum`.
- Launches set ``enable_fp_fusion=False``; divisions are `divide`, rounding down is `floor`: nothing that compiles to a
  flush-to-zero (``.ftz``) instruction is used, so denormals stay.
- Largest magnitudes are maxima of bit patterns, where a NaN is above infinity, and so survives.
- Functions of bfloat16 work on bit patterns: the interpreter's own conversion is another one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix32(x):
    """Mix 32-bit words (uint32): "lowbias32"."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def hash32(counter, key):
    """Hash int64 counters with a key (int32 that holds the bits of a uint32) to uint32."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    return mix32(mix32(low ^ key.to(tl.uint32, bitcast=True)) + high + 0x9E3779B9)


@triton.jit
def uniform(counter, key):
    """Return float32 noise in [0, 1): the top 24 bits of the hash."""
    return (hash32(counter, key) >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@triton.jit
def float_bits(x):
    """Return the bits of float32 values as uint32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """Return the bits of magnitudes as int32: they order like the values, NaN above infinity (0x7F800000)."""
    return (float_bits(x) & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def bits_float(bits):
    """Return the float32 values of uint32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(x):
    """Return bfloat16 values as uint32 below 2^16: nearest even, finite ones stay finite, every NaN as 0x7FC0."""
    bits = float_bits(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    overflows = ((rounded & 0x7FFF) == 0x7F80) & ((bits & 0x7FFFFFFF) != 0x7F800000)
    return tl.where(x != x, 0x7FC0, tl.where(overflows, rounded - 1, rounded)).to(tl.uint32)


@triton.jit
def largest_of_sign(x):
    """Return the largest float32 number with the sign of each value."""
    return bits_float((float_bits(x) & 0x80000000) | 0x7F7FFFFF)


@triton.jit
def add_finite(x, y):
    """Return the sum; where two finite numbers have none in float32 it is the largest number of its sign."""
    total = x + y
    overflows = (magnitude_bits(total) == 0x7F800000) & (magnitude_bits(x) < 0x7F800000)
    return tl.where(overflows & (magnitude_bits(y) < 0x7F800000), largest_of_sign(total), total)


@triton.jit
def bf16_float(bits):
    """Return the float32 values of bfloat16 bits (uint32 below 2^16)."""
    return bits_float(bits << 16)


@triton.jit
def divide(x, y):
    """Return the IEEE quotient of float32 values; y is a tensor like x, or a positive number.

    By way of float64, which rounds to the same float32 and keeps denormals in every version: Triton 3.4 compiles
    `tl.div_rn` to a flush-to-zero instruction. There is one a block, not one an element.
    """
    y = y + tl.zeros(x.shape, tl.float32)
    return (x.to(tl.float64) / y.to(tl.float64)).to(tl.float32)


@triton.jit
def safe_inverse(scale):
    """Return 1/scale, and 0 where the scale is zero or denormal (NaN stays NaN)."""
    return tl.where(scale < 2.0**-126, 0.0, divide(tl.full(scale.shape, 1.0, tl.float32), scale))


@triton.jit
def clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Clamp values; NaN stays."""
    x = tl.where(x < LOW, LOW * 1.0, x)
    return tl.where(x > HIGH, HIGH * 1.0, x)


@triton.jit
def whole(x):
    """Round values within 2^22 to whole numbers, half to even; NaN stays."""
    return (x + 12582912.0) - 12582912.0  # 1.5·2^23, beyond which float32 has whole numbers only


@triton.jit
def floor(x):
    """Round values within 2^22 down; NaN stays. (`tl.floor` flushes denormals, and the floor of -1e-40 is -1.)"""
    nearest = whole(x)
    return tl.where(nearest > x, nearest - 1.0, nearest)


@triton.jit
def scale_bits(scale, UP: tl.constexpr, largest):
    """Round scales to bfloat16 bits, denormal ones to zero, and up if nothing may be clipped.

    Finite ones have at most the bits ``largest``.
    """
    bits = bf16_bits(scale)
    if UP:
        bits = tl.where(bf16_float(bits) < scale, bits + 1, bits)
    bits = tl.where((bits > largest) & (magnitude_bits(scale) < 0x7F800000), largest, bits).to(tl.uint32)
    return tl.where(bf16_float(bits) < 2.0**-126, 0, bits).to(tl.uint32)


@triton.jit
def tree_sum(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, LOG_WIDTH: tl.constexpr):
    """Sum the rows of (ROWS, WIDTH) as a halving tree; return (ROWS, 1)."""
    for step in tl.static_range(LOG_WIDTH):
        x = tl.sum(tl.reshape(x, (ROWS, 2, WIDTH >> (step + 1))), axis=1)
    return x


@triton.jit
def absmax(x):
    """Return the largest magnitude of each row as (rows, 1); NaN where the row has one."""
    return tl.max(magnitude_bits(x), axis=1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def hadamard(x, SIZE: tl.constexpr):
    """Multiply runs of 256 of a flat tensor by the Hadamard matrix: butterflies of stride 1, 2, 4, ..."""
    for step in tl.static_range(8):
        # The sum of a pair's bits less the own bits is the partner: one shuffle, and no arithmetic on the value.
        bits = tl.reshape(x.to(tl.int32, bitcast=True), (SIZE >> (step + 1), 2, 1 << step))
        partner = tl.sum(bits, axis=1, keep_dims=True) - bits
        # first + second, and first - second as (-second) + first (in Triton 3.4 ``-x`` is 0 - x)
        own = bits ^ (tl.arange(0, 2) << 31)[None, :, None]
        x = tl.reshape(own.to(tl.float32, bitcast=True) + partner.to(tl.float32, bitcast=True), (SIZE,))
    return x


@triton.jit
def flips(start, key, SIZE: tl.constexpr):
    """Return where the signs of elements ``start ...`` (a multiple of 32) are -1, as 0 or 1."""
    words = hash32(start // 32 + tl.arange(0, SIZE // 32), key)
    return tl.reshape((words[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1, (SIZE,))


@triton.jit
def rotate(x, flip, SIZE: tl.constexpr):
    """Flip signs and rotate runs of 256."""
    return hadamard(bits_float(float_bits(x) ^ (flip << 31)), SIZE) * 0.0625


@triton.jit
def unrotate(y, flip, SIZE: tl.constexpr):
    """Undo `rotate`."""
    return bits_float(float_bits(hadamard(y * 0.0625, SIZE)) ^ (flip << 31))


@triton.jit
def load_float(pointer, mask, BF16: tl.constexpr, MASKED: tl.constexpr):
    """Load values as float32, zero outside the mask; bfloat16 comes as int16."""
    if MASKED:  # noqa: SIM108 (a constant branch)
        x = tl.load(pointer, mask=mask, other=0)
    else:
        x = tl.load(pointer)
    if BF16:
        x = bf16_float(x.to(tl.uint16, bitcast=True).to(tl.uint32))
    return x.to(tl.float32)


@triton.jit
def store_bytes(pointer, offset, bits, mask, NUM_BYTES: tl.constexpr):
    """Store uint32 words little-endian, byte by byte: no alignment is asked of the pointer."""
    for byte in tl.static_range(NUM_BYTES):
        tl.store(pointer + offset + byte, ((bits >> (8 * byte)) & 255).to(tl.uint8), mask=mask)


@triton.jit
def load_bytes(pointer, offset, mask, NUM_BYTES: tl.constexpr):
    """Load little-endian words of 1 to 4 bytes as uint32, zero outside the mask."""
    bits = tl.load(pointer + offset, mask=mask, other=0).to(tl.uint32)
    for byte in tl.static_range(1, NUM_BYTES):
        bits |= tl.load(pointer + offset + byte, mask=mask, other=0).to(tl.uint32) << (8 * byte)
    return bits


@triton.jit
def load_code(pointer, index, num_bytes, mask, BITS: tl.constexpr):
    """Load single codes of 1 to 20 bits from a packed array of ``num_bytes`` bytes; return uint32."""
    bit = index * BITS
    first = bit >> 3
    word = tl.load(pointer + first, mask=mask, other=0).to(tl.uint32)
    for byte in tl.static_range(1, (BITS + 14) // 8):
        inside = mask & (first + byte < num_bytes)
        word |= tl.load(pointer + first + byte, mask=inside, other=0).to(tl.uint32) << (8 * byte)
    return (word >> (bit & 7).to(tl.uint32)) & ((1 << BITS) - 1)
