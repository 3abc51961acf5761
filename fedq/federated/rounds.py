"""Federated rounds: ask, aggregate, step, tell, apply.

How clients are asked and told is the delivery's business; what else happens in a round is that of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, nn

from fedq.federated.aggregate import aggregate, apply_change, why_left_out
from fedq.federated.delivery import Answers, Delivery, Ranked
from fedq.federated.parts import Part, Parts
from fedq.federated.server import Server
from fedq.federated.training import RoundContext
from fedq.layout import Layout
from fedq.phases import PhaseTimer
from fedq.wire import Frame, Kind


@dataclass(frozen=True)
class Outcome:
    """What rank 0 knows after a round; other ranks know only whether there was a change.

    Args:
        frames: The clients' messages, or rank 0's share of each, with the rank that each came from.
        left_out: Clients whose update was not used, with the reason.
        clipped: How updates were scaled down, or weights cut, in words, by client.
        skipped: Clients left out only because the round had too few updates.
        has_change: Whether the model was changed; on every rank.
    """

    frames: Ranked = field(default_factory=list)
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
        return self.mean(lambda frame: frame.loss)

    @property
    def train_accuracy(self) -> float:
        """Mean local accuracy over examples."""
        return self.mean(lambda frame: frame.accuracy)

    def mean(self, value: Callable[[Frame], float]) -> float:
        """Return the mean over the examples of those whose update was used."""
        used = [frame for _, frame in self.frames if frame.client not in self.left_out]
        weights = [frame.weight for frame in used]
        return float(np.average([value(f) for f in used], weights=weights)) if sum(weights) else math.nan


class Rounds:
    """Runs rounds; one instance in every process that takes part.

    Args:
        delivery: What brings tasks to clients and their answers back.
        server: This process's server, of the model or a part of it; None: it has none.
        downlink: Layout of changes.
        replica: The model that every participant holds, flat float32; updated in place.
        parts: What else takes part in rounds, told in this order.
        min_cohort: Fewest updates a round needs; with fewer the model stays as it is.
        timer: What measures the time of decoding, the server's step and encoding; default: a new one.
    """

    def __init__(
        self,
        delivery: Delivery,
        server: Server | None,
        downlink: Layout,
        replica: Tensor,
        *,
        parts: Iterable[Part] = (),
        min_cohort: int = 1,
        timer: PhaseTimer | None = None,
    ) -> None:
        self.delivery = delivery
        self.server = server
        self.downlink = downlink
        self.replica = replica
        self.parts = Parts(parts)
        self.min_cohort = min_cohort
        self.timer = timer or PhaseTimer()

    def share_start(self, model: nn.Module | None = None) -> None:
        """Begin with one model: rank 0's, or the one that everyone has drawn.

        It goes in float32, or as every later one where the server sends values.

        Args:
            model: The module that the replica was taken from; its frozen parameters are not sent but compared.

        Raises:
            FieldError: The participants' models do not agree.
        """
        if model is not None:
            self.delivery.compare(model)
        if self.downlink.sends_values:
            context = RoundContext(0, 0.0, 0)
            change = self.server.change(self.replica, context) if self.server else None
            change = self.delivery.tell(change, self.downlink, context)
            assert change is not None
            self._apply(change)
            self.delivery.begin(change, self.downlink)
            return
        self.delivery.share(self.replica, self.downlink)
        if self.server:
            self.server.start(self.replica)

    def run(self, context: RoundContext) -> Outcome:
        """Run one round: ask clients, aggregate and step where a server is, tell everybody, apply the change."""
        answers = self.delivery.ask(self.replica, context, self.parts)
        outcome, change = self._serve(answers, context)
        change = self.delivery.tell(change, self.downlink, context)
        if change is not None:
            self._apply(change)
        self.delivery.settle(change, self.replica, self.downlink, context)
        return replace(outcome if self.delivery.reports else Outcome(), has_change=change is not None)

    def _serve(self, answers: Answers, context: RoundContext) -> tuple[Outcome, Frame | None]:
        """Aggregate and step, where a server is; the change is None if no client remained."""
        ranked = answers.ranked
        if self.server is None:
            return Outcome(ranked, {f.client: why_left_out(f) for _, f in ranked if f.kind != Kind.UPDATE}), None
        with self.timer.phase("decode"):
            result = aggregate(
                answers.layout,
                [frame for _, frame in ranked],
                self.replica.device,
                min_cohort=self.min_cohort,
                parts=self.parts,
                context=context,
                facts=self.delivery.facts,
                others=answers.others,
            )
        change = None
        if result.mean is not None:
            with self.timer.phase("server"):
                self.server.step(answers.layout.to_change_(result.mean, self.replica))
            with self.timer.phase("encode"):
                change = self.server.change(self.replica, context)
        if result.cut:
            ranked = [(rank, replace(f, weight=result.cut.get(f.client, f.weight))) for rank, f in ranked]
        return Outcome(ranked, result.left_out, result.clipped, result.skipped), change

    def _apply(self, change: Frame) -> None:
        with self.timer.phase("decode"):
            apply_change(self.downlink, change, self.replica)
