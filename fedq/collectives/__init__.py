"""What moves between ranks: messages to and from rank 0, and the compressed mean of tensors that all ranks hold."""

from fedq.collectives.mean import MeanExchange, Residuals, Sent, compressed_mean
from fedq.collectives.segments import Segment, assign_owners, choose_schedule, cut
from fedq.collectives.transport import Moved, Transport

__all__ = [
    "MeanExchange",
    "Moved",
    "Residuals",
    "Segment",
    "Sent",
    "Transport",
    "assign_owners",
    "choose_schedule",
    "compressed_mean",
    "cut",
]
