"""A table of numbers on ten clients: a regression, judged by its mean squared error.

    python examples/regression.py [OUT]
    torchrun --nproc-per-node 2 examples/regression.py [OUT]

Both end in the same model. With OUT, `fedq report OUT` shows the run. The data comes with scikit-learn: 442 people with
diabetes, ten measurements of each, and how far the disease had gone a year later, in points.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fedq

# Model and data, as anywhere else.
x, y = (torch.as_tensor(values, dtype=torch.float32) for values in load_diabetes(return_X_y=True))
x, y = 21 * x, (y[:, None] - 152) / 77
x_val, y_val = x[360:], y[360:]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))


# What makes ten clients of it.
def client_with(x: Tensor, y: Tensor) -> fedq.Client:
    """Return a client that has these rows of the table."""

    def train(model: nn.Module, lr: float) -> float:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for rows in torch.randperm(len(x)).split(8):
            loss = mse_loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    return fedq.Client(train, num_examples=len(x))


def evaluate(model: nn.Module) -> float:
    """Return the mean squared error on people that no client has."""
    return 77**2 * mse_loss(model(x_val), y_val).item()


clients = [client_with(*share) for share in zip(x[:360].split(36), y[:360].split(36), strict=True)]
metrics = [fedq.Metric("mse", "points^2")]
out = sys.argv[1] if len(sys.argv) > 1 else None
with fedq.Federation(model, clients, uplink="int4", evaluate=evaluate, metrics=metrics, out=out) as fed:
    for result in fed.rounds(15, lr=0.03):
        if fed.is_root:
            print(result)
