"""From settings to rounds: codecs, residuals, clients, delivery and server, put together in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from fedq.codecs import Codec, codec, codec_schedule
from fedq.collectives import Transport
from fedq.errors import FieldError
from fedq.federated.client import Client
from fedq.federated.delivery import Delivery
from fedq.federated.downlink import DownlinkCost, Rule
from fedq.federated.exchange import Exchange, Rooted, Unsent
from fedq.federated.limits import norm_limit
from fedq.federated.optim import server_optimizer
from fedq.federated.parts import Part
from fedq.federated.rank_delivery import RankDelivery
from fedq.federated.rounds import Rounds
from fedq.federated.server import Server
from fedq.federated.two_phase import TwoPhase
from fedq.feedback import ErrorFeedback, NoFeedback, ResidualStore, feedback_rule
from fedq.layout import Layout, LayoutSchedule
from fedq.ledger import Ledger


@dataclass(frozen=True)
class RoundSettings:
    """How a federation exchanges what its clients learn.

    Args:
        uplink: Codec of the clients' updates, or a schedule of codecs by round.
        downlink: Codec of the server's change to the model.
        server: The server's optimizer.
        cohort: Clients a round; None: all.
        feedback: Which clients keep what their codec loses, and how long, as `feedback_rule` reads it.
        aggregate: Who averages: rank 0 (``rooted``), or every rank the tensors that it owns (``two_phase``).
        min_cohort: Fewest usable updates a round needs.
        norm_limit: What happens to updates far larger than the others, as `norm_limit` of `limits` reads it.
        start: Whether the first model is sent to those who join, or drawn by everyone from the seed.
        downlink_to: Who is charged for a round's change: the next cohorts as they come, or every client at once.
        side_by_side: Clients that a rank trains at a time, as one stacked model.
        sends: Whether updates are sent at all.
        uplink_values: Codecs of tensors of which clients send the values instead of the change, by name.
        downlink_values: Codecs of tensors of which the server sends the values, by name.
    """

    uplink: str = "int4"
    downlink: str = "int8"
    server: str = "fedavg"
    cohort: int | None = None
    feedback: str = "auto"
    aggregate: Literal["rooted", "two_phase"] = "rooted"
    min_cohort: int = 1
    norm_limit: str = "none"
    start: Literal["sent", "seed"] = "sent"
    downlink_to: Rule = "cohort"
    side_by_side: int = 1
    sends: bool = True
    uplink_values: Mapping[str, Codec] = field(default_factory=dict)
    downlink_values: Mapping[str, Codec] = field(default_factory=dict)

    @property
    def has_feedback(self) -> bool:
        """Whether clients with the federation's codec keep a residual."""
        return self.sends and wants_feedback(self.feedback, self.uplink)

    def uplink_layouts(self, model: nn.Module, *, feedback: bool, uplink: str | None = None) -> LayoutSchedule:
        """Return the layouts of a client's updates, by round.

        Args:
            model: Module that is trained.
            feedback: Whether the client keeps a residual.
            uplink: The client's own codecs; None: the federation's.
        """
        schedule = LayoutSchedule.of(model, self.uplink if uplink is None else uplink, feedback=feedback)
        return schedule.with_values(self.uplink_values) if self.uplink_values else schedule

    def downlink_layout(self, model: nn.Module) -> Layout:
        """Return the layout of the server's changes.

        Everybody's replica is the downlink's memory, so its codec always works with feedback.
        """
        layout = Layout.of(model, codec(self.downlink).resolved(feedback=True))
        return layout.with_values(self.downlink_values) if self.downlink_values else layout

    def check(self, num_clients: int) -> None:
        """Check what can be known before any work starts.

        Raises:
            FieldError: A setting cannot be used; the error names the first one.
        """
        codec_schedule(self.uplink)
        codec(self.downlink)
        server_optimizer(self.server, [nn.Parameter(torch.zeros(1))])
        feedback_rule(self.feedback)
        norm_limit(self.norm_limit)
        cohort = num_clients if self.cohort is None else self.cohort
        checks: list[tuple[str, object, bool, str]] = [
            ("cohort", self.cohort, 1 <= cohort <= num_clients, f"1 to {num_clients}, the number of clients"),
            ("min_cohort", self.min_cohort, 1 <= self.min_cohort <= cohort, f"1 to {cohort}, the cohort"),
            ("aggregate", self.aggregate, self.aggregate in ("rooted", "two_phase"), "rooted, two_phase"),
        ]
        for name, value, is_allowed, allowed in checks:
            if not is_allowed:
                raise FieldError(name, value, allowed)

    def check_own(self, number: int, uplink: str | None) -> None:
        """Check a client's own codec.

        Raises:
            FieldError: The codec cannot be used, or ``aggregate`` is ``two_phase``, which has one codec for all.
        """
        if uplink is None:
            return
        codec_schedule(uplink)
        if self.aggregate == "two_phase":
            raise FieldError(f"uplink of client {number}", uplink, "the federation's, with aggregate two_phase")


def wants_feedback(setting: str, uplink: str) -> bool:
    """Return whether clients with this codec, or schedule of codecs, keep a residual."""
    return feedback_rule(setting).wants(chosen for _, chosen in codec_schedule(uplink))


class Seats(Mapping[int, Client]):
    """The clients of a federation by number, each made and given its place when it is first asked for.

    Args:
        num: Number of clients.
        make: Returns the client of a number, as its user made it.
        model: Module that clients' training functions train.
        settings: How clients exchange what they learn.
        store: Residuals of this rank's clients; None: no residual is kept.
        seated: Function that is called with each client once it has its place.
    """

    def __init__(
        self,
        num: int,
        make: Callable[[int], Client],
        model: nn.Module,
        settings: RoundSettings,
        store: ResidualStore | None,
        seated: Callable[[Client], None] = lambda client: None,
    ) -> None:
        self.layouts = settings.uplink_layouts(model, feedback=store is not None and settings.has_feedback)
        """Layouts of the updates of clients without a codec of their own."""
        self._num = num
        self._make = make
        self._model = model
        self._settings = settings
        self._memory = feedback_rule(settings.feedback).memory
        self._store = store
        self._told = seated
        self._seated: dict[int, Client] = {}
        self._own_layouts: dict[str, LayoutSchedule] = {}

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._num))

    def __getitem__(self, number: int) -> Client:
        if number not in self._seated:
            self._seated[number] = self._seat(number)
            self._told(self._seated[number])
        return self._seated[number]

    def own_layouts(self, uplink: str) -> LayoutSchedule:
        """Return the layouts of the updates of clients with this codec of their own, by round."""
        if uplink not in self._own_layouts:
            layouts = self._settings.uplink_layouts(self._model, feedback=self._has_feedback(uplink), uplink=uplink)
            self._own_layouts[uplink] = layouts
        return self._own_layouts[uplink]

    def _has_feedback(self, uplink: str) -> bool:
        return self._store is not None and wants_feedback(self._settings.feedback, uplink)

    def _seat(self, number: int) -> Client:
        client, settings = self._make(number), self._settings
        if not isinstance(client, Client):
            raise FieldError(f"client {number}", type(client).__name__, "a fedq.Client")
        settings.check_own(number, client.uplink)
        has_feedback = self._has_feedback(client.uplink or settings.uplink)
        feedback = ErrorFeedback(self._store) if self._store is not None and has_feedback else NoFeedback()
        layouts = self.layouts if client.uplink is None else self.own_layouts(client.uplink)
        return client.seated(
            number,
            layouts if settings.sends else None,
            feedback,
            model=self._model,
            residual_memory=self._memory,
        )


def make_rounds(
    model: nn.Module,
    settings: RoundSettings,
    delivery: Delivery,
    *,
    parts: Sequence[Part] = (),
    transport: Transport | None = None,
) -> Rounds:
    """Put a server and its rounds together.

    Args:
        model: Module that holds the model that everybody begins with.
        settings: How clients exchange.
        delivery: What brings tasks to clients and their answers back.
        parts: What else takes part in rounds, after the limit of norms.
        transport: Transport whose timer measures the server's work; None: a new timer does.
    """
    downlink = settings.downlink_layout(model)
    replica, server = downlink.flatten(model), None
    if delivery.serves:
        server = Server(replica, delivery.part(downlink), lambda params: server_optimizer(settings.server, params))
    limit = norm_limit(settings.norm_limit)
    return Rounds(
        delivery,
        server,
        downlink,
        replica,
        parts=[*([limit] if limit else []), *parts],
        min_cohort=settings.min_cohort,
        timer=None if transport is None else transport.timer,
    )


def over_ranks(
    model: nn.Module,
    settings: RoundSettings,
    seats: Seats,
    transport: Transport,
    ledger: Ledger,
    *,
    sticky: bool,
    own_codecs: bool = False,
) -> RankDelivery:
    """Return the delivery in which ranks train the clients, each its share of them.

    Args:
        model: Module that holds the model that everybody begins with.
        settings: How clients exchange.
        seats: The clients.
        transport: What moves buffers between ranks.
        ledger: Ledger in which rank 0 books bytes.
        sticky: Whether clients keep to one rank, because they keep something there.
        own_codecs: Whether there may be clients with codecs of their own.
    """
    num = len(seats)
    exchange: Exchange = Rooted(transport, ledger)
    if not settings.sends:
        exchange = Unsent(transport, ledger)
    elif settings.aggregate == "two_phase" and transport.world_size > 1:
        exchange = TwoPhase(transport, ledger, seats.layouts.at(0))
    has_start = settings.start == "seed"
    rule: Rule = settings.downlink_to if settings.sends else "none"
    return RankDelivery(
        exchange,
        seats,
        seats.layouts,
        DownlinkCost(ledger, settings.downlink_layout(model), rule, num, has_start=has_start),
        cohort_size=num if settings.cohort is None else settings.cohort,
        sticky=sticky or not settings.sends,
        side_by_side=settings.side_by_side,
        has_start=has_start,
        own_codecs=seats.own_layouts if own_codecs else None,
    )
