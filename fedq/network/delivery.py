"""Clients across a network: the same server, averages and books as over a process group."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedq.collectives import Transport
from fedq.federated.delivery import Answers, Delivery
from fedq.federated.limits import WeightLimit
from fedq.federated.parts import Part
from fedq.federated.training import RoundContext
from fedq.layout import Layout, LayoutSchedule
from fedq.ledger import Ledger
from fedq.network.hub import Hub, Moved
from fedq.network.service import Service
from fedq.wire import Frame, Message


class NetworkDelivery(Delivery):
    """Asks and tells clients by way of a service.

    Args:
        uplink: Layouts of the updates of clients without a codec of their own, by round.
        transport: Transport of the job, whose timer and count of received bytes are kept up to date.
        ledger: Ledger in which the bytes of every message are booked.
    """

    def __init__(self, uplink: LayoutSchedule, transport: Transport, ledger: Ledger) -> None:
        super().__init__(uplink)
        self.transport = transport
        self.ledger = ledger
        self._service: Service | None = None

    def serve_by(self, service: Service, version: int, replica: Tensor) -> None:
        """Begin with a model, flat float32, which has seen so many rounds."""
        self._service = service
        service.do(lambda: self.hub.catch_up.publish(version, replica))

    @property
    def service(self) -> Service:
        """The service; there is one once `serve_by` was called."""
        assert self._service is not None
        return self._service

    @property
    def hub(self) -> Hub:
        """The hub: what is known of every client, and the open round."""
        return self.service.hub

    def ask(self, replica: Tensor, context: RoundContext, parts: Part) -> Answers:
        """Ask clients, and wait for what they answer."""
        parts.alive(f"waiting for clients in round {context.round}")
        with self.transport.timer.phase("exchange"):
            messages = self.service.call(self.hub.run_round(context), lambda: parts.alive("waiting for clients"))
        others = {m.frame.layout_hash: m.layout for m in messages if m.layout is not None}
        return Answers([(0, message.frame) for message in messages], self.uplink.at(context.round), others)

    def tell(self, change: Frame | None, layout: Layout, context: RoundContext) -> Frame | None:
        """Return the change: clients fetch it when they are asked next."""
        return change

    def settle(self, change: Frame | None, replica: Tensor, layout: Layout, context: RoundContext) -> None:
        """Offer the change and the whole model to the clients, and book what crossed."""
        message = Message(change, layout) if change is not None else None
        hub, version = self.hub, context.round + 1

        def publish() -> tuple[list[Moved], int]:
            hub.catch_up.publish(version, replica, message)
            return hub.take_moved(), hub.received

        with self.transport.timer.phase("exchange"):
            moved, received = self.service.do(publish)
        self._book(context.round, moved, received)

    def book(self, round: int) -> None:
        """Book what crossed since the last time."""
        self._book(round, *self.service.do(lambda: (self.hub.take_moved(), self.hub.received)))

    def _book(self, round: int, moved: list[Moved], received: int) -> None:
        for client, direction, parts in moved:
            self.ledger.record(
                round=round, client=client, direction=direction, parts=parts, payload_times=1, wire_times=1
            )
        self.transport.received = received

    def with_own_data(self) -> list[int]:
        """Return the clients whose examples are no share of the server's data set."""
        return sorted(self.hub.own_data)


class OwnWeights(Part):
    """Limits what a client counts for whose weight nobody else knows.

    Args:
        delivery: The delivery, which knows the clients with data of their own.
        share: Largest share of a mean that one of them may have, 0 to 1.
    """

    def __init__(self, delivery: NetworkDelivery, share: float) -> None:
        self.delivery = delivery
        self.share = share

    def weights(self, context: RoundContext, weights: Mapping[int, float]) -> Mapping[int, float]:
        """Return the weights that are lower than said."""
        return WeightLimit(self.share, self.delivery.hub.own_data).cut(weights)
