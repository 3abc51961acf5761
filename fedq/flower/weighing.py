"""The numbers of examples by which a strategy weighs answers: what cannot be weighed becomes an answer with an error.

Flower divides by their sum without a look at them: one odd number ends the run, or makes a model of another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message as FlowerMessage
from flwr.app.message_type import MessageType
from flwr.serverapp.strategy import Strategy

from fedq.flower.exchange import as_left_out

_WEIGHED = (MessageType.TRAIN, MessageType.EVALUATE)


@dataclass(frozen=True)
class Weighing:
    """How a strategy weighs answers.

    Args:
        key: Name of the metric that is the weight; None: the strategy has none.
        is_needed: Whether the strategy averages by Flower's own code, which cannot do without; one that averages by
            code of its own may not look at weights that no node reports.
    """

    key: str | None = None
    is_needed: bool = True

    @classmethod
    def of(cls, strategy: Strategy) -> Weighing:
        """Look at a strategy, or at the one that it wraps."""
        inner = getattr(strategy, "strategy", None)
        if isinstance(inner, Strategy):
            return cls.of(inner)
        by_flower = type(strategy).aggregate_train.__module__.partition(".")[0] == "flwr"
        return cls(getattr(strategy, "weighted_by_key", None), by_flower)

    def checked(self, replies: Sequence[FlowerMessage]) -> list[FlowerMessage]:
        """Return the answers of a round to training or evaluation as the strategy can weigh them.

        An answer whose weight is missing, no number, negative or not finite becomes one with an error, and so does
        every one if the weights of all have no sum to divide by.
        """
        weighed = [reply for reply in replies if _is_weighed(reply)]
        if self.key is None or not (self.is_needed or any(_weight(reply, self.key) is not None for reply in weighed)):
            return list(replies)
        checked = [_checked(reply, self.key) for reply in replies]
        weights = [_weight(reply, self.key) for reply in checked if _is_weighed(reply)]
        total = sum(weights)
        if not weights or 0 < total < math.inf:
            return checked
        why = f"the {self.key} of all {len(weights)} answers sum to {total:g}, and nothing can be weighed by them"
        return [as_left_out(reply, why) if _is_weighed(reply) else reply for reply in checked]


def _is_weighed(reply: FlowerMessage) -> bool:
    return reply.has_content() and reply.metadata.message_type.partition(".")[0] in _WEIGHED


def _checked(reply: FlowerMessage, key: str) -> FlowerMessage:
    if not _is_weighed(reply):
        return reply
    weight = _weight(reply, key)
    if isinstance(weight, (int, float)) and 0 <= weight < math.inf:
        return reply
    return as_left_out(reply, f"its {key} is {weight!r}, not a finite number of at least 0")


def _weight(reply: FlowerMessage, key: str) -> Any:
    """Return an answer's weight as it says it; None if it does not."""
    return next((record[key] for record in reply.content.metric_records.values() if key in record), None)
