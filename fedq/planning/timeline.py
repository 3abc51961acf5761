"""How long a step takes when computation and exchange share processors and time.

Two things go on at each rank: the computation, which makes buckets ready, and a lane that exchanges them one after
another. Where both want more than the node's processors have, both slow down in proportion (processor sharing). All
ranks are taken to do the same at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedq.planning.cluster import Level
from fedq.planning.network import Work

_STEPS = 4
"""Number of steps that are played: what a link saved up in one may be used in the next."""


@dataclass(frozen=True)
class Played:
    """A step.

    Args:
        seconds: Seconds from the step's begin to its end.
        exposed_s: Seconds that the step takes above its computation alone.
        hidden_s: Seconds that the exchange takes by itself, less those that are exposed.
    """

    seconds: float
    exposed_s: float
    hidden_s: float


class TokenBucket:
    """What a link that was at rest lets pass at once, for each direction of a rank's link.

    Args:
        level: Level that gives rate and burst.
    """

    def __init__(self, level: Level) -> None:
        self._level = level
        self._tokens = [0.0, 0.0]
        self._at = 0.0

    def begin(self, work: Work, now: float) -> float:
        """Return the seconds of a work that begins now."""
        self._advance(now, (0.0, 0.0))
        level, most = self._level, max(work.wire_bytes, *work.in_and_out)
        saved_s = max(0.0, 1 / level.bandwidth - 1 / level.burst_bandwidth)
        seconds = []
        for nbytes, tokens in zip(work.in_and_out, self._tokens, strict=True):
            quick = min(tokens, nbytes)
            seconds.append(max(nbytes / level.burst_bandwidth, work.seconds * nbytes / most - quick * saved_s))
        return max(level.latency_s, *seconds)

    def end(self, work: Work, now: float) -> None:
        """Note that a work has ended."""
        self._advance(now, work.in_and_out)

    def rewind(self, seconds: float) -> None:
        """Let the next step begin at time 0."""
        self._at -= seconds

    def _advance(self, now: float, used: tuple[float, float]) -> None:
        level, elapsed = self._level, now - self._at
        for side, nbytes in enumerate(used):
            tokens = self._tokens[side] + level.bandwidth * elapsed - nbytes
            self._tokens[side] = min(level.burst_bytes, max(0.0, tokens))
        self._at = now


def play(compute: Work, buckets: Sequence[tuple[float, Sequence[Work]]]) -> Played:
    """Play steps until they repeat.

    Args:
        compute: Computation of a step.
        buckets: For each bucket the seconds of computation after which it is ready, rising, and its works in order.
    """
    jobs = [(ready, work) for ready, works in buckets for work in works if work.seconds > 0]
    level = next((work.burst for _, work in jobs if work.burst), None)
    if level is None:
        return _play_once(compute, jobs, None)
    bucket = TokenBucket(level)
    for _ in range(_STEPS):
        played = _play_once(compute, jobs, bucket)
        bucket.rewind(played.seconds)
    return played


def _play_once(compute: Work, jobs: Sequence[tuple[float, Work]], bucket: TokenBucket | None) -> Played:
    """Play one step."""
    now = done = lane_s = 0.0
    queue = list(reversed(jobs))
    current: Work | None = None
    left = 0.0
    while done < compute.seconds or queue or current:
        if current is None and queue and done >= queue[-1][0]:
            current = queue.pop()[1]
            left = bucket.begin(current, now) if bucket and current.burst else current.seconds
            lane_s += left
        next_stop = min(compute.seconds, queue[-1][0]) if queue and current is None else compute.seconds
        runs = done < compute.seconds
        slow = max(1.0, compute.demand * runs + (current.demand if current else 0.0))
        advance = min([next_stop - done] * runs + [left] * (current is not None))
        now += advance * slow
        if runs:
            done = next_stop if next_stop - done <= advance else done + advance
        if current is not None:
            left -= advance
            if left <= 0:
                if bucket and current.burst:
                    bucket.end(current, now)
                current = None
    exposed = now - compute.seconds
    return Played(now, exposed, max(0.0, lane_s - exposed))
