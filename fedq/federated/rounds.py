"""Federated rounds over a process group: who trains where, what is sent, and what is booked.

Rank 0 is the server, or every rank is the server of a part of the model; all train their share of the clients. Results
and payload bytes depend neither on that nor on how clients are laid over ranks: updates are averaged in client order,
and everything random is seeded by round and client.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, nn

from fedq.collectives import Transport
from fedq.federated.accounting import message_parts
from fedq.federated.chaos import Chaos
from fedq.federated.client import Client, RoundContext, Trained
from fedq.federated.downlink import DownlinkCost
from fedq.federated.exchange import Exchange, Ranked, Rooted
from fedq.federated.frozen import check_ranks
from fedq.federated.server import NormLimit, Server, WeightLimit, aggregate, apply_change
from fedq.federated.stacked import can_stack, train_stacked
from fedq.kernels import derive_seed
from fedq.layout import Layout, LayoutSchedule
from fedq.ledger import Ledger, MessageParts
from fedq.phases import PhaseTimer
from fedq.wire import Frame, Kind

_log = logging.getLogger(__name__)

Observer = Callable[[RoundContext, int, Tensor, Frame], None]


def sample_cohort(num_clients: int, size: int, *, seed: int, round: int) -> list[int]:
    """Return the round's clients, sorted: a uniform draw without replacement."""
    rng = np.random.default_rng(derive_seed(seed, "cohort", round))
    return sorted(rng.choice(num_clients, size=size, replace=False).tolist())


def assign(cohort: Sequence[int], world_size: int, *, sticky: bool) -> list[list[int]]:
    """Return each rank's clients.

    Sticky: a client always runs on rank ``client % world_size``, where its residual lives, so residuals never travel.
    Otherwise the cohort is dealt evenly.
    """
    if sticky:
        return [[c for c in cohort if c % world_size == rank] for rank in range(world_size)]
    return [list(cohort[rank::world_size]) for rank in range(world_size)]


@dataclass(frozen=True)
class RoundResult:
    """What rank 0 knows after a round; other ranks know only whether there was a change.

    Args:
        frames: The clients' messages, or rank 0's share of each, with the rank that each came from.
        left_out: Clients whose update was not used, with the reason.
        clipped: Clients whose update was scaled down, or whose weight was cut, with the words for it.
        skipped: Those left out only because the round had too few updates.
        has_change: Whether the model was changed; on every rank.
    """

    frames: list[tuple[int, Frame]] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    clipped: dict[int, str] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()
    has_change: bool = False

    @property
    def is_lost(self) -> bool:
        """Whether no update was used, and most clients sent one that could not have been; on rank 0."""
        asked = {frame.client for _, frame in self.frames}
        came = {frame.client for _, frame in self.frames if frame.kind != Kind.MISSING}
        useless = came & self.left_out.keys() - self.skipped
        return came <= self.left_out.keys() and 2 * len(useless) > len(asked)

    @property
    def train_loss(self) -> float:
        """Mean local loss over examples."""
        return self._mean(lambda frame: frame.loss)

    @property
    def train_accuracy(self) -> float:
        """Mean local accuracy over examples."""
        return self._mean(lambda frame: frame.accuracy)

    def _mean(self, value: Callable[[Frame], float]) -> float:
        used = [frame for _, frame in self.frames if frame.client not in self.left_out]
        weights = [frame.weight for frame in used]
        return float(np.average([value(f) for f in used], weights=weights)) if sum(weights) else math.nan


class FederatedRounds:
    """Runs rounds; one instance on every rank.

    Args:
        transport: How buffers move.
        clients: Every client by number; a rank uses those of its share.
        server: The server on rank 0, None elsewhere; with a ``two_phase`` exchange every rank's own.
        uplink: Layouts of updates, by round.
        downlink: Layout of changes.
        replica: The model that every participant holds, flat float32; updated in place.
        ledger: Where rank 0 books.
        downlink_cost: How rank 0 charges clients for downloads.
        cohort_size: Clients a round.
        sticky: Whether clients keep to one rank (they have residuals there).
        observe: Called on rank 0 for each update that it trained.
        chaos: Faults on purpose.
        min_cohort: Fewest updates a round needs; with fewer the model stays as it is.
        norm_limit: What happens to updates whose norm is far beyond the others'.
        residual_memory: Share of a client's residual that is left after each round in which it was not sampled.
        side_by_side: Clients that a rank trains at a time, as one stacked model.
        beat: Called with words for what comes next, as a sign of life.
        exchange: How messages reach the server and its change everybody; default: by way of rank 0.
        has_start: Whether the replica is everybody's first model already, drawn from a seed.
        timer: Told what training, encoding, decoding and the server take; default: the transport's.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        clients: Mapping[int, Client],
        server: Server | None,
        uplink: LayoutSchedule,
        downlink: Layout,
        replica: Tensor,
        ledger: Ledger,
        downlink_cost: DownlinkCost,
        cohort_size: int,
        sticky: bool,
        observe: Observer | None = None,
        chaos: Chaos | None = None,
        min_cohort: int = 1,
        norm_limit: NormLimit | None = None,
        residual_memory: float = 1.0,
        side_by_side: int = 1,
        beat: Callable[[str], None] = lambda doing: None,
        exchange: Exchange | None = None,
        has_start: bool = False,
        timer: PhaseTimer | None = None,
    ) -> None:
        self.transport = transport
        self.timer = timer or transport.timer
        self.clients = clients
        self.server = server
        self.uplink = uplink
        self.downlink = downlink
        self.replica = replica
        self.ledger = ledger
        self.downlink_cost = downlink_cost
        self.cohort_size = cohort_size
        self.sticky = sticky
        self.observe = observe
        self.chaos = chaos or Chaos()
        self.min_cohort = min_cohort
        self.norm_limit = norm_limit
        self.residual_memory = residual_memory
        self.side_by_side = side_by_side
        self.beat = beat
        self.exchange = exchange or Rooted(transport, ledger)
        self.has_start = has_start

    def share_start(self, model: nn.Module | None = None) -> None:
        """Send rank 0's initial model to all, so that no rank relies on having drawn the same one.

        It goes in float32, or as every later one where the server sends values. Where everyone has drawn it from a
        seed nothing is sent but a checksum.

        Args:
            model: The module that the replica was taken from; its frozen parameters are not sent but compared.

        Raises:
            FieldError: The checksums differ.
        """
        if model is not None:
            self.exchange.book_peer(0, "metrics", check_ranks(model, self.transport))
        if self.downlink.sends_values:
            context = RoundContext(0, 0.0, 0)
            change = self.server.change(self.replica, context) if self.server else None
            self.downlink_cost.start(self._take(self.exchange.spread(change, self.downlink, context)))
            return
        if self.has_start:
            self.exchange.check_model(self.replica)
        else:
            self.exchange.share_model(self.replica, self.downlink)
        if self.server:
            self.server.start(self.replica)

    def run(self, context: RoundContext) -> RoundResult:
        """Run one round on this rank: train the share, send, aggregate where a server is, apply the change."""
        cohort = self._cohort(context.round, context.seed)
        shares = assign(cohort, self.transport.world_size, sticky=self.sticky)
        if self._is_root:
            self.downlink_cost.start_round(context.round, cohort)
        frames = self._train_share([self.clients[c] for c in shares[self.transport.rank]], context)
        self.chaos.strike_rank(context.round, self.transport.rank)
        self.beat(f"exchanging updates of round {context.round}")
        layout = self.uplink.at(context.round)
        ranked = self.exchange.collect(frames, [len(share) for share in shares], layout, context.round)
        result, change = self._serve(ranked, context) if self.server else (RoundResult(), None)
        change = self.exchange.spread(change, self.downlink, context)
        self._apply(change, context)
        return replace(result if self._is_root else RoundResult(), has_change=change is not None)

    @property
    def _is_root(self) -> bool:
        return self.transport.rank == 0

    def _cohort(self, round: int, seed: int) -> list[int]:
        return sample_cohort(len(self.clients), self.cohort_size, seed=seed, round=round)

    def _memory(self, client: int, context: RoundContext) -> float:
        """Return the share of the client's residual that counts: less for each round since it was last sampled."""
        if self.residual_memory == 1.0:
            return 1.0
        missed = 0
        while missed < context.round and client not in self._cohort(context.round - 1 - missed, context.seed):
            missed += 1
        return float(self.residual_memory**missed)

    def _train_share(self, share: Sequence[Client], context: RoundContext) -> list[Frame]:
        """Train this rank's clients, ``side_by_side`` of them at a time, and return their messages."""
        messages = []
        for first in range(0, len(share), self.side_by_side):
            group = share[first : first + self.side_by_side]
            results: Sequence[Trained | None] = self._train_together(group, context) or [None] * len(group)
            messages += [self._train(client, context, trained) for client, trained in zip(group, results, strict=True)]
        return messages

    def _train_together(self, group: Sequence[Client], context: RoundContext) -> list[Trained]:
        """Train a group as one stacked model; nothing comes back if it cannot be stacked, or fails."""
        training = group[0].training
        if len(group) < 2 or not can_stack(training):
            return []
        self.beat(f"training clients {', '.join(str(client.number) for client in group)} in round {context.round}")
        try:
            parts, seeds = [client.indices for client in group], [client.local_seed(context) for client in group]
            with self.timer.phase("compute"):
                return train_stacked(training, self.replica, parts, lr=context.lr, seeds=seeds)
        except Exception:
            _log.exception("round %d: training side by side failed, now one by one", context.round)
            return []

    def _train(self, client: Client, context: RoundContext, trained: Trained | None = None) -> Frame:
        """Train a client, unless it is trained already, and return its message."""
        self.beat(f"training client {client.number} in round {context.round}")
        try:
            self.chaos.strike_client(context.round, client.number)
            if trained is None:
                with self.timer.phase("compute"):
                    trained = client.train(self.replica, context)
            elif self.observe:  # it looks at the weights in the module
                client.training.layout.unflatten_(trained.flat, client.training.model)
        except Exception as error:
            _log.exception("round %d: training of client %d failed", context.round, client.number)
            return client.failure(error, context)
        with self.timer.phase("encode"):
            update = client.uplink.at(context.round).to_sent_(trained.flat, self.replica, trained.changes)
            self.chaos.spoil(update, context.round, client.number)
            frame = client.message(update, trained, context, memory=self._memory(client.number, context))
        if self.observe and self._is_root:
            self.observe(context, client.number, update, frame)
        return frame

    def _serve(self, ranked: Ranked, context: RoundContext) -> tuple[RoundResult, Frame | None]:
        """Aggregate and step, where a server is; the change is None if no client remained."""
        assert self.server is not None
        layout = self.exchange.part(self.uplink.at(context.round))
        with self.timer.phase("decode"):
            outcome = aggregate(
                layout,
                [frame for _, frame in ranked],
                self.replica.device,
                min_cohort=self.min_cohort,
                norm_limit=self.norm_limit,
                weight_limit=self._weight_limit(),
                facts=self.exchange,
                others=self._others(context),
            )
        change = None
        if outcome.mean is not None:
            with self.timer.phase("server"):
                self.server.step(layout.to_change_(outcome.mean, self.replica))
            with self.timer.phase("encode"):
                change = self.server.change(self.replica, context)
        if outcome.cut:
            ranked = [(rank, replace(f, weight=outcome.cut.get(f.client, f.weight))) for rank, f in ranked]
        return RoundResult(ranked, outcome.left_out, outcome.clipped, outcome.skipped), change

    def _weight_limit(self) -> WeightLimit | None:
        """Return what a client may count for whose weight nobody else knows."""
        return None

    def _others(self, context: RoundContext) -> Mapping[int, Layout]:
        """Return layouts of clients with codecs of their own, by hash."""
        return {}

    def _apply(self, change: Frame | None, context: RoundContext) -> None:
        """Apply the change to the replica, and note it for those who will download it."""
        if change is not None:
            parts = self._take(change)
            if self._is_root:
                self.downlink_cost.end_round(context.round, parts)

    def _take(self, change: Frame | None) -> MessageParts:
        """Apply a change to the replica and return its bytes."""
        assert change is not None
        with self.timer.phase("decode"):
            apply_change(self.downlink, change, self.replica)
        return message_parts(self.downlink, change)
