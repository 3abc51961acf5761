"""Clients with their place in a federation, put together by hand."""

from __future__ import annotations

from torch import Tensor

from fedq.federated.client import Client
from fedq.federated.training import ExampleTraining, OnExamples
from fedq.feedback import Feedback
from fedq.layout import LayoutSchedule


def client_on(
    number: int,
    indices: Tensor,
    training: ExampleTraining,
    layouts: LayoutSchedule,
    feedback: Feedback | None = None,
    kind: type[Client] = Client,
) -> Client:
    """Return a client that trains on the examples at some indices."""
    client = kind(OnExamples(training, indices), num_examples=len(indices))
    return client.seated(number, layouts, feedback)
