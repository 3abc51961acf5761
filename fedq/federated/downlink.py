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
from fedq.federated.change_log import ChangeLog
from fedq.layout import Layout
from fedq.ledger import Ledger, MessageParts

Rule = Literal["cohort", "all", "none"]


class DownlinkCost:
    """Books each client's downloads.

    ``cohort``: a sampled client fetches every change since its last round, or the whole model in float32 where that
    is smaller; the first time, the whole model. ``all``: every client gets the whole model at the start and every
    change when it is made. In float32 either rule would send the whole model each time, and that is the raw cost.
    ``none``: nothing is sent.
    Where the server sends values instead of changes, every message is a whole model, and the newest is all one needs.

    Args:
        ledger: Ledger in which downloads are booked.
        layout: The downlink's layout.
        rule: ``cohort``, ``all`` or ``none``.
        num_clients: Number of clients of the federation.
        has_start: Whether every client has the first model without a download, because it draws it from a seed.
    """

    def __init__(
        self, ledger: Ledger, layout: Layout, rule: Rule, num_clients: int, *, has_start: bool = False
    ) -> None:
        if rule not in ("cohort", "all", "none"):
            raise FieldError("downlink_to", rule, "cohort, all, none")
        self._ledger = ledger
        self._full = plain_model(layout)
        self._is_full = layout.sends_values
        self._rule = rule
        self._num_clients = num_clients
        self._changes = ChangeLog[MessageParts](lambda change: change.nbytes)
        self._next_change = dict.fromkeys(range(num_clients), 0) if has_start else {}

    def start(self, message: MessageParts) -> None:
        """Note the message that everyone starts from, where the server sends values."""
        self._full = message

    def start_round(self, round: int, cohort: Sequence[int]) -> None:
        """Book what this round's clients download before they train."""
        is_first = self._rule == "all" and round == 0
        for client in cohort if self._rule == "cohort" else range(self._num_clients * is_first):
            for parts in self._download(client):
                self._ledger.record(round=round, client=client, direction="downlink", parts=parts)
            self._next_change[client] = self._changes.newest

    def end_round(self, round: int, change: MessageParts) -> None:
        """Note a change that the server made, and book it at once if all clients get it."""
        if self._is_full:
            self._full = change
            self._changes.restart(self._changes.newest + 1)
        elif self._rule == "cohort":
            self._changes.add(change, self._full.nbytes)
        if self._rule != "all":
            return
        for client in range(self._num_clients):
            self._ledger.record(round=round, client=client, direction="downlink", parts=change)

    def state_dict(self) -> dict[str, Any]:
        """Return who has seen which change, and the changes that may still be fetched."""
        return {
            "full": vars(self._full),
            "changes": [vars(change) for change in self._changes.changes],
            "num_dropped": self._changes.oldest,
            "next_change": dict(self._next_change),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._full = MessageParts(**state["full"]) if "full" in state else self._full
        self._changes.restart(state["num_dropped"])
        for change in state["changes"]:
            self._changes.add(MessageParts(**change), self._full.nbytes)
        self._next_change = dict(state["next_change"])

    def _download(self, client: int) -> list[MessageParts]:
        missed = self._changes.since(self._next_change.get(client, -1))
        if missed is None:
            return [self._full]
        return [without_raw(change) for change in missed[:-1]] + missed[-1:]


def without_raw(parts: MessageParts) -> MessageParts:
    """Return the same bytes with no float32 cost: one download replaces one whole model, however many changes."""
    return MessageParts(parts.tensors, parts.parts, np.zeros_like(parts.raw), parts.payload)
