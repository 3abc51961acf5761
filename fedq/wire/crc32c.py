"""CRC32C (Castagnoli), the checksum of a message's head and body: RFC 3720, appendix B.4.

Polynomial 0x1EDC6F41, bits reflected, initial value and final exclusive or 0xFFFFFFFF.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedq import kernels


def crc32c(data: bytes | bytearray | memoryview | Tensor, value: int = 0) -> int:
    """Return the checksum of ``data`` after bytes whose checksum is ``value``: ``crc32c(b, crc32c(a))`` of ``a + b``.

    Args:
        data: Contiguous bytes, or a uint8 tensor on the CPU.
        value: Checksum of the bytes so far.
    """
    flat = data.reshape(-1).numpy() if isinstance(data, Tensor) else np.frombuffer(data, np.uint8)
    return kernels.crc32c(flat, value)


def values_crc32c(tensor: Tensor, value: int = 0) -> int:
    """Return the checksum of a tensor's values in row-major order, whatever its type and device.

    A tensor of a class that has no bytes of its own (a quantized weight, say) has that of nothing.

    Args:
        tensor: The tensor, of any shape.
        value: Checksum of the bytes so far.
    """
    if hasattr(tensor, "__tensor_flatten__") or not tensor.numel():
        return value
    return crc32c(tensor.detach().contiguous().reshape(-1).cpu().view(torch.uint8), value)
