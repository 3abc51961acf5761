"""The mean of a tensor over all ranks, sent in few bits; every rank ends with the same bits.

Whatever the schedule, sums run in rank order over decoded payloads, a rank's own included, so the result is that of one
process that decodes all payloads. Egress of a rank, for W ranks and payloads of P bytes:

| schedule | legs | bytes |
|---|---|---|
| ``reduce`` | a plain all-reduce of values | 2(W-1)/W · P |
| ``one_phase`` | every rank sends its payload to every other | (W-1) · P |
| ``two_phase`` | to each segment's owner; the owner's coded mean to all | (W-1)/W · (P1 + P2) |
| ``hierarchical`` | inside a node in full precision; ``two_phase`` across nodes; its bytes again inside the node | |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fedq.codecs import Codec, Payload, codec
from fedq.codecs.dense import Cast
from fedq.collectives.peers import Peers
from fedq.collectives.segments import Segment, choose_schedule, cut, owners
from fedq.kernels import derive_seed

Key = tuple[int, int]
Leg = Literal["first", "second"]


@dataclass
class Residuals:
    """What the two legs lost, float32, by parameter and segment; made when they are first needed.

    Args:
        first: Of this rank's own tensors (with ``hierarchical``: of its node's mean, where this rank owns it).
        second: Of the means that this rank owns.
    """

    first: dict[Key, Tensor] = field(default_factory=dict)
    second: dict[Key, Tensor] = field(default_factory=dict)

    def of(self, leg: Leg, segment: Segment, device: torch.device) -> Tensor:
        """Return a leg's residual of a segment, zeros if there is none yet."""
        kept, key = self.first if leg == "first" else self.second, (segment.param, segment.part)
        if key not in kept:
            kept[key] = torch.zeros(segment.numel, device=device)
        return kept[key]


@dataclass
class Sent:
    """Bytes that this rank handed to the process group, by leg; for ``reduce`` what a ring moves."""

    first: int = 0
    second: int = 0


def compressed_mean(
    x: Tensor,
    spec: str | Codec = "int4",
    *,
    second: str | Codec | None = None,
    schedule: str = "auto",
    seed: int = 0,
    residuals: Residuals | None = None,
    group: dist.ProcessGroup | None = None,
    ranks_per_node: int = 1,
) -> Tensor:
    """Return the mean of ``x`` over all ranks; every rank gets the same bits. Every rank must call it.

    Args:
        x: Any shape, floating point, the same on all ranks. Not changed.
        spec: Codec of the first leg, of fixed payload size.
        second: Codec of the second leg; default: the same.
        schedule: ``auto``, ``reduce``, ``one_phase``, ``two_phase`` or ``hierarchical``.
        seed: The same on all ranks, another in each call.
        residuals: Error feedback; give the same object in each call for the same tensor.
        group: Default: all ranks.
        ranks_per_node: Consecutive ranks that share a node.

    Raises:
        FieldError: A schedule or codec that is unknown or does not fit.
    """
    codecs = (codec(spec), codec(spec if second is None else second))
    first, other = (c.resolved(feedback=residuals is not None) for c in codecs)
    segments = cut([x.numel()], [(first, other)], [0])
    exchange = MeanExchange(segments, Peers(group), schedule=schedule, ranks_per_node=ranks_per_node)
    flat = x.detach().reshape(-1).to(torch.float32, copy=True)
    exchange.run(flat, seed=seed, residuals=residuals)
    return flat.view(x.shape).to(x.dtype)


class MeanExchange:
    """Averages flat buffers of one layout; stateless but for the count of what it sent.

    Args:
        segments: Of the flat buffer, in order.
        peers: The ranks that take part.
        schedule: As in `compressed_mean`.
        ranks_per_node: Consecutive ranks that share a node.
        inside: Codec inside a node, for ``hierarchical``.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        peers: Peers,
        *,
        schedule: str = "auto",
        ranks_per_node: int = 1,
        inside: str | Codec = "fp32",
    ) -> None:
        self.segments = list(segments)
        self.peers = peers
        self.schedule = choose_schedule(schedule, segments, peers.size, ranks_per_node)
        self.inside = codec(inside)
        self.sent = Sent()
        self._ranks_per_node = ranks_per_node

    def run(self, flat: Tensor, *, seed: int, residuals: Residuals | None = None) -> None:
        """Replace a flat buffer by its mean over all ranks.

        Args:
            flat: Contiguous, floating point, the same layout on all ranks.
            seed: The same on all ranks, another in each call.
            residuals: Error feedback of both legs.
        """
        if self.peers.size == 1 or not self.segments:
            return
        {
            "reduce": self._reduce,
            "one_phase": self._one_phase,
            "two_phase": self._two_phase,
            "hierarchical": self._hierarchical,
        }[self.schedule](flat, seed, residuals)

    # ---- schedules -----------------------------------------------------------------------------------------------

    def _reduce(self, flat: Tensor, seed: int, residuals: Residuals | None) -> None:
        """Sum values on the way. Casts of one type go as one buffer, divided before the cast; others by payload."""
        flat.mul_(1.0 / self.peers.size)
        kinds = {s.first for s in self.segments}
        whole = next(iter(kinds)) if len(kinds) == 1 else None
        if isinstance(whole, Cast):
            values = flat.to(_value_type(whole))
            self.sent.first += self.peers.all_reduce(values)
            flat.copy_(values)
            return
        first_seed = shared_seed(seed, "first")
        buffer = encode(self.segments, "first", flat, first_seed, residuals)
        for segment, data in self._pieces(self.segments, "first", buffer):
            self.sent.first += self.peers.all_reduce(data.view(_value_type(segment.first)))
        self._decode(self.segments, "first", buffer, [first_seed] * len(self.segments), flat)

    def _one_phase(self, flat: Tensor, seed: int, residuals: Residuals | None) -> None:
        size, rank = self.peers.size, self.peers.rank
        own = encode(self.segments, "first", flat, rank_seed(seed, "first", rank), residuals)
        received = self.peers.exchange([own] * size, [own.numel()] * size)
        self.sent.first += (size - 1) * own.numel()
        self._sum(self.segments, received, [rank_seed(seed, "first", r) for r in range(size)], flat)

    def _two_phase(self, flat: Tensor, seed: int, residuals: Residuals | None) -> None:
        runs = owners(self.segments, self.peers.size)
        mine = self._owned_means(self.segments, runs, self.peers, flat, seed, residuals)
        sizes = [_nbytes([self.segments[i] for i in run], "second") for run in runs]
        received = self.peers.exchange([mine] * self.peers.size, sizes)
        self.sent.second += (self.peers.size - 1) * mine.numel()
        for owner, run in enumerate(runs):
            segments = [self.segments[i] for i in run]
            self._decode(segments, "second", received[owner], [rank_seed(seed, "second", owner)] * len(segments), flat)

    def _hierarchical(self, flat: Tensor, seed: int, residuals: Residuals | None) -> None:
        """Average inside the node, exchange each rank's part with its likes on other nodes, share the bytes inside."""
        node, across = self.peers.split(self._ranks_per_node)
        parts = owners(self.segments, node.size)
        self._inside_mean(parts, node, flat)
        mine = [self.segments[i] for i in parts[node.rank]]
        runs = owners(mine, across.size)
        own = self._owned_means(mine, runs, across, flat, seed, residuals)
        sizes = [_nbytes([mine[i] for i in run], "second") for run in runs]
        part = torch.cat(across.exchange([own] * across.size, sizes))
        self.sent.second += (across.size - 1) * own.numel()
        sizes = [_nbytes([self.segments[i] for i in run], "second") for run in parts]
        received = node.exchange([part] * node.size, sizes)
        self.sent.second += (node.size - 1) * part.numel()
        for data, run in zip(received, parts, strict=True):
            segments = [self.segments[i] for i in run]
            owner = {i: r for r, span in enumerate(owners(segments, across.size)) for i in span}
            seeds = [rank_seed(seed, "second", owner[i]) for i in range(len(segments))]
            self._decode(segments, "second", data, seeds, flat)

    # ---- steps of schedules --------------------------------------------------------------------------------------

    def _owned_means(
        self,
        segments: Sequence[Segment],
        runs: Sequence[range],
        peers: Peers,
        flat: Tensor,
        seed: int,
        residuals: Residuals | None,
    ) -> Tensor:
        """Send every rank the segments that it owns, average those received, and return their second-leg payload."""
        first = rank_seed(seed, "first", self.peers.rank)
        sends = [encode([segments[i] for i in run], "first", flat, first, residuals) for run in runs]
        mine = [segments[i] for i in runs[peers.rank]]
        received = peers.exchange(sends, [sends[peers.rank].numel()] * peers.size)
        self.sent.first += sum(send.numel() for r, send in enumerate(sends) if r != peers.rank)
        self._sum(mine, received, [rank_seed(seed, "first", r) for r in peers.members], flat)
        return encode(mine, "second", flat, rank_seed(seed, "second", peers.rank), residuals)

    def _inside_mean(self, parts: Sequence[range], node: Peers, flat: Tensor) -> None:
        """Average inside a node, each rank its part, in the codec of the node's inside."""
        plain = [Segment(s.start, s.numel, s.param, s.part, self.inside, self.inside) for s in self.segments]
        sends = [encode([plain[i] for i in run], "first", flat, 0, None) for run in parts]
        received = node.exchange(sends, [sends[node.rank].numel()] * node.size)
        self.sent.first += sum(send.numel() for r, send in enumerate(sends) if r != node.rank)
        self._sum([plain[i] for i in parts[node.rank]], received, [0] * node.size, flat)

    def _sum(self, segments: Sequence[Segment], buffers: Sequence[Tensor], seeds: Sequence[int], flat: Tensor) -> None:
        """Write the mean of every rank's payload of these segments, in rank order."""
        pieces = [self._pieces(segments, "first", buffer) for buffer in buffers]
        for copies in zip(*pieces, strict=True):
            segment = copies[0][0]
            total = torch.zeros(segment.numel, device=flat.device)
            for (_, data), seed in zip(copies, seeds, strict=True):
                payload = Payload(data, segment.first, (segment.numel,), torch.float32, segment.seed(seed))
                segment.first.decode_add(payload, total, 1.0 / len(buffers))
            flat[segment.slice] = total

    def _decode(
        self, segments: Sequence[Segment], leg: Leg, buffer: Tensor, seeds: Sequence[int], flat: Tensor
    ) -> None:
        for (segment, data), seed in zip(self._pieces(segments, leg, buffer), seeds, strict=True):
            payload = Payload(data, getattr(segment, leg), (segment.numel,), torch.float32, segment.seed(seed))
            flat[segment.slice] = payload.decode()

    @staticmethod
    def _pieces(segments: Sequence[Segment], leg: Leg, buffer: Tensor) -> list[tuple[Segment, Tensor]]:
        sizes = [getattr(segment, leg).payload_nbytes(segment.numel) for segment in segments]
        return list(zip(segments, buffer.split(sizes), strict=True)) if segments else []


def encode(segments: Sequence[Segment], leg: Leg, flat: Tensor, seed: int, residuals: Residuals | None) -> Tensor:
    """Return the payloads of segments, one after another in one uint8 buffer.

    Args:
        segments: What to encode.
        leg: ``first`` or ``second``: which of the segments' codecs.
        flat: The buffer they lie in.
        seed: Seed of the message.
        residuals: Error feedback, replaced in place and begun where there is none; None: encode and forget.
    """
    buffer = torch.empty(_nbytes(segments, leg), dtype=torch.uint8, device=flat.device)
    at = 0
    for segment in segments:
        chosen: Codec = getattr(segment, leg)
        size = chosen.payload_nbytes(segment.numel)
        x, out, seed_of = flat[segment.slice], buffer[at : at + size], segment.seed(seed)
        if residuals is None or not chosen.wants_feedback:
            chosen.encode(x, seed=seed_of, out=out)
        else:
            chosen.encode_with_residual(x, residuals.of(leg, segment, flat.device), seed=seed_of, out=out)
        at += size
    return buffer


def shared_seed(seed: int, leg: Leg) -> int:
    """Return a leg's seed whose noise is the same on all ranks."""
    return derive_seed(seed, leg)


def rank_seed(seed: int, leg: Leg, rank: int) -> int:
    """Return a leg's seed for one rank: rotation and index choice shared, rounding noise its own."""
    return derive_seed(seed, leg) | derive_seed(seed, leg, "noise", rank) << 32


def _nbytes(segments: Sequence[Segment], leg: Leg) -> int:
    return sum(getattr(s, leg).payload_nbytes(s.numel) for s in segments)


def _value_type(chosen: Codec) -> torch.dtype:
    """Return the type of a reducible codec's values."""
    by_name: Mapping[object, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if isinstance(chosen, Cast):
        return by_name[chosen.dtype]
    return torch.float32 if getattr(chosen, "bits", 32) == 32 else torch.bfloat16
