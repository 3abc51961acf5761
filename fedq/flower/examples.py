"""The numbers of examples by which a strategy weighs answers: what cannot be weighed becomes an answer with an error.

Flower divides by their sum without a look at them: one odd number ends the run, or makes a model of another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flwr.app import Message as FlowerMessage
from flwr.app.message_type import MessageType
from flwr.serverapp.strategy import Strategy

from fedq.flower.exchange import as_left_out

_WEIGHED = (MessageType.TRAIN, MessageType.EVALUATE)


def weight_key(strategy: Strategy) -> str | None:
    """Return the metric by which a strategy, or the one that it wraps, weighs answers; None if it has none."""
    inner = getattr(strategy, "strategy", None)
    return weight_key(inner) if isinstance(inner, Strategy) else getattr(strategy, "weighted_by_key", None)


def weighable(replies: Sequence[FlowerMessage], key: str | None) -> list[FlowerMessage]:
    """Return answers to training and evaluation that a strategy can weigh.

    An answer whose weight is missing, no number, negative or not finite becomes one with an error, and so does every
    one if the weights of all have no sum to divide by.

    Args:
        replies: All answers of a round, unpacked.
        key: See `weight_key`; None: they are returned as they are.
    """
    if key is None:
        return list(replies)
    checked = [_checked(reply, key) for reply in replies]
    weights = [_weight(reply, key) for reply in checked if _is_weighed(reply)]
    total = sum(weights)
    if not weights or 0 < total < math.inf:
        return checked
    why = f"the {key} of all {len(weights)} answers sum to {total:g}, and nothing can be weighed by them"
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
