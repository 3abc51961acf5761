"""The arithmetic of training: float32, bfloat16 or float16 autocast, and the memory format that suits it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedq.errors import FieldError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """How forward and backward compute.

    Args:
        name: Name of the arithmetic: fp32, bf16 or fp16.
        device_type: Type of the device: cpu or cuda.
        channels_last: Whether images and convolution weights lie channels last.
    """

    name: str
    device_type: str
    channels_last: bool

    def autocast(self) -> torch.autocast:
        """Return the context for the forward pass."""
        return torch.autocast(self.device_type, dtype=_DTYPES[self.name], enabled=self.name != "fp32")

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler, active for fp16 alone."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(name: str, device: torch.device) -> Precision:
    """Resolve ``auto``: bf16 and channels_last where the hardware multiplies bfloat16 fast, otherwise fp32.

    Fast means a CUDA device that supports bfloat16, or a CPU with AVX-512 BF16 or AMX instructions.

    Raises:
        FieldError: The name is unknown.
    """
    if name not in (*_DTYPES, "auto"):
        raise FieldError("precision", name, "auto, fp32, bf16, fp16")
    if name == "auto":
        name = "bf16" if _is_bf16_fast(device) else "fp32"
    return Precision(name, device.type, channels_last=name != "fp32" or device.type == "cpu")


def _is_bf16_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)
