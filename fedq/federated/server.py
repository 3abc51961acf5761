"""The server: averages decoded updates, steps its optimizer on the master, and sends the change to the replica.

The master is exact (float32) and the server's alone; the replica is what every participant holds. The server sends
``C(master - replica)``, so whatever the downlink's codec loses stays in that difference and is sent later: the
downlink's error feedback needs no other memory.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fedq.federated.client import RoundContext, is_finite
from fedq.layout import Layout
from fedq.wire import Frame, Kind, check_layout, join_payloads, split_body

MakeServerOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Aggregate:
    """What came out of a round's messages.

    Args:
        mean: Weighted mean update, flat float32; None if no client remained.
        left_out: Clients whose update was not used, with the reason.
        clipped: Clients whose update was scaled down, with the words for it.
    """

    mean: Tensor | None
    left_out: dict[int, str]
    clipped: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NormLimit:
    """What happens to updates whose norm is far beyond the others'.

    Args:
        multiple: The limit, as a multiple of the median norm of the round's updates.
        rule: ``clip`` scales an update down to the limit, ``drop`` leaves it out.
    """

    multiple: float
    rule: Literal["clip", "drop"] = "clip"


def aggregate(
    layout: Layout,
    frames: Sequence[Frame],
    device: torch.device,
    *,
    min_cohort: int = 1,
    norm_limit: NormLimit | None = None,
) -> Aggregate:
    """Decode and average the updates, in client order, weighted by their numbers of examples.

    An update that is not finite, or whose client failed, is left out and named; the others are averaged without it.
    With fewer than ``min_cohort`` updates there is no mean, and those that there are are named too.

    Raises:
        FieldError: A frame of another model, or of a wrong size.
    """
    frames = sorted(frames, key=lambda frame: frame.client)
    left_out = {f.client: _reason(f) for f in frames if f.kind != Kind.UPDATE}
    kept = [f for f in frames if f.client not in left_out]
    scales, too_large = _norm_scales(layout, kept, norm_limit, device) if norm_limit else ({}, {})
    left_out |= too_large
    clipped = {client: f"norm clipped to {scale:.3g} of itself" for client, scale in scales.items()}
    while True:
        kept = [f for f in frames if f.client not in left_out]
        total = sum(f.weight for f in kept)
        if len(kept) < max(1, min_cohort) or total <= 0:
            reason = f"the round is skipped: {len(kept)} updates of {total:g} examples, min_cohort {min_cohort}"
            return Aggregate(None, left_out | dict.fromkeys((f.client for f in kept), reason), clipped)
        mean = _weighted_sum(layout, kept, [scales.get(f.client, 1.0) * f.weight / total for f in kept], device)
        if is_finite(mean):
            return Aggregate(mean, left_out, clipped)
        culprits = {f.client: "decoded update is not finite" for f in kept if not _is_finite(layout, f, device)}
        left_out |= culprits or {f.client: "sum of updates overflows" for f in kept}


def _weighted_sum(layout: Layout, frames: Sequence[Frame], weights: Sequence[float], device: torch.device) -> Tensor:
    """Return the sum of decoded updates, in the order given; the buffer passes through memory once."""
    for frame in frames:
        check_layout(frame, layout)
    out = torch.empty(layout.numel, device=device)
    bodies = [split_body(layout, frame.body) for frame in frames]
    layout.decode_sum(bodies, out, seeds=[frame.seed for frame in frames], weights=weights)
    return out


def _decode_add(layout: Layout, frame: Frame, out: Tensor, weight: float) -> None:
    check_layout(frame, layout)
    layout.decode_add(split_body(layout, frame.body), out, seed=frame.seed, weight=weight)


def _reason(frame: Frame) -> str:
    if frame.kind == Kind.FAILED:
        return "training failed: " + frame.body.cpu().numpy().tobytes().decode(errors="replace")
    return "update is not finite"


def _norm_scales(
    layout: Layout, frames: Sequence[Frame], limit: NormLimit, device: torch.device
) -> tuple[dict[int, float], dict[int, str]]:
    """Return scale factors below 1, and clients to leave out, by the norms of the decoded parameters."""
    norms: dict[int, float] = {}
    for frame in frames:
        decoded = torch.zeros(layout.numel, device=device)
        _decode_add(layout, frame, decoded, 1.0)
        norms[frame.client] = float(decoded[: layout.num_params].norm())
    finite = [norm for norm in norms.values() if math.isfinite(norm)]
    highest = limit.multiple * statistics.median(finite or [0.0])
    if highest == 0:  # most updates are zero: there is no size to compare with
        return {}, {}
    beyond = {client: norm for client, norm in norms.items() if math.isfinite(norm) and norm > highest}
    if limit.rule == "clip":
        return {client: highest / norm for client, norm in beyond.items()}, {}
    return {}, {c: f"norm {norm:.3g} is beyond {highest:.3g}" for c, norm in beyond.items()}


def _is_finite(layout: Layout, frame: Frame, device: torch.device) -> bool:
    decoded = torch.zeros(layout.numel, device=device)
    _decode_add(layout, frame, decoded, 1.0)
    return is_finite(decoded)


class Server:
    """The server's state and its two acts: `step` and `change`.

    Args:
        initial: The model that everyone starts from, flat float32; copied.
        layout: Layout of the downlink (offsets are those of the uplink too).
        make_optimizer: From the master's parameter tensors to a `torch.optim.Optimizer`; it is fed the negative mean
            update as the gradient. Statistics never go through it: their mean change is added as it is.
    """

    def __init__(self, initial: Tensor, layout: Layout, make_optimizer: MakeServerOptimizer) -> None:
        self.layout = layout
        self.master = initial.clone()
        views = layout.views(self.master)
        self._params = [views[s.name].requires_grad_() for s in layout.spans if s.role != "stats"]
        self._variances = [s for s in layout.spans if s.role == "stats" and s.name.endswith("running_var")]
        self.optimizer = make_optimizer(self._params)

    def step(self, mean: Tensor) -> None:
        """Apply a mean update to the master."""
        gradient = self.layout.views(mean.neg())
        params = (s for s in self.layout.spans if s.role != "stats")
        for param, span in zip(self._params, params, strict=True):
            param.grad = gradient[span.name]
        self.optimizer.step()
        for param in self._params:
            param.grad = None
        stats = slice(self.layout.num_params, self.layout.numel)
        self.master[stats] += mean[stats]
        for span in self._variances:  # a bfloat16 change may overshoot a variance that has shrunk to almost nothing
            self.master[span.slice].clamp_(min=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the master and the optimizer's state."""
        return {"master": self.master, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.master.copy_(state["master"])
        self.optimizer.load_state_dict(state["optimizer"])

    def change(self, replica: Tensor, context: RoundContext) -> Frame:
        """Return the coded difference between master and replica."""
        seed = context.downlink_seed()
        body = join_payloads(self.layout, self.layout.encode(self.master - replica, seed=seed))
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


def apply_change(layout: Layout, frame: Frame, replica: Tensor) -> None:
    """Add a received change to the replica in place: every participant does this with the same bytes.

    Raises:
        FieldError: The frame belongs to another model or codec.
    """
    _decode_add(layout, frame, replica, 1.0)
