"""The server: averages decoded updates, steps its optimizer on the master, and sends the change to the replica.

The master is exact (float32) and the server's alone; the replica is what every participant holds. The server sends
``C(master - replica)``, so whatever the downlink's codec loses stays in that difference and is sent later: the
downlink's error feedback needs no other memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedq.federated.client import RoundContext
from fedq.layout import Layout
from fedq.wire import Frame, Kind, check_layout, join_payloads, split_body

_log = logging.getLogger(__name__)

MakeServerOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Aggregate:
    """What came out of a round's messages.

    Args:
        mean: Weighted mean update, flat float32; None if no client remained.
        left_out: Clients whose update was not used, with the reason.
    """

    mean: Tensor | None
    left_out: dict[int, str]


def aggregate(layout: Layout, frames: Sequence[Frame], device: torch.device) -> Aggregate:
    """Decode and average the updates, in client order, weighted by their numbers of examples.

    An update that is not finite is left out and named; the others are averaged without it.

    Raises:
        FieldError: A frame of another model, or of a wrong size.
    """
    frames = sorted(frames, key=lambda frame: frame.client)
    left_out = {f.client: "update is not finite" for f in frames if f.kind == Kind.LEFT_OUT}
    while True:
        kept = [f for f in frames if f.client not in left_out]
        total = sum(f.weight for f in kept)
        if not kept or total <= 0:
            return Aggregate(None, left_out)
        mean = torch.zeros(layout.numel, device=device)
        for frame in kept:
            _decode_add(layout, frame, mean, frame.weight / total)
        if bool(torch.isfinite(mean).all()):
            return Aggregate(mean, left_out)
        culprits = {f.client: "decoded update is not finite" for f in kept if not _is_finite(layout, f, device)}
        left_out |= culprits or {f.client: "sum of updates overflows" for f in kept}


def _decode_add(layout: Layout, frame: Frame, out: Tensor, weight: float) -> None:
    check_layout(frame, layout)
    layout.decode_add(split_body(layout, frame.body), out, seed=frame.seed, weight=weight)


def _is_finite(layout: Layout, frame: Frame, device: torch.device) -> bool:
    decoded = torch.zeros(layout.numel, device=device)
    _decode_add(layout, frame, decoded, 1.0)
    return bool(torch.isfinite(decoded).all())


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
