"""Evaluation in eval mode, its batches dealt over the ranks; the sums do not depend on how many there are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedq.collectives import Moved, Transport
from fedq.data import Split, batches, normalize
from fedq.engines.precision import Precision
from fedq.lowbit import deployed


@dataclass(frozen=True)
class Scores:
    """How a model does on a split; all 0 where that is empty.

    Args:
        loss: Mean cross-entropy.
        accuracy: Share of the images that are classified correctly.
        balanced_accuracy: Mean over the split's classes of the share of each class that is classified correctly
            (Brodersen et al. 2010, "The balanced accuracy and its posterior distribution"); NaN where not asked for.
    """

    loss: float
    accuracy: float
    balanced_accuracy: float = math.nan


@dataclass(frozen=True)
class Evaluator:
    """How a model is evaluated.

    Args:
        mean: Channel means of pixels in 0..1.
        std: Channel standard deviations.
        precision: Arithmetic of the forward pass.
        transport: Transport between the ranks that share the batches; None: all of them run here.
        batch_size: Images a batch; fixed, because the result's last digits depend on it.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: Precision
    transport: Transport | None = None
    batch_size: int = 250

    def run(self, model: nn.Module, split: Split, *, num_classes: int = 0) -> tuple[Scores, Moved]:
        """Return a model's scores on the whole split, and the bytes that crossed.

        Every rank must call it and every rank gets the same numbers: a batch's sums are computed on one rank and
        added up in batch order. What is counted by class are whole numbers, which add up in any order.

        Args:
            model: Module that is evaluated.
            split: Images and labels.
            num_classes: Number of classes, needed for the balanced accuracy; 0: that is not asked for.
        """
        index_batches = list(batches(len(split), self.batch_size))
        rank, world_size = (self.transport.rank, self.transport.world_size) if self.transport else (0, 1)
        device = next(model.parameters()).device
        sums = torch.zeros(len(index_batches), 2, dtype=torch.float64, device=device)
        correct = torch.zeros(num_classes, dtype=torch.float64, device=device)
        with torch.no_grad(), deployed(model):
            for i in range(rank, len(index_batches), world_size):
                logits, labels = self._batch(model, split, index_batches[i].to(split.images.device), device)
                sums[i] = batch_sums(logits, labels)
                if num_classes:
                    correct += (labels[logits.argmax(1) == labels]).bincount(minlength=num_classes)
        moved = Moved()
        if self.transport:
            gathered, moved = self.transport.all_gather(torch.cat((sums.flatten(), correct)))
            total = gathered.sum(dim=0)
            sums, correct = total[: sums.numel()].view_as(sums), total[sums.numel() :]
        loss, num_correct = sums.sum(dim=0).tolist()
        num = max(1, len(split))
        balanced = _mean_recall(correct.cpu(), split.labels.cpu()) if num_classes else math.nan
        return Scores(loss / num, num_correct / num, balanced), moved

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return a model's float32 logits of uint8 images on its device."""
        x = normalize(images, self.mean, self.std, channels_last=self.precision.channels_last)
        with self.precision.autocast():
            logits: Tensor = model(x).float()
        return logits

    def _batch(self, model: nn.Module, split: Split, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        images, labels = split.images[indices].to(device), split.labels[indices].to(device)
        return self.logits(model, images), labels


def _mean_recall(correct: Tensor, labels: Tensor) -> float:
    """Return the mean, over the classes among the labels, of the share that is correct of each; 0 without any."""
    present = labels.bincount(minlength=len(correct)).double()
    shares = correct[present > 0] / present[present > 0]
    return float(shares.mean()) if len(shares) else 0.0


def batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropy over a batch, and how many are classified correctly, float64 [2]."""
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack((loss, (logits.argmax(1) == labels).sum())).to(torch.float64)
