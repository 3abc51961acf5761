"""The network benchmark's task for those that are not fedq: images, shares, first weights and local training.

`network_runs.py` writes the files, with what fedq's own job makes of the same settings. As `task.py`, this needs torch,
numpy and fedq's networks alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from task import Task
from torch import Tensor, nn
from torch.nn import functional

from fedq.models import build_model


@dataclass(frozen=True)
class NetworkTask(Task):
    """A `Task` with momentum, weight decay, a learning rate for each round, and validation images.

    Args:
        image_size: Side of the images.
        lrs: Learning rate of each round.
        momentum: Of the local SGD, which starts anew each round.
        weight_decay: Of the local SGD.
        target: Accuracy on the validation images at which training ends.
    """

    image_size: int = 28
    lrs: tuple[float, ...] = ()
    momentum: float = 0.0
    weight_decay: float = 0.0
    target: float = 1.0

    @classmethod
    def load(cls, folder: Path) -> NetworkTask:
        return cls(folder=folder, **json.loads((folder / "task.json").read_text()))

    @cached_property
    def val(self) -> tuple[Tensor, Tensor]:
        """Validation images, normalised, and their labels."""
        return self.normalize(self._array("val_images")), self._array("val_labels")

    def build(self, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
        model = build_model(self.model, image_size=self.image_size)
        model.load_state_dict(torch.load(self.folder / f"{self.model}.pt", weights_only=True))
        return model.to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]

    def train(self, model: nn.Module, number: int, round: int) -> int:
        """Train one epoch on a client's images in a random order; return how many they are."""
        x, y = self.client(number)
        self._step_through(model, x, y, torch.randperm(len(y)), self.lrs[round])
        return len(y)

    def warm_up(self, model: nn.Module, number: int) -> None:
        """Take a step that does not count: with the first one torch imports for two seconds."""
        x, y = self.client(number)
        self._step_through(model, x, y, torch.arange(min(len(y), self.batch_size)), 0.0)

    def _step_through(self, model: nn.Module, x: Tensor, y: Tensor, order: Tensor, lr: float) -> None:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)
        for picked in order.split(self.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[picked]), y[picked]).backward()
            optimizer.step()

    @torch.no_grad()
    def val_accuracy(self, model: nn.Module) -> float:
        """Return the share of the validation images that a network has right, in evaluation mode."""
        model.eval()
        images, labels = self.val
        right = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(250), labels.split(250), strict=True)]
        return int(torch.stack(right).sum()) / len(labels)
