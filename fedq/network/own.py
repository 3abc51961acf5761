"""A model and a training loop of the user's own, as a client's training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

from torch import Tensor, nn

from fedq.errors import FieldError
from fedq.federated.client import Start, Trained, seed_torch
from fedq.layout import Layout

TrainFunction = Callable[..., "float | Sequence[float] | None"]
"""``train(lr)``: trains the model in place; returns its mean loss, or loss and accuracy (0 to 1), or nothing."""


class OwnTraining:
    """Trains by a function of the user's.

    Args:
        model: What the function trains.
        train: The function.
    """

    def __init__(self, model: nn.Module, train: TrainFunction) -> None:
        self.model = model
        self.train = train

    @cached_property
    def layout(self) -> Layout:
        """The model's layout."""
        return Layout.of(self.model, "fp32")

    def run(self, start: Tensor, indices: Tensor, *, lr: float, seed: int) -> Trained:
        """Write the flat model into the module, and train it; the seed is set for torch's own random numbers."""
        began = Start(self.layout, self.model, start)
        seed_torch(seed)
        self.model.train()
        told = self.train(lr)
        loss, accuracy = _measures(told)
        return began.trained(loss, accuracy, 0)


def _measures(told: float | Sequence[float] | None) -> tuple[float, float]:
    if told is None:
        return math.nan, math.nan
    loss, accuracy = map(float, told[:2] if isinstance(told, Sequence) else (told, math.nan))
    if not (math.isnan(accuracy) or 0 <= accuracy <= 1):
        raise FieldError("accuracy", accuracy, "0 to 1, as the second number that train returns")
    return loss, accuracy
