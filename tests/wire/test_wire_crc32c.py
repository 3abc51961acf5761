"""CRC32C: the vectors of RFC 3720, and every implementation against a bit at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from wire_reader import crc32c as bit_by_bit

from fedq import kernels
from fedq.kernels import cpu
from fedq.kernels.cpu.library import usable_isas
from fedq.wire import crc32c

READ_10 = "14000000" + "00000400" + "00000014" + "00000018" + "28000000" + "00" * 4 + "02" + "00" * 7
RFC_3720 = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (bytes.fromhex("01c00000" + "00" * 12 + READ_10), 0xD9963A56),
    (b"123456789", 0xE3069283),
    (b"", 0),
]
IMPLEMENTATIONS = ["reference", *usable_isas()]
BYTES = np.random.default_rng(0).integers(0, 256, 2_200_000, dtype=np.uint8)


def compute(implementation: str, data: np.ndarray, value: int = 0) -> int:
    if implementation == "reference":
        return kernels.reference.crc32c(data, value)
    before = cpu.isa()
    cpu.select_isa(implementation)
    try:
        return cpu.crc32c(data, value)
    finally:
        cpu.select_isa(before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("data", "expected"), RFC_3720)
def test_known_values(implementation: str, data: bytes, expected: int) -> None:
    assert compute(implementation, np.frombuffer(data, np.uint8)) == expected
    assert crc32c(data) == bit_by_bit(data) == expected


@given(st.integers(0, 9), st.integers(0, 700), st.integers(0, 2**32 - 1))
@tried(30)
def test_small_sizes_and_starts(start: int, size: int, value: int) -> None:
    data = BYTES[start : start + size]
    found = {compute(name, data, value) for name in IMPLEMENTATIONS}
    assert len(found) == 1
    assert {compute(name, data) for name in IMPLEMENTATIONS} == {bit_by_bit(data.tobytes())}


@pytest.mark.parametrize("size", [12287, 12288, 12289, 24577, 65535, 100_003, (1 << 20) - 1, (1 << 20) + 1, 2_199_990])
def test_large_sizes(size: int) -> None:
    """Streams of 4 KiB side by side, lanes of 64 bytes in pieces of 1 MiB: around their edges."""
    found = {compute(name, BYTES[7 : 7 + size], 5) for name in IMPLEMENTATIONS}
    assert len(found) == 1
    first = size // 3
    assert crc32c(BYTES[7 + first : 7 + size].data, crc32c(BYTES[7 : 7 + first].data, 5)) in found


def test_what_it_takes() -> None:
    data = b"123456789"
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    for given_data in (data, bytearray(data), memoryview(data), tensor, tensor.view(3, 3)):
        assert crc32c(given_data) == 0xE3069283
    assert crc32c(tensor[:0]) == 0
