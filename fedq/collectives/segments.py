"""How tensors that are averaged fall into segments, who owns which, and by which schedule they travel.

A segment is a run of one parameter, cut at places that depend on the parameter alone. Each is a payload of its own,
seeded by parameter and place, so its bytes depend neither on buckets nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from fedq.codecs import Codec
from fedq.codecs.dense import Cast
from fedq.errors import FieldError
from fedq.kernels import span_seed

SEGMENT = 1 << 18
"""Number of elements of a segment: a megabyte of float32, a multiple of every block up to it."""
SCHEDULES = ("reduce", "one_phase", "two_phase", "hierarchical")
_SMALL_NBYTES = 4096
"""Payloads up to this size are bound by latency: one trip with more bytes beats two."""


@dataclass(frozen=True)
class Segment:
    """A run of one parameter in a flat buffer.

    Args:
        start: Index of the segment's first element in the flat buffer.
        numel: Number of elements.
        param: Index of the parameter in its model.
        part: Index of the segment in the parameter.
        first: Codec of the first leg, from every rank to the owner.
        second: Codec of the second leg, from the owner to every rank.
        owner: Rank that averages the segment.
    """

    start: int
    numel: int
    param: int
    part: int
    first: Codec
    second: Codec
    owner: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Parameter and part: the segment's name, whatever buffer it lies in."""
        return self.param, self.part

    @property
    def slice(self) -> slice:
        """Its place in the flat buffer."""
        return slice(self.start, self.start + self.numel)

    @cached_property
    def nbytes(self) -> dict[str, int]:
        """Payload bytes by leg, worked out once: every step asks for them several times."""
        return {"first": self.first.payload_nbytes(self.numel), "second": self.second.payload_nbytes(self.numel)}

    def seed(self, seed: int) -> int:
        """Return the segment's seed in a message of this seed."""
        return span_seed(span_seed(seed, self.param), self.part)


def cut(numels: Sequence[int], codecs: Sequence[tuple[Codec, Codec]], params: Sequence[int]) -> list[Segment]:
    """Cut tensors that lie one after another in a flat buffer into segments.

    Args:
        numels: Number of elements of each tensor; empty ones have no segment.
        codecs: Codecs of each tensor's first and second leg, of fixed size.
        params: Index of each tensor in its model.

    Raises:
        FieldError: The payload size of a codec depends on the values.
    """
    segments = []
    offsets = accumulate(numels, initial=0)
    for numel, (first, second), param, offset in zip(numels, codecs, params, offsets, strict=False):
        for codec in (first, second):
            check_fixed_size(codec, codec.spec)
        for part, start in enumerate(range(0, numel, SEGMENT)):
            segments.append(Segment(offset + start, min(SEGMENT, numel - start), param, part, first, second))
    return segments


def check_fixed_size(codec: Codec, spec: str) -> None:
    """Refuse a codec, named as it was given, whose payload size depends on the values.

    Raises:
        FieldError: The codec's payload size depends on the values.
    """
    if not codec.fixed_size:
        raise FieldError("codec", spec, "a codec of fixed payload size, such as topk or blocktopk")


def assign_owners(segments: Sequence[Segment], world_size: int) -> list[Segment]:
    """Give each segment, in order, to the rank that owns the fewest payload bytes so far.

    Done once for a whole model, so that an owner, and with it the residual that it keeps, does not change with DDP's
    buckets; neighbours go to different ranks, so every bucket is shared out.
    """
    owned, result = [0] * world_size, []
    for segment in segments:
        owner = owned.index(min(owned))
        owned[owner] += segment.nbytes["second"]
        result.append(replace(segment, owner=owner))
    return result


def choose_schedule(schedule: str, segments: Sequence[Segment], world_size: int, ranks_per_node: int) -> str:
    """Resolve ``auto`` and check the others.

    ``auto``: ``reduce`` for plain casts, otherwise ``one_phase`` for two ranks or tiny payloads, ``hierarchical`` for
    several nodes with several ranks each, and ``two_phase`` for the rest.

    Raises:
        FieldError: The schedule is unknown, or these codecs or ranks cannot have it.
    """
    if schedule not in ("auto", *SCHEDULES):
        raise FieldError("schedule", schedule, f"auto, {', '.join(SCHEDULES)}")
    nodes = world_size / ranks_per_node
    if schedule == "hierarchical" and (nodes != int(nodes) or ranks_per_node < 2 or nodes < 2):
        allowed = (
            f"two nodes or more of equally many ranks, two or more (here {world_size} ranks, {ranks_per_node} a node)"
        )
        raise FieldError("schedule", schedule, allowed)
    if schedule == "reduce" and not all(s.first.reducible for s in segments):
        raise FieldError("schedule", schedule, "another than reduce unless payloads can be summed (fp32, bf16, randk)")
    if schedule != "auto":
        return schedule
    if all(isinstance(s.first, Cast) for s in segments):
        return "reduce"
    if world_size <= 2 or sum(s.nbytes["first"] for s in segments) <= _SMALL_NBYTES:
        return "one_phase"
    return "hierarchical" if nodes == int(nodes) and ranks_per_node > 1 and nodes > 1 else "two_phase"
