"""CRC32C in C++."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from fedq.kernels.cpu.library import call


def crc32c(data: npt.NDArray[np.uint8], value: int = 0) -> int:
    """Return the checksum of flat bytes that follow bytes whose checksum is ``value``."""
    return call("crc32c", ctypes.c_void_p(data.ctypes.data), data.size, value)
