"""Plain-torch primitives: hashing, sums, rotation, bfloat16, bit packing and sorted indices.

Four rules make the bytes the same on every device and in every implementation: sums inside a group run as a halving
tree, products are never fused into sums, the Hadamard butterflies run from the smallest stride to the largest, and
randomness is a 32-bit hash of (seed, element index). No plan lives here.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fedq.errors import FieldError
from fedq.kernels.plan import ROTATION, elias_fano_low_bits

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_NOISE = 0x85EBCA6B
LARGEST = (2.0 - 2.0**-23) * 2.0**127
"""The largest float32 number."""
LARGEST_BF16 = (2.0 - 2.0**-7) * 2.0**127
"""The largest bfloat16 number."""
_SMALLEST = 2.0**-126
"""Smallest normal float32 number; scales below it count as zero: their reciprocal would overflow."""
_WIDE = 1 << 16
"""Number of codes of more than 8 bits that are unpacked at a time: a multiple of 8, so that they begin with a byte."""


# ---- seeds and counter-based randomness ------------------------------------------------------------------------


def mix32(x: Tensor) -> Tensor:
    """Mix 32-bit words held in int64 (the "lowbias32" finaliser, C. Wellons 2018).

    ``x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16``, all modulo 2^32.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def hash_int(x: int) -> int:
    """Mix one 32-bit word: `mix32` for a Python integer."""
    x &= _MASK
    x ^= x >> 16
    x = (x * 0x7FEB352D) & _MASK
    x ^= x >> 15
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def derive_seed(*parts: int | str) -> int:
    """Return a 32-bit word that depends on every part (first 4 bytes of BLAKE2b over their text)."""
    text = "/".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def span_seed(seed: int, index: int) -> int:
    """Return the seed of the ``index``-th span of a message.

    A seed is 64 bits: the low word is shared by all clients of a round (rotation, rand-k), the high word is the
    client's own (rounding noise). Both words are advanced separately, so what is shared stays shared.
    """
    low, high = seed & _MASK, (seed >> 32) & _MASK
    return hash_int(low + (index + 1) * _GOLDEN) | hash_int(high + (index + 1) * _NOISE) << 32


def message_seed(seed: int, index: int) -> int:
    """Return the message's seed whose ``index``-th span has a seed: undo `span_seed`."""
    low, high = _unhash_int(seed & _MASK), _unhash_int((seed >> 32) & _MASK)
    return (low - (index + 1) * _GOLDEN) & _MASK | ((high - (index + 1) * _NOISE) & _MASK) << 32


def _unhash_int(x: int) -> int:
    """Undo `hash_int`: products by inverses modulo 2^32, and shifts that are applied until nothing is left."""
    x ^= x >> 16
    x = (x * pow(0x846CA68B, -1, 1 << 32)) & _MASK
    x ^= (x >> 15) ^ (x >> 30)
    x = (x * pow(0x7FEB352D, -1, 1 << 32)) & _MASK
    return x ^ (x >> 16)


def shared_key(seed: int) -> int:
    """Return the hash key for what all clients of a round share."""
    return hash_int((seed & _MASK) + _GOLDEN)


def noise_key(seed: int) -> int:
    """Return the hash key for a client's own rounding noise."""
    return hash_int(shared_key(seed) ^ hash_int((seed >> 32) + _NOISE))


def hash32(counter: Tensor, key: int) -> Tensor:
    """Hash int64 counters: ``mix32(mix32(low ^ key) + high + 0x9E3779B9)`` for ``counter = high·2^32 + low``."""
    return mix32((mix32((counter & _MASK) ^ key) + (counter >> 32) + _GOLDEN) & _MASK)


def uniform(num: int, seed: int, *, start: int = 0, device: torch.device | None = None) -> Tensor:
    """Return float32 noise in [0, 1): the top 24 bits of the hash of elements ``start .. start + num``."""
    counter = torch.arange(start, start + num, dtype=torch.int64, device=device)
    return (hash32(counter, noise_key(seed)) >> 8).to(torch.float32) * 2.0**-24


def signs(num: int, seed: int, *, start: int = 0, device: torch.device | None = None) -> Tensor:
    """Return float32 signs +-1: bit ``i % 32`` of the hash of ``i // 32`` (``start`` and ``num`` multiples of 32)."""
    words = torch.arange(start // 32, (start + num) // 32, dtype=torch.int64, device=device)
    hashed = hash32(words, shared_key(seed))
    lanes = hashed.unsqueeze(1) >> torch.tensor([0, 8, 16, 24], device=device)
    return _sign_table(device)[(lanes & 255).reshape(-1)].reshape(-1)


def _sign_table(device: torch.device | None) -> Tensor:
    """Return the (256, 8) float32 table of signs of a byte's bits, lowest first: bit 0 is +1, bit 1 is -1."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    bits = (byte >> torch.arange(8, device=device)) & 1
    return 1.0 - 2.0 * bits.to(torch.float32)


# ---- groups and sums ---------------------------------------------------------------------------------------------


def _next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def to_groups(x: Tensor, width: int) -> Tensor:
    """Lay a flat tensor out as (groups, power of two >= width), zeros where there is no element."""
    full = _next_power_of_two(width)
    num = -(-x.numel() // width)
    if num * width != x.numel():
        x = torch.nn.functional.pad(x, (0, num * width - x.numel()))
    x = x.reshape(num, width)
    return x if full == width else torch.nn.functional.pad(x, (0, full - width))


def from_groups(groups: Tensor, width: int, numel: int) -> Tensor:
    """Undo `to_groups`."""
    return groups[:, :width].reshape(-1)[:numel]


def tree_sum(groups: Tensor) -> Tensor:
    """Sum the rows of (g, 2^n) as a halving tree: ``x[:n/2] + x[n/2:]``, repeated."""
    while groups.shape[1] > 1:
        half = groups.shape[1] // 2
        groups = groups[:, :half] + groups[:, half:]
    return groups[:, 0]


def absmax(groups: Tensor) -> Tensor:
    """Return the largest magnitude of each row; NaN where the row has one."""
    return groups.abs().amax(dim=1)


def element_mask(groups: Tensor, counts: Tensor) -> Tensor:
    """Return 1 where a group has an element and 0 in its padding, (g, 2^n) or (1, 1) if all groups are full."""
    if bool((counts == groups.shape[1]).all()):
        return groups.new_ones(1, 1)
    return (torch.arange(groups.shape[1], device=groups.device) < counts).to(torch.float32)


# ---- scales ------------------------------------------------------------------------------------------------------


def safe_inverse(scale: Tensor) -> Tensor:
    """Return 1/scale, and 0 where the scale is zero or denormal (NaN stays NaN)."""
    return torch.where(scale < _SMALLEST, torch.zeros_like(scale), 1.0 / scale)


def rounded_scale(scale: Tensor, *, up: bool = False, largest: float = LARGEST_BF16) -> Tensor:
    """Return the scale as bfloat16 in float32, denormal as zero, rounded up if nothing may be clipped.

    A finite scale becomes at most ``largest``, a bfloat16 number.
    """
    rounded = scale.to(torch.bfloat16)
    if up:
        bits = rounded.view(torch.int16)
        rounded = torch.where(rounded.to(torch.float32) < scale, bits + 1, bits).view(torch.bfloat16)
    rounded = rounded.to(torch.float32)
    rounded = torch.where(scale.isfinite(), rounded.clamp(max=largest), rounded)
    return torch.where(rounded < _SMALLEST, torch.zeros_like(rounded), rounded)


# ---- rotation ----------------------------------------------------------------------------------------------------


def _hadamard(x: Tensor) -> Tensor:
    """Multiply rows of (m, w), w a power of two, by the Hadamard matrix: butterflies of stride 1, 2, 4, ..."""
    rows, width = x.shape
    stride = 1
    while stride < width:
        pairs = x.view(rows, width // (2 * stride), 2, stride)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        x = x.view(rows, width)
        stride *= 2
    return x


def rotate(x: Tensor, seed: int, *, start: int = 0) -> Tensor:
    """Flip signs and Hadamard-rotate runs of 256: an orthogonal map that makes values nearly Gaussian.

    Args:
        x: Values, flat float32; padded with zeros to a multiple of 256.
        seed: Seed of the signs; only its shared low word is used.
        start: Index of ``x[0]`` in its parameter, a multiple of 256.

    Returns:
        The rotated values, flat float32 of ``ceil(numel / 256) * 256`` elements.
    """
    rows = to_groups(x, ROTATION)
    flips = signs(rows.numel(), seed, start=start, device=x.device).view_as(rows)
    return (_hadamard(rows * flips) * (1.0 / 16.0)).reshape(-1)


def unrotate(y: Tensor, seed: int, numel: int, *, start: int = 0) -> Tensor:
    """Undo `rotate` and drop the padding."""
    rows = _hadamard(y.view(-1, ROTATION) * (1.0 / 16.0))
    return (rows.reshape(-1) * signs(rows.numel(), seed, start=start, device=y.device))[:numel]


# ---- finite values that stay finite ------------------------------------------------------------------------------


def saturated(values: Tensor, largest: float) -> Tensor:
    """Return the values, finite ones at most as large as ``largest``; NaN and infinity as they are."""
    return torch.where(values.isinf(), values, values.clamp(-largest, largest))


def add_finite(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum; where two finite numbers have none in float32 it is the largest number of its sign."""
    total = x + y
    overflows = total.isinf() & x.isfinite() & y.isfinite()
    return torch.where(overflows, total.clamp(-LARGEST, LARGEST), total)


# ---- bytes -------------------------------------------------------------------------------------------------------


def join_bytes(sections: list[Tensor], out: Tensor | None = None) -> Tensor:
    """Concatenate uint8 sections, into ``out`` if given."""
    if out is None:
        return sections[0] if len(sections) == 1 else torch.cat(sections)
    start = 0
    for section in sections:
        out[start : start + section.numel()] = section
        start += section.numel()
    return out


def bf16_bytes(values: Tensor) -> Tensor:
    """Return bfloat16 values as little-endian bytes: nearest even, finite ones stay finite, every NaN as 0x7FC0."""
    bits = saturated(values, LARGEST_BF16).to(torch.bfloat16).contiguous().view(torch.int16)
    return bits.masked_fill(values.isnan(), 0x7FC0).view(torch.uint8)


def bf16_from_bytes(data: Tensor) -> Tensor:
    """Return the float32 values of bfloat16 bytes."""
    return data.clone().view(torch.bfloat16).to(torch.float32)


def packed_nbytes(num: int, bits: int) -> int:
    """Return the bytes of ``num`` codes of ``bits`` bits: ``ceil(num·bits / 8)``."""
    return (num * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes into bytes, least significant bit first, no padding between codes.

    Args:
        codes: Codes, flat uint8 (bits <= 8) or int64, each in [0, 2^bits).
        bits: Bits of a code, 0 to 40.

    Returns:
        The packed codes, uint8 of ``ceil(numel·bits / 8)`` bytes.
    """
    num = codes.numel()
    if bits == 0 or num == 0:
        return codes.new_empty(0, dtype=torch.uint8)
    if bits == 8:
        return codes.to(torch.uint8)
    if bits > 8:
        wide = (codes.unsqueeze(1) >> torch.arange(bits, device=codes.device)) & 1
        return pack_bits(wide.reshape(-1).to(torch.uint8), 1)
    codes = codes.to(torch.uint8)
    if num % 8:
        codes = torch.nn.functional.pad(codes, (0, 8 - num % 8))
    return _pack_small(codes, bits)[: packed_nbytes(num, bits)]


def _pack_small(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes of 1 to 7 bits; numel is a multiple of 8."""
    if bits == 4:
        pairs = codes.view(-1, 2)
        return pairs[:, 0] | (pairs[:, 1] << 4)
    if bits == 2:
        quads = codes.view(-1, 4)
        return quads[:, 0] | (quads[:, 1] << 2) | (quads[:, 2] << 4) | (quads[:, 3] << 6)
    if bits == 1:
        # Eight 0/1 bytes in one little-endian word; the product moves byte i to bit 56 + i without carries.
        magic = sum(1 << (56 - 7 * i) for i in range(1, 8)) + (1 << 56)
        return ((codes.contiguous().view(torch.int64) * magic) >> 56).to(torch.uint8)
    octets = codes.view(-1, 8).to(torch.int64) << (bits * torch.arange(8, device=codes.device))
    word = octets.sum(dim=1, keepdim=True)
    return (word >> (8 * torch.arange(bits, device=codes.device))).bitwise_and_(255).to(torch.uint8).view(-1)


def unpack_bits(data: Tensor, bits: int, num: int) -> Tensor:
    """Undo `pack_bits`: return ``num`` codes, uint8 for bits <= 8 and int64 above."""
    if bits == 0 or num == 0:
        return data.new_zeros(num, dtype=torch.uint8 if bits <= 8 else torch.int64)
    if bits == 8:
        return data[:num]
    if bits > 8:
        return _unpack_wide(data, bits, num)
    if bits in (1, 2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
        return ((data.unsqueeze(1) >> shifts) & ((1 << bits) - 1)).view(-1)[:num]
    num_words = -(-num // 8)
    data = torch.nn.functional.pad(data, (0, num_words * bits - data.numel())).view(num_words, bits).to(torch.int64)
    words = (data << (8 * torch.arange(bits, device=data.device))).sum(dim=1, keepdim=True)
    codes = (words >> (bits * torch.arange(8, device=data.device))) & ((1 << bits) - 1)
    return codes.to(torch.uint8).view(-1)[:num]


def _unpack_wide(data: Tensor, bits: int, num: int) -> Tensor:
    """Unpack codes of more than 8 bits, some at a time: each takes 8 bytes a bit for a moment."""
    codes = torch.empty(num, dtype=torch.int64, device=data.device)
    places = torch.arange(bits, device=data.device)
    for start in range(0, num, _WIDE):
        size = min(_WIDE, num - start)
        wide = unpack_bits(data[start * bits // 8 :], 1, size * bits).view(size, bits).to(torch.int64)
        codes[start : start + size] = (wide << places).sum(dim=1)
    return codes


def pack_trits(trits: Tensor) -> Tensor:
    """Pack codes 0, 1, 2 five to a byte: ``sum_j t_j·3^j``."""
    num = trits.numel()
    trits = torch.nn.functional.pad(trits.to(torch.uint8), (0, -num % 5)).view(-1, 5)
    packed = trits[:, 0].clone()
    for place, power in enumerate((3, 9, 27, 81), start=1):
        packed += trits[:, place] * power
    return packed


def unpack_trits(data: Tensor, num: int) -> Tensor:
    """Undo `pack_trits`: return ``num`` uint8 codes (a byte over 242 is taken modulo 3 in its last place)."""
    byte = torch.arange(256, device=data.device).unsqueeze(1)
    table = (byte // torch.tensor([1, 3, 9, 27, 81], device=data.device)) % 3
    return table.to(torch.uint8)[data.to(torch.int64)].reshape(-1)[:num]


# ---- sorted indices ----------------------------------------------------------------------------------------------


def elias_fano_encode(indices: Tensor, universe: int) -> Tensor:
    """Code sorted distinct indices (int64) below ``universe`` (Elias 1974, Fano 1971): fixed size, no entropy coder."""
    num = indices.numel()
    if num == 0:
        return indices.new_empty(0, dtype=torch.uint8)
    low = elias_fano_low_bits(num, universe)
    lower = pack_bits(indices & ((1 << low) - 1), low)
    unary = torch.zeros(num + ((universe - 1) >> low), dtype=torch.uint8, device=indices.device)
    unary[(indices >> low) + torch.arange(num, device=indices.device)] = 1
    return torch.cat((lower, pack_bits(unary, 1)))


def elias_fano_decode(data: Tensor, num: int, universe: int) -> Tensor:
    """Undo `elias_fano_encode`: return ``num`` sorted int64 indices.

    Raises:
        FieldError: The bytes do not hold ``num`` indices, or the indices do not rise below ``universe``.
    """
    if num == 0:
        return data.new_empty(0, dtype=torch.int64)
    low = elias_fano_low_bits(num, universe)
    split = packed_nbytes(num, low)
    lower = unpack_bits(data[:split], low, num).to(torch.int64)
    unary = unpack_bits(data[split:], 1, num + ((universe - 1) >> low))
    ones = unary.nonzero().view(-1)
    if ones.numel() != num:
        raise FieldError("elias-fano:indices", ones.numel(), f"{num}")
    indices = (ones - torch.arange(num, device=data.device)) << low | lower
    if not ((indices.diff() > 0).all() and indices[-1] < universe):
        raise out_of_order("elias-fano", universe)
    return indices


def out_of_order(kind: str, universe: int) -> FieldError:
    """Return the error for positions of a payload that do not rise (``blocktopk``: in a block), or lie outside."""
    return FieldError(f"{kind}:indices", "out of order", f"rising, below {universe}")
