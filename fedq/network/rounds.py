"""Federated rounds whose clients are across a network: the same server, averages and books as over a process group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedq.federated.client import RoundContext
from fedq.federated.rounds import FederatedRounds, RoundResult
from fedq.federated.server import WeightLimit, apply_change
from fedq.layout import Layout
from fedq.network.hub import Hub, Moved
from fedq.network.service import Service
from fedq.wire import Frame, Message


class NetworkRounds(FederatedRounds):
    """Runs rounds; messages come from a service instead of ranks.

    Args:
        parts: As for `FederatedRounds`.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._service: Service | None = None
        self._layouts: dict[int, Layout] = {}

    def serve_by(self, service: Service, version: int) -> None:
        """Begin with the replica as it is, which has seen so many rounds."""
        self._service = service
        replica = self.replica
        service.do(lambda: self._hub.offers.publish(version, replica))

    @property
    def _hub(self) -> Hub:
        assert self._service is not None
        return self._service.hub

    def run(self, context: RoundContext) -> RoundResult:
        """Ask clients, average what they answer, and offer the change to all."""
        assert self._service is not None
        self.beat(f"waiting for clients in round {context.round}")
        with self.timer.phase("exchange"):
            messages = self._service.call(self._hub.run_round(context), self._alive)
        self._layouts = {m.frame.layout_hash: m.layout for m in messages if m.layout is not None}
        result, change = self._serve([(0, message.frame) for message in messages], context)
        self._apply(change, context)
        return replace(result, has_change=change is not None)

    def book(self, round: int) -> None:
        """Book what crossed since the last time."""
        assert self._service is not None
        self._book(round, *self._service.do(lambda: (self._hub.take_moved(), self._hub.received)))

    def _book(self, round: int, moved: list[Moved], received: int) -> None:
        for client, direction, parts in moved:
            self.ledger.record(
                round=round, client=client, direction=direction, parts=parts, payload_times=1, wire_times=1
            )
        self.transport.received = received

    def with_own_data(self) -> list[int]:
        """Return the clients whose examples are no share of the server's data set."""
        return sorted(self._hub.own_data)

    def _weight_limit(self) -> WeightLimit | None:
        return WeightLimit(self._hub.federation.network.max_weight_share, self._hub.own_data)

    def _others(self, context: RoundContext) -> dict[int, Layout]:
        return self._layouts

    def _apply(self, change: Frame | None, context: RoundContext) -> None:
        """Apply the change to the replica, offer it to the clients, and book what crossed."""
        if change is not None:
            with self.timer.phase("decode"):
                apply_change(self.downlink, change, self.replica)
        message = Message(change, self.downlink) if change is not None else None
        assert self._service is not None
        hub, replica, version = self._hub, self.replica, context.round + 1

        def publish() -> tuple[list[Moved], int]:
            hub.offers.publish(version, replica, message)
            return hub.take_moved(), hub.received

        with self.timer.phase("exchange"):
            moved, received = self._service.do(publish)
        self._book(context.round, moved, received)

    def _alive(self) -> None:
        self.beat("waiting for clients")
