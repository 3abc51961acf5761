"""The federated task that every system of a comparison trains, read from files, and what each system reports.

`federated_task.py` writes the files. This module runs in a rival's own environment too, so it needs torch, numpy and
fedq's networks alone (fedq's source on PYTHONPATH): images, shares, first weights and network are the same for all.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedq.models import build_model


@dataclass(frozen=True)
class Task:
    """FedAvg of small clients on images that are normalised and not augmented.

    Args:
        folder: Where its files are; the images, which several tasks share, are in `images` beside it.
        model: Name of the network.
        num_rounds: Rounds.
        cohorts: Clients of each round.
        seeds: Of the order of each cohort's images, in the same shape.
        lr: Learning rate of plain SGD.
        batch_size: Images a step, for one epoch.
        mean: Channel means of pixels in 0..1.
        std: Channel standard deviations.
    """

    folder: Path
    model: str
    num_rounds: int
    cohorts: list[list[int]]
    seeds: list[list[int]]
    lr: float
    batch_size: int
    mean: list[float]
    std: list[float]

    @classmethod
    def load(cls, folder: Path) -> Task:
        return cls(folder=folder, **json.loads((folder / "task.json").read_text()))

    @cached_property
    def images(self) -> Tensor:
        """Training images, uint8 (N, 3, 32, 32)."""
        return self._array("train_images")

    @cached_property
    def labels(self) -> Tensor:
        """Their labels, int64 (N,)."""
        return self._array("train_labels")

    @cached_property
    def shares(self) -> list[Tensor]:
        """Each client's images, as int64 indices."""
        with np.load(self.folder / "shares.npz") as arrays:
            return [torch.from_numpy(arrays[str(client)]) for client in range(len(arrays))]

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (1 / (255 * std)).float(), (-mean / std).float()

    def _array(self, name: str) -> Tensor:
        return torch.from_numpy(np.load(self.folder.parent / "images" / f"{name}.npy"))

    def build(self, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
        """Return the network with the weights that every system starts from."""
        model = build_model(self.model)
        model.load_state_dict(torch.load(self.folder / f"{self.model}.pt", weights_only=True))
        return model.to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]

    def normalize(self, images: Tensor) -> Tensor:
        """Return (images / 255 - mean) / std in float32."""
        scale, shift = self._affine
        return (images * scale).add_(shift)

    def client(self, number: int) -> tuple[Tensor, Tensor]:
        """Return a client's normalised images, float32 (n, 3, 32, 32), and labels."""
        share = self.shares[number]
        return self.normalize(self.images[share]), self.labels[share]

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of the test set that a network has right."""
        images, labels = self._array("test_images"), self._array("test_labels")
        model.eval()
        with torch.no_grad():
            right = [
                (model(self.normalize(x)).argmax(1) == y).sum()
                for x, y in zip(images.split(250), labels.split(250), strict=True)
            ]
        return int(torch.stack(right).sum()) / len(labels)


@dataclass
class Report:
    """What a system's process tells the benchmark, in one JSON file."""

    path: Path
    ends: list[float] = field(default_factory=list)
    """When each round was finished, in seconds since the epoch."""

    def round_done(self) -> None:
        self.ends.append(time.time())

    def write(self, **facts: Any) -> None:
        self.path.write_text(json.dumps({"ends": self.ends, **facts}))


def arguments() -> argparse.Namespace:
    """Read what the benchmark asks of a system's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, default=1, help="actors, where the system starts its own")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    args.rank = int(os.environ.get("RANK", "0"))
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    return args
