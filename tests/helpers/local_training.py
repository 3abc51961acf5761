"""Local training of a small model, for tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fedq.data import Split
from fedq.engines.precision import Precision
from fedq.federated.image_training import LocalTraining
from fedq.layout import Layout

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
FP32 = Precision("fp32", "cpu", channels_last=False)
MOMENTUM, DECAY = 0.9, 5e-4


def small_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(54, 4)
    )


def sgd(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=MOMENTUM, weight_decay=DECAY, fused=True)


def training(split: Split, model: nn.Module | None = None, **changes: object) -> LocalTraining:
    model = model or small_model()
    made = LocalTraining(model, Layout.of(model, "fp32"), split, MEAN, STD, sgd, FP32, batch_size=8, augment=False)
    return replace(made, **changes)


def start_of(local: LocalTraining) -> Tensor:
    return local.layout.flatten(small_model())
