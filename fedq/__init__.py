"""fedq: federated and data-parallel PyTorch training that sends packed few-bit updates and counts every byte."""

from fedq.codecs import Codec, Payload, codec, codec_names, register
from fedq.errors import FieldError
from fedq.feedback import ErrorFeedback, NoFeedback, ResidualStore
from fedq.layout import Layout
from fedq.ledger import Ledger
from fedq.wire import Frame, decode

__version__ = "0.1.0"
__all__ = [
    "Codec",
    "ErrorFeedback",
    "FieldError",
    "Frame",
    "Layout",
    "Ledger",
    "NoFeedback",
    "Payload",
    "ResidualStore",
    "__version__",
    "codec",
    "codec_names",
    "decode",
    "register",
]
