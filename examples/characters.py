"""A tiny character model on four clients, each with AdamW's moments kept from round to round.

    python examples/characters.py [OUT]
    torchrun --nproc-per-node 2 examples/characters.py [OUT]

Both end in the same model. The text is what every Python has: the source of its module `argparse`, a quarter of it for
each client. Here a state lives between rounds, clients are made on their own rank, and the ranks share the evaluation.
So small a model says nothing about language models.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedq

# Model and data, as anywhere else.
text = torch.tensor(list(inspect.getsource(argparse).encode("ascii", "replace")))
parts, held_out = text[:-8000].chunk(4), text[-8000:].view(80, 100)


class Characters(nn.Module):
    """Reads characters, and gives the scores of each next one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.memory = nn.GRU(32, 96, batch_first=True)
        self.scores = nn.Linear(96, 128)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the scores of the next character at every place."""
        return self.scores(self.memory(self.embedding(codes))[0])


def loss_on(model: nn.Module, lines: Tensor) -> Tensor:
    """Return the mean loss over all characters but the first of each line."""
    return cross_entropy(model(lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten())


torch.manual_seed(0)
model = Characters()


# What makes four clients of it.
def make_client(number: int) -> fedq.Client:
    """Return a client, which has a part of the text and an optimizer of its own."""
    part, optimizer = parts[number], torch.optim.AdamW(model.parameters())

    def train(model: nn.Module, lr: float) -> float:
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(10):
            starts = torch.randint(len(part) - 65, (16, 1))
            loss = loss_on(model, part[starts + torch.arange(65)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    return fedq.Client(train, num_examples=len(part), state=optimizer)


def evaluate(model: nn.Module, rank: int, ranks: int) -> dict[str, tuple[float, int]]:
    """Return the sum over this rank's lines, and their number."""
    lines = held_out[rank::ranks]
    return {"bits per character": (loss_on(model, lines).item() / math.log(2) * len(lines), len(lines))}


out = sys.argv[1] if len(sys.argv) > 1 else None
metrics = [fedq.Metric("bits per character", "bit")]
with fedq.Federation(model, make_client, num_clients=4, evaluate=evaluate, metrics=metrics, out=out) as fed:
    for result in fed.rounds(8, lr=0.01):
        if fed.is_root:
            print(result)
