"""Data sets as whole uint8 tensors: found, decoded once, split, and batched on the device.

Imports nothing of fedq but `fedq.errors`; who trains on what is `fedq.federated.partition`.
"""

from fedq.data.batch import augment, batches, crop_and_flip, draw_crops, normalize
from fedq.data.dataset import Dataset, Split
from fedq.data.find import NAMED
from fedq.data.load import load_dataset
from fedq.data.source import DataError

__all__ = [
    "NAMED",
    "DataError",
    "Dataset",
    "Split",
    "augment",
    "batches",
    "crop_and_flip",
    "draw_crops",
    "load_dataset",
    "normalize",
]
