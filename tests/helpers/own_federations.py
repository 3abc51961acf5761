"""Federations of somebody's own model, small enough for tests, and what they end in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fedq

WIDTH, NUM_CLIENTS = 6, 5
FLOAT32 = {"uplink": "fp32", "downlink": "fp32"}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))


def examples(client: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(8 + 4 * client, WIDTH, generator=generator)
    return x, x.sum(1, keepdim=True).sin() + 0.1 * client


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, client: int, num: int = 3) -> float:
    x, y = examples(client)
    for _ in range(num):
        optimizer.zero_grad()
        loss = mse_loss(model(x.to(next(model.parameters()).dtype)).float(), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def client(number: int, **options: Any) -> fedq.Client:
    def train(model: nn.Module, lr: float) -> float:
        return steps(model, torch.optim.SGD(model.parameters(), lr=lr), number)

    return fedq.Client(train, num_examples=len(examples(number)[0]), **options)


def clients(num: int = NUM_CLIENTS, **options: Any) -> list[fedq.Client]:
    return [client(number, **options) for number in range(num)]


def data_of(model: nn.Module) -> bytes:
    return b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in model.state_dict().values())


def plain(results: Iterable[fedq.RoundResult]) -> list[dict[str, Any]]:
    """Results without what a clock says."""
    return [replace(result, seconds=0.0).as_dict() for result in results]


def ended(rounds: int = 3, lr: Any = 0.1, **options: Any) -> tuple[bytes, list[dict[str, Any]]]:
    """The model's bytes at the end, and the results."""
    options = {"model": net(), "clients": clients()} | options
    with fedq.Federation(**options) as fed:
        results = plain(fed.rounds(rounds, lr))
        return data_of(fed.model), results
