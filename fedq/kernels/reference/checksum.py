"""CRC32C in numpy: many lanes of 64 bytes side by side, joined pairwise by shifts in GF(2).

The checksum is the remainder of a polynomial over GF(2) by 0x1EDC6F41, bits reflected: in a word, bit 31 is the
coefficient of x^0. Appending a zero byte multiplies by x^8, so the remainder of two runs of bytes put together is
``left · x^(8 · bytes of the right) + right`` (the idea of zlib's `crc32_combine`).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

_POLYNOMIAL = 0x82F63B78
_ONE = 1 << 31
_BYTE = 1 << 23  # x^8
_MASK = 0xFFFFFFFF
_LANE = 64
"""Number of bytes of a lane."""
_LANES = 1 << 14
"""Most lanes of a pass, a power of two: 1 MiB, which stays in cache."""

Words = npt.NDArray[np.uint32]


def crc32c(data: npt.NDArray[np.uint8], value: int = 0) -> int:
    """Return the checksum of flat bytes that follow bytes whose checksum is ``value``."""
    state = value ^ _MASK
    for start in range(0, data.size, _LANE * _LANES):
        piece = data[start : start + _LANE * _LANES]
        state = _times(state, _power(piece.size)) ^ _remainder(piece)
    return state ^ _MASK


def _remainder(data: npt.NDArray[np.uint8]) -> int:
    """Return the plain remainder of at least one byte."""
    num_lanes = 1 << (-(-data.size // _LANE) - 1).bit_length()
    # Zeros in front change nothing.
    padded = np.zeros(num_lanes * _LANE, np.uint8)
    padded[padded.size - data.size :] = data
    words = np.ascontiguousarray(padded.view("<u2").reshape(num_lanes, -1).T)
    table, lanes = _pair_table(), np.zeros(num_lanes, np.uint32)
    for word in words:
        lanes = lanes >> 16 ^ table[(lanes ^ word) & 0xFFFF]
    nbytes = _LANE
    while lanes.size > 1:
        lanes = _shifted(lanes[0::2], nbytes) ^ lanes[1::2]
        nbytes *= 2
    return int(lanes[0])


def _shifted(words: Words, nbytes: int) -> Words:
    """Return the remainders after ``nbytes`` more zero bytes."""
    table = _shift_table(nbytes)
    shifted: Words = table[0][words & 255]
    for place in (1, 2, 3):
        shifted = shifted ^ table[place][words >> 8 * place & 255]
    return shifted


@cache
def _pair_table() -> Words:
    """Return the remainder after two bytes of each of the 65,536 lowest halves of a state."""
    table = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        table = table >> 1 ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


@cache
def _shift_table(nbytes: int) -> Words:
    """Return what each byte of a state, (4, 256), becomes after ``nbytes`` zero bytes; asked for powers of two only."""
    power = _power(nbytes)
    return np.array([[_times(byte << 8 * place, power) for byte in range(256)] for place in range(4)], np.uint32)


def _power(nbytes: int) -> int:
    """Return x^(8·nbytes)."""
    result = _ONE
    for place in range(nbytes.bit_length()):
        if nbytes >> place & 1:
            result = _times(result, _square(place))
    return result


@cache
def _square(place: int) -> int:
    """Return x^(8·2^place)."""
    return _times(_square(place - 1), _square(place - 1)) if place else _BYTE


def _times(a: int, b: int) -> int:
    """Return the product of two remainders."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & _MASK
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
