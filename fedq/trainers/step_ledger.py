"""Books what averaging gradients sent: counted bytes by rank and leg, spread over tensors by the payload's make-up."""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

from fedq.hooks import StepExchange
from fedq.ledger import Ledger, MessageParts

_DIRECTIONS: tuple[tuple[Literal["first", "second"], str], ...] = (("first", "uplink"), ("second", "downlink"))


class StepLedger:
    """Books epochs of a data-parallel job.

    The first leg is the uplink, the second the downlink; what they sent is payload and wire alike. Raw is what a ring
    all-reduce of float32 gradients sends from each rank, 2(W-1)/W · 4N bytes a step: half on each leg, or all of it on
    the first where there is one leg only.

    Args:
        ledger: Ledger in which bytes are booked on rank 0; it stays empty elsewhere.
        shared: Exchange of gradients whose bytes are booked.
        world_size: Number of ranks.
    """

    def __init__(self, ledger: Ledger, shared: StepExchange, world_size: int) -> None:
        self._ledger = ledger
        self._shared = shared
        self._world_size = world_size
        self._before = np.zeros((world_size, 2), dtype=np.int64)

    def book_steps(self, round: int, num_steps: int, sent: Tensor) -> None:
        """Book an epoch.

        Args:
            round: Number of the epoch, from 0.
            num_steps: Number of steps that each rank took in the epoch.
            sent: Bytes that each rank has sent since the job was started, by leg, (ranks, 2).
        """
        total = sent.cpu().numpy().astype(np.int64)
        fresh, self._before = total - self._before, total
        legs = [leg for leg in (0, 1) if fresh[:, leg].any()]
        for leg in legs:
            name, direction = _DIRECTIONS[leg]
            rows, numels = self._shared.makeup(name), self._shared.numels
            ring = 2 * (self._world_size - 1) * 4 * sum(numels.values()) * num_steps // self._world_size // len(legs)
            for rank, nbytes in enumerate(fresh[:, leg].tolist()):
                parts = _spread(rows, numels, nbytes, ring)
                self._ledger.record(round=round, client=rank, direction=direction, parts=parts, wire_times=1)


def statistics_parts(nbytes: int) -> MessageParts:
    """Return the row of what averaging the normalisation layers' statistics sent."""
    size = np.array([nbytes], dtype=np.int64)
    return MessageParts(("statistics",), ("stats",), size, size)


def _spread(rows: list[tuple[str, str, int]], numels: dict[str, int], nbytes: int, raw: int) -> MessageParts:
    """Return a message of so many bytes with a payload's make-up."""
    sizes: dict[tuple[str, str], int] = {}
    for tensor, part, size in rows:
        sizes[tensor, part] = sizes.get((tensor, part), 0) + size
    holders = [numels[tensor] if part in ("codes", "exempt") else 0 for tensor, part in sizes]
    tensors, parts = zip(*sizes, strict=True)
    return MessageParts(tensors, parts, _shares(raw, holders), _shares(nbytes, list(sizes.values())))


def _shares(total: int, weights: list[int]) -> np.ndarray:
    """Return whole numbers in proportion to weights whose sum is the total."""
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    bounds = [total * at // max(1, sums[-1]) for at in sums]  # Python's integers: the products exceed 64 bits
    return np.diff(np.array(bounds, dtype=np.int64))
