"""The task: images, network, training, test. Nothing here knows Flower or federation."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from fedq.data import Dataset, Split, batches, load_dataset, normalize
from fedq.errors import FieldError
from fedq.federated.partition import partition
from fedq.models import build_model


@lru_cache(maxsize=1)
def load(data_dir: str, train_examples: int, seed: int) -> Dataset:
    """Load MNIST from a folder, or the digits that come with scikit-learn if it is not there."""
    options = {"train_examples": train_examples or None, "val_fraction": 0.0, "seed": seed}
    try:
        return load_dataset("mnist", data_dir=Path(data_dir), **options)
    except FieldError as error:
        if error.field != "dataset":
            raise
        return load_dataset("digits", data_dir=Path(data_dir), **options)


def share_of(data: Dataset, number: int, num_clients: int, seed: int) -> Split:
    """Return a client's images: every image belongs to exactly one client."""
    indices = partition(data.train.labels, num_clients, "iid", seed=seed)[number]
    return Split(data.train.images[indices], data.train.labels[indices])


def network(data: Dataset, seed: int) -> nn.Module:
    """Return the network with its first weights."""
    torch.manual_seed(seed)
    _, channels, size, _ = data.train.images.shape
    return build_model("improved_cnn", num_classes=data.num_classes, in_channels=channels, image_size=size)


def train(
    model: nn.Module,
    data: Dataset,
    share: Split,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    seed: int,
) -> float:
    """Train in place; return the mean loss."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    model.train()
    total, num = 0.0, 0
    for _ in range(epochs):
        for picked in batches(len(share), batch_size, generator=generator):
            x, y = normalize(share.images[picked], data.mean, data.std), share.labels[picked]
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, num = total + float(loss.detach()) * len(y), num + len(y)
    return total / max(1, num)


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, split: Split) -> float:
    """Return the share of images that the model has right."""
    model.eval()
    right = 0
    for picked in batches(len(split), 250):
        x = normalize(split.images[picked], data.mean, data.std)
        right += int((model(x).argmax(1) == split.labels[picked]).sum())
    return right / len(split)
