"""From a round's messages to their mean: decoded, weighed, and looked at.

One server may hold the whole model, or several a part of it each: the same code, because codes, averages and steps are
those of single tensors. What concerns whole updates (their norm, whether a value is not finite) goes through `Facts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType

import torch
from torch import Tensor

from fedq.federated.parts import Part
from fedq.federated.training import RoundContext, is_finite
from fedq.layout import Layout
from fedq.text import clean
from fedq.wire import Frame, Kind, check_layout, split_body


@dataclass(frozen=True)
class Aggregate:
    """What came out of a round's messages.

    Args:
        mean: Weighted mean update, flat float32; None if no client remained.
        left_out: Clients whose update was not used, with the reason.
        clipped: How updates were scaled down, in words, by client.
        cut: Lowered weights, by client, of those that counted for less than they said.
        skipped: Clients left out only because the round had too few updates.
    """

    mean: Tensor | None
    left_out: dict[int, str]
    clipped: dict[int, str] = field(default_factory=dict)
    cut: dict[int, float] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()


class Facts:
    """What is known of whole updates where one server has them whole: that which it sees itself."""

    def of_all_params(self, rows: Tensor) -> Tensor:
        """Return the rows of every parameter of the model, in any order.

        Args:
            rows: float64 [this server's parameters, updates].
        """
        return rows

    def everywhere(self, holds: Tensor) -> Tensor:
        """Return where something holds for every server.

        Args:
            holds: Whether it holds for this server, bool; all servers give the same shape.
        """
        return holds


_SEEN_WHOLE = Facts()
NO_OTHERS: Mapping[int, Layout] = MappingProxyType({})
_NOBODY = Part()
_NO_ROUND = RoundContext(0, 0.0, 0)


@dataclass(frozen=True)
class _Layouts:
    """What a frame's body may be laid out by: the same spans, with the round's codecs or a client's own."""

    usual: Layout
    others: Mapping[int, Layout]

    def of(self, frame: Frame) -> Layout:
        """Return the layout that a frame names, or the usual one, which it then does not fit."""
        return self.others.get(frame.layout_hash, self.usual)


def _weighted_sum(layouts: _Layouts, frames: Sequence[Frame], weights: Sequence[float], device: torch.device) -> Tensor:
    """Return the sum of decoded updates, in the order given; with one layout the buffer passes through memory once."""
    out = torch.empty(layouts.usual.numel, device=device)
    pairs = zip(frames, weights, strict=True)
    for number, (layout, run) in enumerate(groupby(pairs, key=lambda pair: layouts.of(pair[0]))):
        members = list(run)
        if number == 0:
            bodies = [_datas(layout, frame) for frame, _ in members]
            seeds = [frame.seed for frame, _ in members]
            layout.decode_sum(bodies, out, seeds=seeds, weights=[weight for _, weight in members])
            continue
        for frame, weight in members:
            _decode_add(layout, frame, out, weight)
    return out


def _decode_add(layout: Layout, frame: Frame, out: Tensor, weight: float) -> None:
    layout.decode_add(_datas(layout, frame), out, seed=frame.seed, weight=weight)


def _datas(layout: Layout, frame: Frame) -> list[Tensor]:
    check_layout(frame, layout)
    return split_body(layout, frame.body)


def why_left_out(frame: Frame) -> str:
    """Return why a frame carries no update, in words that can be shown whoever wrote them."""
    if frame.kind == Kind.MISSING:
        return clean(frame.body.cpu().numpy().tobytes())
    if frame.kind == Kind.FAILED:
        return "training failed: " + clean(frame.body.cpu().numpy().tobytes())
    return "update is not finite"


class Updates:
    """A round's updates at a server, those that are left out and those that are scaled down.

    Args:
        layouts: Layouts of the updates: the round's, and those of clients with codecs of their own.
        frames: The messages, in client order.
        device: Device that updates are decoded on.
        facts: Questions about whole updates, answered by all servers together.
    """

    def __init__(self, layouts: _Layouts, frames: Sequence[Frame], device: torch.device, facts: Facts) -> None:
        self._layouts = layouts
        self._frames = frames
        self._device = device
        self._facts = facts
        self.left_out = {frame.client: why_left_out(frame) for frame in frames if frame.kind != Kind.UPDATE}
        """Clients whose update is not used, with the reason."""
        self.scales: dict[int, float] = {}
        """Factors of updates that are scaled down, by client."""
        self.clipped: dict[int, str] = {}
        """How each update is scaled down, in words, by client."""

    @property
    def layout(self) -> Layout:
        """Where tensors lie in a flat update, of this server's part of the model."""
        return self._layouts.usual

    def kept(self) -> list[Frame]:
        """Return the messages whose updates are used."""
        return [frame for frame in self._frames if frame.client not in self.left_out]

    def leave_out(self, client: int, reason: str) -> None:
        """Do not use a client's update."""
        self.left_out[client] = reason

    def scale(self, client: int, factor: float, words: str) -> None:
        """Scale a client's update; ``words`` say so to a person."""
        self.scales[client] = self.scales.get(client, 1.0) * factor
        self.clipped[client] = f"{self.clipped[client]}, {words}" if client in self.clipped else words

    def decoded(self, frame: Frame) -> Tensor:
        """Return a message's update as it was sent, flat float32."""
        decoded = torch.zeros(self.layout.numel, device=self._device)
        _decode_add(self._layouts.of(frame), frame, decoded, 1.0)
        return decoded

    def norms(self) -> dict[int, float]:
        """Return the L2 norms of the decoded parameters by client: roots of exact sums of tensors' squared norms."""
        frames = self.kept()
        if not frames:
            return {}
        squares = [
            [
                float(torch.linalg.vector_norm(payload.decode(), dtype=torch.float64)) ** 2
                for layout in [self._layouts.of(frame)]
                for span, payload in layout.payloads(_datas(layout, frame), seed=frame.seed)
                if span.role != "stats"
            ]
            for frame in frames
        ]
        columns = self._facts.of_all_params(torch.tensor(squares, dtype=torch.float64).T).T.tolist()
        # The exact sum, rounded once, is the same in any order: it does not depend on who holds which tensor.
        return {frame.client: math.sqrt(math.fsum(column)) for frame, column in zip(frames, columns, strict=True)}

    def mean(self, weights: Mapping[int, float]) -> Tensor:
        """Return the weighted mean of the kept updates, each times its scale, summed in client order."""
        frames, total = self.kept(), sum(weights.values())
        factors = [self.scales.get(frame.client, 1.0) * weights[frame.client] / total for frame in frames]
        return _weighted_sum(self._layouts, frames, factors, self._device)

    def leave_out_culprits(self) -> None:
        """Leave out those whose decoded update is not finite, at any server; all, if it is their sum that overflows."""
        kept = self.kept()
        own = torch.tensor([is_finite(self.decoded(frame)) for frame in kept])
        fine = self._facts.everywhere(own).tolist()
        culprits = [frame.client for frame, is_fine in zip(kept, fine, strict=True) if not is_fine]
        reason = "decoded update is not finite" if culprits else "sum of updates overflows"
        for client in culprits or [frame.client for frame in kept]:
            self.leave_out(client, reason)


def aggregate(
    layout: Layout,
    frames: Sequence[Frame],
    device: torch.device,
    *,
    min_cohort: int = 1,
    parts: Part = _NOBODY,
    context: RoundContext = _NO_ROUND,
    facts: Facts = _SEEN_WHOLE,
    others: Mapping[int, Layout] = NO_OTHERS,
) -> Aggregate:
    """Decode and average the updates, in client order, weighted by their numbers of examples.

    An update that is not finite, or whose client failed, is left out and named; the others are averaged without it.
    With fewer than ``min_cohort`` updates there is no mean, and those that there are are named too.

    Args:
        layout: Layout of the updates, or of this server's part of them.
        frames: The updates, or this server's part of each; headers are the same on all servers.
        device: Device that updates are decoded on.
        min_cohort: Fewest updates that make a mean.
        parts: What takes part in the round; told before and after the mean.
        context: The round.
        facts: Questions about whole updates, answered by all servers together, so that all decide the same.
        others: Layouts, by hash, of clients that use codecs of their own.

    Raises:
        FieldError: A frame belongs to another model, or has a wrong size.
    """
    in_order = sorted(frames, key=lambda frame: frame.client)
    updates = Updates(_Layouts(layout, others), in_order, device, facts)
    parts.before_mean(context, updates)
    while True:
        kept = updates.kept()
        said = {frame.client: frame.weight for frame in kept}
        cut = {client: weight for client, weight in parts.weights(context, said).items() if weight != said[client]}
        weights = {**said, **cut}
        total = sum(weights.values())
        if len(kept) < max(1, min_cohort) or not 0 < total < math.inf:
            reason = f"the round is skipped: {len(kept)} updates of {total:g} examples, min_cohort {min_cohort}"
            left_out = updates.left_out | dict.fromkeys(sorted(said), reason)
            return Aggregate(None, left_out, updates.clipped, skipped=frozenset(said))
        mean = parts.mean(context, updates, weights)
        mean = updates.mean(weights) if mean is None else mean
        if facts.everywhere(torch.tensor([is_finite(mean)])).all():
            parts.after_mean(context, mean)
            return Aggregate(mean, updates.left_out, _with_cuts(updates.clipped, kept, cut), cut)
        updates.leave_out_culprits()


def _with_cuts(clipped: dict[int, str], frames: Sequence[Frame], cut: Mapping[int, float]) -> dict[int, str]:
    """Return the words of what was scaled down, with those of weights."""
    words = {f.client: f"weight cut from {f.weight:g} to {cut[f.client]:g}" for f in frames if f.client in cut}
    return clipped | {c: f"{clipped[c]}, {said}" if c in clipped else said for c, said in words.items()}


def apply_change(layout: Layout, frame: Frame, replica: Tensor) -> None:
    """Add a received change to the replica in place, or put received values there.

    Every participant does this with the same bytes.

    Raises:
        FieldError: The frame belongs to another model or codec.
    """
    for span in layout.spans:
        if span.sent == "values":
            replica[span.slice].zero_()
    _decode_add(layout, frame, replica, 1.0)
