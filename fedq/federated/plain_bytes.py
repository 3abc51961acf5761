"""Plain values as buffers that a `Transport` moves between ranks: JSON, which executes nothing when it is read."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor


def to_bytes(value: Any) -> Tensor:
    """Return dictionaries, lists, strings and numbers as a uint8 buffer."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_bytes(buffer: Tensor) -> Any:
    """Return what `to_bytes` was given; keys have become strings."""
    return json.loads(buffer.cpu().numpy().tobytes())
