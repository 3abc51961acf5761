"""fedq: federated and data-parallel PyTorch training that sends packed few-bit updates and counts every byte."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from fedq.codecs import Codec, Payload, codec, codec_names
from fedq.codecs import register as register_codec
from fedq.errors import FieldError
from fedq.feedback import ErrorFeedback, NoFeedback, ResidualStore
from fedq.layout import Layout
from fedq.ledger import Ledger
from fedq.metrics import Metric
from fedq.wire import Frame, decode

if TYPE_CHECKING:
    from fedq.federated.client import Client
    from fedq.federated.federation import Federation
    from fedq.federated.parts import Part
    from fedq.federated.results import RoundResult, Summary

__version__ = "0.1.0"
__all__ = [
    "Client",
    "Codec",
    "ErrorFeedback",
    "Federation",
    "FieldError",
    "Frame",
    "Layout",
    "Ledger",
    "Metric",
    "NoFeedback",
    "Part",
    "Payload",
    "ResidualStore",
    "RoundResult",
    "Summary",
    "__version__",
    "codec",
    "codec_names",
    "decode",
    "register_codec",
]
_LATE = {
    "Client": "federated.client",
    "Federation": "federated.federation",
    "Part": "federated.parts",
    "RoundResult": "federated.results",
    "Summary": "federated.results",
    "hooks": "hooks",
    "network": "network",
}
"""Names that are imported only when asked for, with their module: codecs and hooks alone do not wait for rounds."""


def __getattr__(name: str) -> Any:
    if name == "register":
        warnings.warn("fedq.register is now fedq.register_codec", DeprecationWarning, stacklevel=2)
        return register_codec
    if name not in _LATE:
        raise AttributeError(f"module 'fedq' has no attribute {name!r}")
    module = importlib.import_module(f"fedq.{_LATE[name]}")
    return module if _LATE[name] == name else getattr(module, name)
