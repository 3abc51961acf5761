"""Clients that are trained by the ranks of a process group, each by one of them.

Results and payload bytes do not depend on how clients are laid over ranks: everything random is seeded by round and
client.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fedq.federated.accounting import message_parts
from fedq.federated.aggregate import Facts
from fedq.federated.client import Client
from fedq.federated.cohort import assign, sample_cohort
from fedq.federated.delivery import Answers, Delivery
from fedq.federated.downlink import DownlinkCost
from fedq.federated.exchange import Exchange
from fedq.federated.frozen import check_ranks
from fedq.federated.parts import Part
from fedq.federated.plain_bytes import from_bytes, to_bytes
from fedq.federated.stacked import can_stack, train_stacked
from fedq.federated.training import OnExamples, RoundContext, Trained
from fedq.layout import Layout, LayoutSchedule
from fedq.phases import PhaseTimer
from fedq.wire import Frame

_log = logging.getLogger(__name__)


class RankDelivery(Delivery):
    """Every rank trains its share of the clients.

    Args:
        exchange: What brings messages to the server, and its change to all ranks.
        clients: Every client by number; a rank uses those of its share.
        uplink: Layouts of updates, by round.
        downlink_cost: How rank 0 charges clients for downloads.
        cohort_size: Clients a round.
        sticky: Whether clients keep to one rank (they keep something there).
        side_by_side: Clients that a rank trains at a time, as one stacked model.
        has_start: Whether every rank has drawn the first model from the seed.
        timer: What measures the time of training and encoding; default: the transport's.
        own_codecs: Returns the layouts for a client's own codec; None: no client has one.
    """

    def __init__(
        self,
        exchange: Exchange,
        clients: Mapping[int, Client],
        uplink: LayoutSchedule,
        downlink_cost: DownlinkCost,
        *,
        cohort_size: int,
        sticky: bool,
        side_by_side: int = 1,
        has_start: bool = False,
        timer: PhaseTimer | None = None,
        own_codecs: Callable[[str], LayoutSchedule] | None = None,
    ) -> None:
        super().__init__(uplink)
        self.is_spread = exchange.is_spread
        self.exchange = exchange
        self.transport = exchange.transport
        self.ledger = exchange.ledger
        self.timer = timer or self.transport.timer
        self.clients = clients
        self.downlink_cost = downlink_cost
        self.cohort_size = cohort_size
        self.sticky = sticky
        self.side_by_side = side_by_side
        self.has_start = has_start
        self.own_codecs = own_codecs

    @property
    def serves(self) -> bool:
        """Whether this rank has a server."""
        return self.exchange.serves

    @property
    def reports(self) -> bool:
        """Whether this is rank 0."""
        return self.transport.rank == 0

    @property
    def facts(self) -> Facts:
        """What the ranks' servers know together."""
        return self.exchange

    def part(self, layout: Layout) -> Layout:
        """Return what this rank's server has of a layout of the model."""
        return self.exchange.part(layout)

    # ---- the start ---------------------------------------------------------------------------------------------------

    def compare(self, model: nn.Module) -> None:
        """Compare the ranks' models: what they are made of, and frozen parameters, which are not sent.

        Raises:
            FieldError: The ranks' models differ.
        """
        self.exchange.book_peer(0, "metrics", check_ranks(model, self.transport))

    def share(self, replica: Tensor, layout: Layout) -> None:
        """Send rank 0's model to all, so that no rank relies on having drawn the same one.

        It goes in float32. Where everyone has drawn it from a seed nothing is sent but a checksum.

        Raises:
            FieldError: The checksums differ.
        """
        if self.has_start:
            self.exchange.check_model(replica)
        else:
            self.exchange.share_model(replica, layout)

    def begin(self, change: Frame, layout: Layout) -> None:
        """Note the message that everybody begins with."""
        self.downlink_cost.start(message_parts(layout, change))

    # ---- a round -----------------------------------------------------------------------------------------------------

    def ask(self, replica: Tensor, context: RoundContext, parts: Part) -> Answers:
        """Train this rank's share of the cohort, and send its messages to where they are averaged."""
        cohort, rank = self._cohort(context.round, context.seed), self.transport.rank
        shares = assign(cohort, self.transport.world_size, sticky=self.sticky)
        if self.reports:
            self.downlink_cost.start_round(context.round, cohort)
        members = [self.clients[client] for client in shares[rank]]
        frames = self._train(members, replica, context, parts)
        parts.before_exchange(context, rank)
        parts.alive(f"exchanging updates of round {context.round}")
        layout, others = self.uplink.at(context.round), self._other_layouts(members, context.round)
        ranked = self.exchange.collect(frames, [len(share) for share in shares], layout, context.round, others)
        return Answers(ranked, self.part(layout), others)

    def _other_layouts(self, members: Sequence[Client], round: int) -> dict[int, Layout]:
        """Return on rank 0 the layouts of all clients with a codec of their own, by hash; others know their own."""
        if self.own_codecs is None:
            return {}
        own = sorted({client.uplink for client in members if client.uplink is not None})
        gathered, moved = self.transport.gather([to_bytes(own)], [1] * self.transport.world_size)
        self.exchange.book_peer(round, "metrics", moved.payload + moved.sizes)
        specs = {spec for (told,) in gathered for spec in from_bytes(told)}
        layouts = [self.own_codecs(spec).at(round) for spec in sorted(specs)]
        return {layout.hash: layout for layout in layouts}

    def tell(self, change: Frame | None, layout: Layout, context: RoundContext) -> Frame | None:
        """Give the whole change to every rank; None if there is none."""
        return self.exchange.spread(change, layout, context)

    def settle(self, change: Frame | None, replica: Tensor, layout: Layout, context: RoundContext) -> None:
        """Note the change for those who will download it."""
        if change is not None and self.reports:
            self.downlink_cost.end_round(context.round, message_parts(layout, change))

    def note_peer(self, round: int, nbytes: int) -> None:
        """Book bytes between ranks."""
        self.exchange.book_peer(round, "metrics", nbytes)

    def state_dict(self) -> dict[str, Any]:
        """Return who has downloaded what."""
        return {"downlink_cost": self.downlink_cost.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.downlink_cost.load_state_dict(state["downlink_cost"])

    def _cohort(self, round: int, seed: int) -> list[int]:
        return sample_cohort(len(self.clients), self.cohort_size, seed=seed, round=round)

    def _missed(self, client: Client, context: RoundContext) -> int:
        """Return the rounds since a client was last sampled, where its residual fades with them."""
        missed = 0
        if client.residual_memory == 1.0:
            return missed
        while missed < context.round and client.number not in self._cohort(context.round - 1 - missed, context.seed):
            missed += 1
        return missed

    def _train(self, share: Sequence[Client], replica: Tensor, context: RoundContext, parts: Part) -> list[Frame]:
        """Train this rank's clients, ``side_by_side`` of them at a time, and return their messages."""
        messages = []
        for first in range(0, len(share), self.side_by_side):
            group = share[first : first + self.side_by_side]
            results = self._train_together(group, replica, context, parts) or [None] * len(group)
            messages += [
                client.answer(
                    replica,
                    context,
                    parts=parts,
                    trained=trained,
                    missed=self._missed(client, context),
                    timer=self.timer,
                )
                for client, trained in zip(group, results, strict=True)
            ]
        return messages

    def _train_together(
        self, group: Sequence[Client], replica: Tensor, context: RoundContext, parts: Part
    ) -> Sequence[Trained | None]:
        """Train a group as one stacked model; nothing comes back if it cannot be stacked, or fails."""
        shares = [client.training for client in group if isinstance(client.training, OnExamples)]
        if len(group) < 2 or len(shares) < len(group) or not can_stack(training := shares[0].training):
            return []
        parts.alive(f"training clients {', '.join(str(client.number) for client in group)} in round {context.round}")
        try:
            indices = [share.indices for share in shares]
            seeds = [context.local_seed(client.number) for client in group]
            with self.timer.phase("compute"):
                return train_stacked(training, replica, indices, lr=context.lr, seeds=seeds)
        except Exception:
            _log.exception("round %d: training side by side failed, now one by one", context.round)
            return []
