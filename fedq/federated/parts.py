"""What takes part in every round beside clients and server: limits, faults on purpose, histograms, signs of life.

A part overrides the moments that it wants to be told of. Those of a client come where it trains: on its rank, or on the
other side of a network. Those of the mean come where a server is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fedq.federated.training import RoundContext, Trained
from fedq.wire import Frame

if TYPE_CHECKING:
    from fedq.federated.aggregate import Updates
    from fedq.federated.client import Client


class Part:
    """Something that takes part in rounds; every method does nothing until it is overridden."""

    def alive(self, doing: str) -> None:
        """Hear what comes next, or that a wait goes on: a sign of life.

        Args:
            doing: What this process does next, or waits for, in words.
        """

    def before_training(self, context: RoundContext, client: Client) -> None:
        """Hear that a client is about to train. What is raised here is a failure of this client."""

    def after_training(self, context: RoundContext, client: Client, trained: Trained) -> None:
        """Take what training has left. What is raised here is a failure of this client."""

    def before_encoding(self, context: RoundContext, client: Client, update: Tensor) -> None:
        """Take a client's update, flat float32, which may be changed in place."""

    def after_encoding(self, context: RoundContext, client: Client, update: Tensor, frame: Frame) -> None:
        """Take a client's update with the message that it has become; the module holds what was trained."""

    def before_exchange(self, context: RoundContext, rank: int) -> None:
        """Hear that all clients of a rank have trained."""

    def before_mean(self, context: RoundContext, updates: Updates) -> None:
        """Take a round's updates once, before they are averaged: leave some out, or scale them down."""

    def weights(self, context: RoundContext, weights: Mapping[int, float]) -> Mapping[int, float]:
        """Return the weights of those clients that are to count for less than they say.

        Args:
            context: The round.
            weights: Weights of the updates that are averaged, by client.
        """
        return {}

    def mean(self, context: RoundContext, updates: Updates, weights: Mapping[int, float]) -> Tensor | None:
        """Return what takes the place of the weighted mean, flat float32 as the updates' layout; None: nothing does.

        Args:
            context: The round.
            updates: The updates to be averaged.
            weights: Weight of each update in the mean, by client.
        """
        return None

    def after_mean(self, context: RoundContext, mean: Tensor) -> None:
        """Take the mean, flat float32 as the updates' layout, which may be changed in place."""


class Parts(Part):
    """Several parts, told one after another.

    Args:
        parts: The parts, told in this order.
    """

    def __init__(self, parts: Iterable[Part] = ()) -> None:
        self.parts: Sequence[Part] = tuple(parts)

    def alive(self, doing: str) -> None:
        """Tell all."""
        for part in self.parts:
            part.alive(doing)

    def before_training(self, context: RoundContext, client: Client) -> None:
        """Tell all."""
        for part in self.parts:
            part.before_training(context, client)

    def after_training(self, context: RoundContext, client: Client, trained: Trained) -> None:
        """Tell all."""
        for part in self.parts:
            part.after_training(context, client, trained)

    def before_encoding(self, context: RoundContext, client: Client, update: Tensor) -> None:
        """Hand the update from one to the next."""
        for part in self.parts:
            part.before_encoding(context, client, update)

    def after_encoding(self, context: RoundContext, client: Client, update: Tensor, frame: Frame) -> None:
        """Tell all."""
        for part in self.parts:
            part.after_encoding(context, client, update, frame)

    def before_exchange(self, context: RoundContext, rank: int) -> None:
        """Tell all."""
        for part in self.parts:
            part.before_exchange(context, rank)

    def before_mean(self, context: RoundContext, updates: Updates) -> None:
        """Hand the updates from one to the next."""
        for part in self.parts:
            part.before_mean(context, updates)

    def weights(self, context: RoundContext, weights: Mapping[int, float]) -> Mapping[int, float]:
        """Return the weights that any part has lowered; each sees what those before it have left."""
        lowered: dict[int, float] = {}
        for part in self.parts:
            lowered |= part.weights(context, {**weights, **lowered})
        return lowered

    def mean(self, context: RoundContext, updates: Updates, weights: Mapping[int, float]) -> Tensor | None:
        """Return the first part's that has one."""
        means = (part.mean(context, updates, weights) for part in self.parts)
        return next((mean for mean in means if mean is not None), None)

    def after_mean(self, context: RoundContext, mean: Tensor) -> None:
        """Hand the mean from one to the next."""
        for part in self.parts:
            part.after_mean(context, mean)
