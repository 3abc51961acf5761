"""The server: averages decoded updates, steps its optimizer on the master, and sends the change to the replica.

One server may hold the whole model, or several a part of it each: the same code, because codes, averages and steps are
those of single tensors. What concerns whole updates (their norm, whether a value is not finite) goes through `Facts`.

The master is exact (float32) and the server's alone; the replica is what every participant holds. The server sends
``C(master - replica)``, so whatever the downlink's codec loses stays in that difference and is sent later: the
downlink's error feedback needs no other memory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from fedq.federated.client import RoundContext, is_finite
from fedq.layout import Layout
from fedq.text import clean
from fedq.wire import Frame, Kind, check_layout, join_payloads, split_body

MakeServerOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Aggregate:
    """What came out of a round's messages.

    Args:
        mean: Weighted mean update, flat float32; None if no client remained.
        left_out: Clients whose update was not used, with the reason.
        clipped: Clients whose update was scaled down, with the words for it.
        cut: Weights of clients that counted for less than they said.
        skipped: Those left out only because the round had too few updates.
    """

    mean: Tensor | None
    left_out: dict[int, str]
    clipped: dict[int, str] = field(default_factory=dict)
    cut: dict[int, float] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()


@dataclass(frozen=True)
class NormLimit:
    """What happens to updates whose norm is far beyond the others'.

    Args:
        multiple: The limit, as a multiple of the median norm of the round's updates.
        rule: ``clip`` scales an update down to the limit, ``drop`` leaves it out.
    """

    multiple: float
    rule: Literal["clip", "drop"] = "clip"


@dataclass(frozen=True)
class WeightLimit:
    """How much a client with a weight of its own may count for.

    Whoever says more is not believed: it counts as the heaviest of the others. At the limit itself one in two parts of
    a mean would be its own, and it could take back what all the others want.

    Args:
        share: The most, of a mean of three updates or more; of fewer nobody's weight is cut.
        clients: Those whose weight nobody else knows.
    """

    share: float
    clients: frozenset[int]

    def cut(self, weights: Mapping[int, float]) -> dict[int, float]:
        """Return the weights that are lower than said, by client.

        They are that of the heaviest client that is not cut, if no share is beyond the limit then, or just so low that
        none is. Where that cannot be (three updates, a limit below a third), those cut weigh as much as the lightest.

        Args:
            weights: Of the updates that are averaged, by client.
        """
        if len(weights) < 3:
            return {}
        rest, heavy = sum(weights.values()), list[int]()  # exact: whole numbers far below 2^53
        for client in sorted(self.clients & weights.keys(), key=lambda client: -weights[client]):
            left = 1 - self.share * len(heavy)
            if left > 0 and weights[client] <= self.share * rest / left:
                break
            heavy.append(client)
            rest -= weights[client]
        left = 1 - self.share * len(heavy)
        others = [weight for client, weight in weights.items() if client not in heavy]
        limit = min(self.share * rest / left, max(others)) if left > 0 and others else 0.0
        limit = max(limit, min(weights.values()))
        return {client: limit for client in heavy if weights[client] > limit}


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
            holds: bool, of the same shape on all.
        """
        return holds


_SEEN_WHOLE = Facts()
_NO_OTHERS: Mapping[int, Layout] = MappingProxyType({})


def aggregate(
    layout: Layout,
    frames: Sequence[Frame],
    device: torch.device,
    *,
    min_cohort: int = 1,
    norm_limit: NormLimit | None = None,
    weight_limit: WeightLimit | None = None,
    facts: Facts = _SEEN_WHOLE,
    others: Mapping[int, Layout] = _NO_OTHERS,
) -> Aggregate:
    """Decode and average the updates, in client order, weighted by their numbers of examples.

    An update that is not finite, or whose client failed, is left out and named; the others are averaged without it.
    With fewer than ``min_cohort`` updates there is no mean, and those that there are are named too.

    Args:
        layout: Of the updates, or of this server's part of them.
        frames: The updates, or this server's part of each; headers are the same on all servers.
        device: Where to decode.
        min_cohort: Fewest updates that make a mean.
        norm_limit: What happens to updates that are far too large.
        weight_limit: What one client may count for.
        facts: What the other servers know; by them all servers decide the same.
        others: Layouts, by hash, of clients that use codecs of their own.

    Raises:
        FieldError: A frame of another model, or of a wrong size.
    """
    layouts = _Layouts(layout, others)
    frames = sorted(frames, key=lambda frame: frame.client)
    left_out = {f.client: why_left_out(f) for f in frames if f.kind != Kind.UPDATE}
    kept = [f for f in frames if f.client not in left_out]
    norms = _norms(layouts, kept, device, facts) if norm_limit else {}
    scales, too_large = _norm_scales(norms, norm_limit) if norm_limit else ({}, {})
    left_out |= too_large
    clipped = {client: f"norm clipped to {scale:.3g} of itself" for client, scale in scales.items()}
    while True:
        kept = [f for f in frames if f.client not in left_out]
        cut = weight_limit.cut({f.client: f.weight for f in kept}) if weight_limit else {}
        weights = [cut.get(f.client, f.weight) for f in kept]
        total = sum(weights)
        if len(kept) < max(1, min_cohort) or not 0 < total < math.inf:
            reason = f"the round is skipped: {len(kept)} updates of {total:g} examples, min_cohort {min_cohort}"
            skipped = frozenset(f.client for f in kept)
            return Aggregate(None, left_out | dict.fromkeys(sorted(skipped), reason), clipped, skipped=skipped)
        factors = [scales.get(f.client, 1.0) * weight / total for f, weight in zip(kept, weights, strict=True)]
        mean = _weighted_sum(layouts, kept, factors, device)
        if facts.everywhere(torch.tensor([is_finite(mean)])).all():
            return Aggregate(mean, left_out, _with_cuts(clipped, kept, cut), cut)
        fine = facts.everywhere(torch.tensor([_decodes_finite(layouts, f, device) for f in kept])).tolist()
        culprits = {f.client: "decoded update is not finite" for f, ok in zip(kept, fine, strict=True) if not ok}
        left_out |= culprits or {f.client: "sum of updates overflows" for f in kept}


def _with_cuts(clipped: dict[int, str], frames: Sequence[Frame], cut: Mapping[int, float]) -> dict[int, str]:
    """Return the words of what was scaled down, with those of weights."""
    words = {f.client: f"weight cut from {f.weight:g} to {cut[f.client]:g}" for f in frames if f.client in cut}
    return clipped | {c: f"{clipped[c]}, {said}" if c in clipped else said for c, said in words.items()}


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


def _norms(layouts: _Layouts, frames: Sequence[Frame], device: torch.device, facts: Facts) -> dict[int, float]:
    """Return the norms of the decoded parameters by client: roots of exact sums of the tensors' squared norms."""
    if not frames:
        return {}
    squares = [
        [
            float(torch.linalg.vector_norm(payload.decode(), dtype=torch.float64)) ** 2
            for layout in [layouts.of(frame)]
            for span, payload in layout.payloads(_datas(layout, frame), seed=frame.seed)
            if span.role != "stats"
        ]
        for frame in frames
    ]
    columns = facts.of_all_params(torch.tensor(squares, dtype=torch.float64).T).T.tolist()
    # The exact sum, rounded once, is the same in any order: it does not depend on who holds which tensor.
    return {frame.client: math.sqrt(math.fsum(column)) for frame, column in zip(frames, columns, strict=True)}


def _norm_scales(norms: Mapping[int, float], limit: NormLimit) -> tuple[dict[int, float], dict[int, str]]:
    """Return scale factors below 1, and clients to leave out, by the norms of their updates."""
    finite = [norm for norm in norms.values() if math.isfinite(norm)]
    highest = limit.multiple * statistics.median(finite or [0.0])
    if highest == 0:  # most updates are zero: there is no size to compare with
        return {}, {}
    beyond = {client: norm for client, norm in norms.items() if math.isfinite(norm) and norm > highest}
    if limit.rule == "clip":
        return {client: highest / norm for client, norm in beyond.items()}, {}
    return {}, {c: f"norm {norm:.3g} is beyond {highest:.3g}" for c, norm in beyond.items()}


def _decodes_finite(layouts: _Layouts, frame: Frame, device: torch.device) -> bool:
    layout = layouts.of(frame)
    decoded = torch.zeros(layout.numel, device=device)
    _decode_add(layout, frame, decoded, 1.0)
    return is_finite(decoded)


class Server:
    """The server's state and its two acts: `step` and `change`.

    The optimizer knows every parameter of the model by its number, but those of other servers' parts have no memory
    and never a gradient, so it leaves them alone. States of parts thus put together are the state of the whole.

    Args:
        initial: The whole model that everyone starts from, flat float32; copied.
        layout: Layout of the downlink (offsets are those of the uplink too), or this server's part of it.
        make_optimizer: From the master's parameter tensors to a `torch.optim.Optimizer`; it is fed the negative mean
            update as the gradient. Statistics never go through it: their mean change is added as it is.
    """

    def __init__(self, initial: Tensor, layout: Layout, make_optimizer: MakeServerOptimizer) -> None:
        self.layout = layout
        self.master = layout.take(initial).clone()
        views = layout.views(self.master)
        whole = [s for s in (layout.whole or layout).spans if s.role != "stats"]
        params = [views.get(s.name, initial.new_zeros(()).expand(s.shape)).requires_grad_() for s in whole]
        self._params = {s.name: param for s, param in zip(whole, params, strict=True) if s.name in views}
        self._numbers = {number for number, span in enumerate(whole) if span.name in views}
        self._variances = [s for s in layout.spans if s.role == "stats" and s.name.endswith("running_var")]
        self.optimizer = make_optimizer(params)

    def start(self, replica: Tensor) -> None:
        """Begin from the model that everyone holds, flat float32."""
        self.master.copy_(self.layout.take(replica))

    def step(self, mean: Tensor) -> None:
        """Apply a mean update to the master."""
        gradients = self.layout.views(mean.neg())
        for name, param in self._params.items():
            param.grad = gradients[name]
        if self._params:
            self.optimizer.step()
        for param in self._params.values():
            param.grad = None
        stats = slice(self.layout.num_params, self.layout.numel)
        self.master[stats] += mean[stats]
        for span in self._variances:  # a bfloat16 change may overshoot a variance that has shrunk to almost nothing
            self.master[span.slice].clamp_(min=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the master (of this part) and the optimizer's state of its parameters, by number."""
        return {"master": self.master, "optimizer": self._own(self.optimizer.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a server that held the whole model, or of `join_states`."""
        self.master.copy_(self.layout.take(state["master"]))
        self.optimizer.load_state_dict(self._own(state["optimizer"]))

    def _own(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state without that of other servers' parameters."""
        return optimizer | {"state": {n: state for n, state in optimizer["state"].items() if n in self._numbers}}

    def change(self, replica: Tensor, context: RoundContext) -> Frame:
        """Return what brings the replica to the master, coded: their difference, or the master's values where those
        are sent. Of a part of the model, its share of the body."""
        seed = context.downlink_seed()
        sent = self.layout.to_sent_(self.master.clone(), self.layout.take(replica))
        body = join_payloads(self.layout, self.layout.encode(sent, seed=seed))
        return Frame(
            kind=Kind.CHANGE,
            round=context.round,
            client=2**32 - 1,
            layout_hash=self.layout.hash,
            seed=seed,
            weight=0.0,
            loss=0.0,
            accuracy=0.0,
            body=body,
        )


def join_states(layout: Layout, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of a server of the whole model, put together from those of its parts.

    Args:
        layout: Of the whole model.
        states: `Server.state_dict` of every part, with ``numbers``: which spans of the whole it holds.
    """
    master = torch.empty(layout.numel)
    params: dict[int, Any] = {}
    for state in states:
        part = layout.part(state["numbers"])
        for name, values in part.views(state["master"]).items():
            master[layout[name].slice] = values.reshape(-1)
        params |= state["optimizer"]["state"]
    return {"master": master, "optimizer": {**states[0]["optimizer"], "state": dict(sorted(params.items()))}}


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
