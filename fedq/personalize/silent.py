"""Rounds in which nothing is sent: every client trains its own model, and tells how it went."""

from __future__ import annotations

import logging

from fedq.federated.client import Client, RoundContext, Trained
from fedq.federated.rounds import FederatedRounds, RoundResult, assign
from fedq.federated.server import why_left_out
from fedq.wire import Frame, Kind

_log = logging.getLogger(__name__)


class SilentRounds(FederatedRounds):
    """Rounds without an exchange: the replica stays what it was, and no client is charged for anything.

    What clients tell (loss and accuracy, or why training failed) is a matter of the simulation, booked as bytes
    between ranks.
    """

    def run(self, context: RoundContext) -> RoundResult:
        """Run one round on this rank: train the share."""
        cohort = self._cohort(context.round, context.seed)
        shares = assign(cohort, self.transport.world_size, sticky=True)
        frames = [self._train(self.clients[client], context) for client in shares[self.transport.rank]]
        self.chaos.strike_rank(context.round, self.transport.rank)
        ranked, moved = self.exchange.gather(frames, [len(share) for share in shares])
        if not self._is_root:
            return RoundResult()
        self.exchange.book_peer(context.round, "metrics", moved.payload + moved.sizes)
        left_out = {frame.client: why_left_out(frame) for _, frame in ranked if frame.kind != Kind.UPDATE}
        return RoundResult(ranked, left_out)

    def _train(self, client: Client, context: RoundContext, trained: Trained | None = None) -> Frame:
        self.beat(f"training client {client.number} in round {context.round}")
        try:
            self.chaos.strike_client(context.round, client.number)
            with self.timer.phase("compute"):
                trained = client.train(self.replica, context)
            return client.report(trained, context)
        except Exception as error:
            _log.exception("round %d: training of client %d failed", context.round, client.number)
            return client.failure(error, context)
