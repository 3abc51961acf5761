"""What clients of a federation have measured while they trained, and what they have left to be saved."""

from __future__ import annotations

import math

from torch import Tensor

from fedq.federated.client import Client
from fedq.federated.client_states import ClientStates
from fedq.federated.parts import Part
from fedq.federated.rounds import Outcome
from fedq.federated.training import RoundContext, Trained
from fedq.feedback import NoFeedback
from fedq.wire import Frame, Kind


class TrainingMeans(Part):
    """Keeps what this rank's clients have measured in a round, and whose state and residual it changed.

    Args:
        states: States that this rank's clients keep between rounds.
    """

    def __init__(self, states: ClientStates) -> None:
        self.states = states
        self.told: dict[int, dict[str, float]] = {}
        self.kept: set[int] = set()
        self.remembered: set[int] = set()

    def clear(self) -> None:
        """Begin a round."""
        self.told.clear()
        self.kept.clear()
        self.remembered.clear()

    def before_training(self, context: RoundContext, client: Client) -> None:
        """Note a client whose state may change, also by a training that fails."""
        if self.states.note(client.number):
            self.kept.add(client.number)

    def after_training(self, context: RoundContext, client: Client, trained: Trained) -> None:
        """Note its means."""
        means = {name: value for name, value in trained.metrics.items() if math.isfinite(value)}
        if means:
            self.told[client.number] = means

    def after_encoding(self, context: RoundContext, client: Client, update: Tensor, frame: Frame) -> None:
        """Note a client that keeps what its codec has lost."""
        if frame.kind == Kind.UPDATE and not isinstance(client.feedback, NoFeedback):
            self.remembered.add(client.number)


def mean_loss(outcome: Outcome) -> float:
    """Return the mean loss over the examples of those who have told theirs; NaN if none has."""
    frames = [frame for _, frame in outcome.frames if frame.client not in outcome.left_out]
    told = [(frame.loss, frame.weight) for frame in frames if not math.isnan(frame.loss) and frame.weight]
    total = sum(weight for _, weight in told)
    return sum(loss * weight for loss, weight in told) / total if total else math.nan
