"""fedq: federated and data-parallel PyTorch training that sends packed few-bit updates and counts every byte."""

from fedq.codecs import Codec, Payload, codec
from fedq.errors import FieldError

__version__ = "0.1.0"
__all__ = ["Codec", "FieldError", "Payload", "__version__", "codec"]
