"""What the rest of fedq sees of a data set: three splits of whole uint8 tensors. How they got there is not here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images and labels of one split, on one device.

    Args:
        images: Images, uint8 (N, C, H, W); read-only, as a large split is mapped from a file that others share.
        labels: Labels, int64 (N,).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set, split: train on ``train``, choose by ``val``, report ``test``.

    Args:
        name: ``digits``, ``cifar10``, ``mnist``, or the folder's name.
        description: One line for the user: what it is, where it came from, how many images of which shape.
        train: Training split.
        val: Validation split, taken from the training set.
        test: Test split.
        class_names: One name a class.
        mean: Mean of the training split's pixels, scaled to 0..1, a channel.
        std: Standard deviation of the same pixels, a channel; 1 for a constant channel.
        flip: Whether a mirrored image keeps its label: not for digits, letters, or classes without names.
        notes: What else the user must know, a sentence each: that images are resized, cropped, or grey in the files.
    """

    name: str
    description: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Dataset:
        """Return the data set with all of its splits on a device."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))
