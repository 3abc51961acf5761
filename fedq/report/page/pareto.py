"""Which arms no other arm beats, and the time an arm would take on a link of some bandwidth."""

from __future__ import annotations

from collections.abc import Sequence

BANDWIDTHS = (1e6, 1e7, 1e8, 1e9, 1e10)
"""Bandwidths that tables show, in bits a second."""

FORMULA = "total seconds = measured computation + 8 x bytes on the link / bandwidth (bits a second)"


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[bool]:
    """Return for each point whether none is at least as good in both (lower cost, higher gain) and better in one.

    Points that are equal in both stand on the front together.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i]))
    front = [False] * len(costs)
    best, best_cost = float("-inf"), float("nan")
    for i in order:
        if gains[i] > best:
            best, best_cost = gains[i], costs[i]
        front[i] = gains[i] == best and costs[i] == best_cost
    return front


def seconds_on_link(computation_s: float, nbytes: float, bits_per_s: float) -> float:
    """Return `FORMULA`."""
    return computation_s + 8 * nbytes / bits_per_s
