"""Evaluation in eval mode, its batches dealt over the ranks; the sums do not depend on how many there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedq.collectives import Moved, Transport
from fedq.data import Split, batches, normalize
from fedq.engines.precision import Precision
from fedq.lowbit import deployed


@dataclass(frozen=True)
class Evaluator:
    """How a model is evaluated.

    Args:
        mean: Channel means of pixels in 0..1.
        std: Channel standard deviations.
        precision: Arithmetic of the forward pass.
        transport: Where the batches are shared out; None: all of them run here.
        batch_size: Images a batch; part of the result's last digits, so fixed.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: Precision
    transport: Transport | None = None
    batch_size: int = 250

    def run(self, model: nn.Module, split: Split) -> tuple[float, float, Moved]:
        """Return mean loss and accuracy over the whole split (0, 0 if it is empty), and the bytes that crossed.

        Every rank must call it and every rank gets the same numbers: a batch's sums are computed on one rank and
        added up in batch order.
        """
        index_batches = list(batches(len(split), self.batch_size))
        rank, world_size = (self.transport.rank, self.transport.world_size) if self.transport else (0, 1)
        sums = torch.zeros(len(index_batches), 2, dtype=torch.float64, device=next(model.parameters()).device)
        with torch.no_grad(), deployed(model):
            for i in range(rank, len(index_batches), world_size):
                sums[i] = self._batch(model, split, index_batches[i].to(split.images.device), sums.device)
        moved = Moved()
        if self.transport:
            gathered, moved = self.transport.all_gather(sums)
            sums = gathered.sum(dim=0)
        loss, correct = sums.sum(dim=0).tolist()
        return loss / max(1, len(split)), correct / max(1, len(split)), moved

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return a model's float32 logits of uint8 images on its device."""
        x = normalize(images, self.mean, self.std, channels_last=self.precision.channels_last)
        with self.precision.autocast():
            logits: Tensor = model(x).float()
        return logits

    def _batch(self, model: nn.Module, split: Split, indices: Tensor, device: torch.device) -> Tensor:
        images, y = split.images[indices].to(device), split.labels[indices].to(device)
        return batch_sums(self.logits(model, images), y)


def batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropy over a batch, and how many are classified correctly, float64 [2]."""
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack((loss, (logits.argmax(1) == labels).sum())).to(torch.float64)
