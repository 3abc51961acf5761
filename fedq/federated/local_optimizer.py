"""The optimizer of a client's local training, by spec: ``sgd:momentum=0.9,weight_decay=5e-4``, ``adam``, ``adamw``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from fedq.engines.optimizers import lean
from fedq.errors import check_all
from fedq.specs import parse


@dataclass(frozen=True)
class LocalOptimizer(ABC):
    """Makes a fresh optimizer for every round of a client.

    Args:
        weight_decay: Weight decay, 0 or more: of sgd and adam added to the gradient, of adamw taken from the weights.

    Raises:
        FieldError: An option outside its range.
    """

    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        check_all([("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")])

    def make(self, params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Return a fresh optimizer, fused where torch has that: not for complex parameters."""
        return self._make(params, lr=lr, fused=all(param.is_floating_point() for param in params))

    @abstractmethod
    def _make(self, params: list[nn.Parameter], *, lr: float, fused: bool) -> torch.optim.Optimizer: ...


@dataclass(frozen=True)
class Sgd(LocalOptimizer):
    """Stochastic gradient descent.

    Args:
        momentum: Heavy-ball momentum, from 0 to below 1.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_all([("momentum", self.momentum, 0 <= self.momentum < 1, "0 or more and below 1")])

    def _make(self, params: list[nn.Parameter], *, lr: float, fused: bool) -> torch.optim.Optimizer:
        sgd = lean(torch.optim.SGD)
        return sgd(params, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=fused)


@dataclass(frozen=True)
class Adam(LocalOptimizer):
    """Adam (Kingma & Ba 2015) with torch's betas."""

    def _make(self, params: list[nn.Parameter], *, lr: float, fused: bool) -> torch.optim.Optimizer:
        return lean(torch.optim.Adam)(params, lr=lr, weight_decay=self.weight_decay, fused=fused)


@dataclass(frozen=True)
class AdamW(LocalOptimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019) and torch's betas."""

    def _make(self, params: list[nn.Parameter], *, lr: float, fused: bool) -> torch.optim.Optimizer:
        return lean(torch.optim.AdamW)(params, lr=lr, weight_decay=self.weight_decay, fused=fused)


LOCAL_OPTIMIZERS: dict[str, type[LocalOptimizer]] = {"sgd": Sgd, "adam": Adam, "adamw": AdamW}
"""Local optimizers by the names of their specs."""


def local_optimizer(spec: str) -> LocalOptimizer:
    """Return the local optimizer that a spec names.

    Raises:
        FieldError: The optimizer or an option is unknown, or a value is out of range; the error names ``optimizer``.
    """
    return parse("optimizer", spec, LOCAL_OPTIMIZERS)
