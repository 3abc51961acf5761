"""What the downlink costs the protocol: who downloads which change, or the whole model, in which round.

The broadcast between ranks is a matter of the simulation and is booked by the rounds as wire bytes; here are the
payload bytes that a federation with these clients would send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fedq.errors import FieldError
from fedq.federated.accounting import plain_model
from fedq.layout import Layout
from fedq.ledger import Ledger, MessageParts

Rule = Literal["cohort", "all"]


class DownlinkCost:
    """Books each client's downloads.

    ``cohort``: a sampled client fetches every change since its last round, or the whole model in float32 where that
    is smaller; the first time, the whole model. ``all``: every client gets the whole model at the start and every
    change when it is made. In float32 either rule would send the whole model each time, and that is the raw cost.
    Where the server sends values instead of changes, every message is a whole model, and the newest is all one needs.

    Args:
        ledger: Where to book.
        layout: The downlink's layout.
        rule: ``cohort`` or ``all``.
        num_clients: Clients of the federation.
        has_start: Whether every client has the first model without a download, because it draws it from a seed.
    """

    def __init__(
        self, ledger: Ledger, layout: Layout, rule: Rule, num_clients: int, *, has_start: bool = False
    ) -> None:
        if rule not in ("cohort", "all"):
            raise FieldError("downlink_to", rule, "cohort, all")
        self._ledger = ledger
        self._full = plain_model(layout)
        self._is_full = layout.sends_values
        self._rule = rule
        self._num_clients = num_clients
        self._changes: list[MessageParts] = []
        self._num_dropped = 0
        self._next_change = dict.fromkeys(range(num_clients), 0) if has_start else {}

    def start(self, message: MessageParts) -> None:
        """Note the message that everyone starts from, where the server sends values."""
        self._full = message

    def start_round(self, round: int, cohort: Sequence[int]) -> None:
        """Book what this round's clients download before they train."""
        newcomers = cohort if self._rule == "cohort" else range(self._num_clients) if round == 0 else ()
        for client in newcomers:
            for parts in self._download(client):
                self._ledger.record(round=round, client=client, direction="downlink", parts=parts)
            self._next_change[client] = self._num_dropped + len(self._changes)

    def end_round(self, round: int, change: MessageParts) -> None:
        """Note a change that the server made, and book it at once if all clients get it."""
        if self._is_full:
            self._full = change
            self._num_dropped += 1
        elif self._rule == "cohort":
            self._changes.append(change)
            self._drop_what_nobody_fetches()
        if self._rule == "cohort":
            return
        for client in range(self._num_clients):
            self._ledger.record(round=round, client=client, direction="downlink", parts=change)

    def state_dict(self) -> dict[str, Any]:
        """Return who has seen which change, and the changes that may still be fetched."""
        return {
            "full": vars(self._full),
            "changes": [vars(change) for change in self._changes],
            "num_dropped": self._num_dropped,
            "next_change": dict(self._next_change),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._full = MessageParts(**state["full"]) if "full" in state else self._full
        self._changes = [MessageParts(**change) for change in state["changes"]]
        self._num_dropped = state["num_dropped"]
        self._next_change = dict(state["next_change"])

    def _download(self, client: int) -> list[MessageParts]:
        seen = self._next_change.get(client, -1)
        if seen < self._num_dropped:
            return [self._full]
        missed = self._changes[seen - self._num_dropped :]
        if _nbytes(missed) >= self._full.nbytes:
            return [self._full]
        return [without_raw(change) for change in missed[:-1]] + missed[-1:]

    def _drop_what_nobody_fetches(self) -> None:
        """Forget a change when the later ones alone weigh as much as the whole model."""
        while _nbytes(self._changes[1:]) >= self._full.nbytes:
            del self._changes[0]
            self._num_dropped += 1


def _nbytes(changes: Sequence[MessageParts]) -> int:
    return sum(change.nbytes for change in changes)


def without_raw(parts: MessageParts) -> MessageParts:
    """Return the same bytes with no float32 cost: one download replaces one whole model, however many changes."""
    return MessageParts(parts.tensors, parts.parts, np.zeros_like(parts.raw), parts.payload)
