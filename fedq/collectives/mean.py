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
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fedq.codecs import Codec, Payload, codec
from fedq.codecs.dense import Cast
from fedq.collectives.peers import Peers
from fedq.collectives.segments import Segment, assign_owners, choose_schedule, cut
from fedq.kernels import derive_seed
from fedq.layout import as_real
from fedq.phases import PhaseTimer, Timer

Key = tuple[int, int]
Leg = Literal["first", "second"]
_TWO_LEGS = ("two_phase", "hierarchical")
_SMALL = 4096
"""Largest number of elements of a cast that travels together with others, at the cost of a copy."""


@dataclass
class Residuals:
    """What the two legs lost, float32, by parameter and segment; made when they are first needed.

    Args:
        first: Residuals of this rank's own tensors (``hierarchical``: of its node's mean, where this rank owns it).
        second: Residuals of the means that this rank owns.
    """

    first: dict[Key, Tensor] = field(default_factory=dict)
    second: dict[Key, Tensor] = field(default_factory=dict)

    def of(self, leg: Leg, segment: Segment, device: torch.device) -> Tensor:
        """Return a leg's residual of a segment, zeros if there is none yet."""
        kept, key = self.first if leg == "first" else self.second, segment.key
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
        x: A tensor of any shape, floating point or complex, the same shape on all ranks. It is not changed.
        spec: Codec of the first leg, of fixed payload size.
        second: Codec of the second leg; default: the same.
        schedule: ``auto``, ``reduce``, ``one_phase``, ``two_phase`` or ``hierarchical``.
        seed: Seed, the same on all ranks, another one in each call.
        residuals: Error feedback; give the same object in each call for the same tensor. None: no error feedback.
        group: The process group. Default: all ranks.
        ranks_per_node: Number of consecutive ranks that share a node.

    Raises:
        FieldError: The schedule or a codec is unknown or does not fit.
    """
    codecs = (codec(spec), codec(spec if second is None else second))
    first, other = (c.resolved(feedback=residuals is not None) for c in codecs)
    peers = Peers(group)
    real = as_real(x.detach())
    segments = assign_owners(cut([real.numel()], [(first, other)], [0]), peers.size)
    exchange = MeanExchange(segments, peers, schedule=schedule, ranks_per_node=ranks_per_node)
    flat = real.reshape(-1).to(torch.float32, copy=True)
    exchange.run(flat, seed=seed, residuals=residuals)
    mean = flat.view(real.shape).to(real.dtype)
    return torch.view_as_complex(mean) if x.is_complex() else mean


class MeanExchange:
    """Averages flat buffers of one layout; stateless but for the count of what it sent.

    Args:
        segments: Segments of the flat buffer, in order, with their owners.
        peers: The ranks that take part.
        schedule: Name of the schedule, as in `compressed_mean`.
        ranks_per_node: Number of consecutive ranks that share a node.
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
        self.timer: Timer = PhaseTimer()
        """Timer that is told how long each part of a run takes."""
        self.numel = sum(segment.numel for segment in self.segments)
        """Number of elements of the flat buffer."""
        self._ranks_per_node = ranks_per_node

    def run(self, flat: Tensor, *, seed: int, residuals: Residuals | None = None) -> None:
        """Replace a flat buffer by its mean over all ranks.

        Args:
            flat: The flat buffer: contiguous, floating point, the same layout on all ranks.
            seed: Seed, the same on all ranks, another one in each call.
            residuals: Error feedback of both legs; None: no error feedback.
        """
        if self.peers.size == 1 or not self.segments:
            return
        {
            "reduce": self._reduce,
            "one_phase": self._one_phase,
            "two_phase": self._two_phase,
            "hierarchical": self._hierarchical,
        }[self.schedule](flat, seed, residuals)

    def with_residual(self, leg: Leg) -> list[Segment]:
        """Return the segments of which this rank keeps a residual on a leg, where there is error feedback."""
        segments = [s for s in self.segments if _codec_of(s, leg).wants_feedback]
        if self.schedule == "hierarchical" and leg == "first":
            return [s for s in segments if (s.owner - self.peers.rank) % self._ranks_per_node == 0]
        if leg == "first":
            return segments
        return [s for s in segments if s.owner == self.peers.rank] if self.schedule in _TWO_LEGS else []

    # ---- schedules -----------------------------------------------------------------------------------------------

    def _reduce(self, flat: Tensor, seed: int, residuals: Residuals | None) -> None:
        """Sum values on the way. Casts of one type go as one buffer, divided before the cast; others by payload."""
        kinds = {s.first for s in self.segments}
        whole = next(iter(kinds)) if len(kinds) == 1 else None
        if isinstance(whole, Cast):
            with self.timer.phase("encode"):
                values = flat.mul_(1.0 / self.peers.size).to(_value_type(whole))
            self.sent.first += self._all_reduce(values)
            with self.timer.phase("decode"):
                flat.copy_(values)
            return
        flat.mul_(1.0 / self.peers.size)
        first_seed = shared_seed(seed, "first")
        buffer = self._encode(self.segments, "first", flat, first_seed, residuals)
        parts = _parts(self.segments, "first")
        for part, data in zip(parts, _cut(parts, "first", buffer), strict=True):
            self.sent.first += self._all_reduce(data.view(_value_type(part[0].first)))
        self._decode(self.segments, "first", buffer, first_seed, flat)

    def _one_phase(self, flat: Tensor, seed: int, residuals: Residuals | None) -> None:
        size, rank = self.peers.size, self.peers.rank
        own = self._encode(self.segments, "first", flat, rank_seed(seed, "first", rank), residuals)
        received = self._exchange(self.peers, [own] * size, [own.numel()] * size)
        self.sent.first += (size - 1) * own.numel()
        self._sum(self.segments, received, [rank_seed(seed, "first", r) for r in range(size)], flat)

    def _two_phase(self, flat: Tensor, seed: int, residuals: Residuals | None) -> None:
        peers = self.peers
        runs = [[s for s in self.segments if s.owner == rank] for rank in range(peers.size)]
        mine = self._owned_means(runs, peers, flat, seed, residuals)
        received = self._exchange(peers, [mine] * peers.size, [_nbytes(run, "second") for run in runs])
        self.sent.second += (peers.size - 1) * mine.numel()
        for run, data in zip(runs, received, strict=True):
            self._decode_means(run, data, seed, flat)

    def _hierarchical(self, flat: Tensor, seed: int, residuals: Residuals | None) -> None:
        """Average inside the node, exchange each rank's part with its likes on other nodes, share the bytes inside."""
        node, across = self.peers.split(self._ranks_per_node)
        parts = [[s for s in self.segments if s.owner % node.size == place] for place in range(node.size)]
        runs = [[[s for s in part if s.owner // node.size == n] for n in range(across.size)] for part in parts]
        self._inside_mean(parts, node, flat)
        own = self._owned_means(runs[node.rank], across, flat, seed, residuals)
        sizes = [_nbytes(run, "second") for run in runs[node.rank]]
        part = torch.cat(self._exchange(across, [own] * across.size, sizes))
        received = self._exchange(node, [part] * node.size, [_nbytes(segments, "second") for segments in parts])
        self.sent.second += (across.size - 1) * own.numel() + (node.size - 1) * part.numel()
        for data, by_node in zip(received, runs, strict=True):
            for run, message in zip(by_node, data.split([_nbytes(run, "second") for run in by_node]), strict=True):
                self._decode_means(run, message, seed, flat)

    # ---- steps of schedules --------------------------------------------------------------------------------------

    def _owned_means(
        self, runs: Sequence[Sequence[Segment]], peers: Peers, flat: Tensor, seed: int, residuals: Residuals | None
    ) -> Tensor:
        """Send every peer the segments that it owns, average those received, and return their second-leg payload."""
        self._average_owned(runs, peers, flat, [rank_seed(seed, "first", r) for r in peers.members], residuals)
        return self._encode(runs[peers.rank], "second", flat, rank_seed(seed, "second", self.peers.rank), residuals)

    def _decode_means(self, run: Sequence[Segment], data: Tensor, seed: int, flat: Tensor) -> None:
        """Write the means that one owner sent."""
        if run:
            self._decode(run, "second", data, rank_seed(seed, "second", run[0].owner), flat)

    def _inside_mean(self, parts: Sequence[Sequence[Segment]], node: Peers, flat: Tensor) -> None:
        """Average inside a node, each rank its part, in the codec of the node's inside."""
        plain = [[replace(segment, first=self.inside) for segment in part] for part in parts]
        self._average_owned(plain, node, flat, [0] * node.size, None)

    def _average_owned(
        self,
        runs: Sequence[Sequence[Segment]],
        peers: Peers,
        flat: Tensor,
        seeds: Sequence[int],
        residuals: Residuals | None,
    ) -> None:
        """Send every peer its run of segments, in the first leg's codecs, and average those received for one's own."""
        sends = [self._encode(run, "first", flat, seeds[peers.rank], residuals) for run in runs]
        received = self._exchange(peers, sends, [sends[peers.rank].numel()] * peers.size)
        self.sent.first += sum(send.numel() for r, send in enumerate(sends) if r != peers.rank)
        self._sum(runs[peers.rank], received, seeds, flat)

    def _sum(self, segments: Sequence[Segment], buffers: Sequence[Tensor], seeds: Sequence[int], flat: Tensor) -> None:
        """Write the mean of every rank's payload of these segments, in rank order."""
        with self.timer.phase("decode"):
            parts, weights = _parts(segments, "first"), [1.0 / len(buffers)] * len(buffers)
            for part, *datas in zip(parts, *(_cut(parts, "first", buffer) for buffer in buffers), strict=True):
                payloads = [_payload(part, "first", data, seed) for data, seed in zip(datas, seeds, strict=True)]
                in_place = len(part) == 1 and flat.dtype == torch.float32
                total = flat[part[0].slice] if in_place else torch.empty(payloads[0].shape, device=flat.device)
                part[0].first.decode_sum(payloads, weights, total)
                if not in_place:
                    _scatter(total, part, flat)

    def _decode(self, segments: Sequence[Segment], leg: Leg, buffer: Tensor, seed: int, flat: Tensor) -> None:
        """Write what one message's payloads decode to."""
        with self.timer.phase("decode"):
            parts = _parts(segments, leg)
            for part, data in zip(parts, _cut(parts, leg, buffer), strict=True):
                _scatter(_payload(part, leg, data, seed).decode(), part, flat)

    # ---- timed -------------------------------------------------------------------------------------------------------

    def _encode(
        self, segments: Sequence[Segment], leg: Leg, flat: Tensor, seed: int, residuals: Residuals | None
    ) -> Tensor:
        with self.timer.phase("encode"):
            return encode(segments, leg, flat, seed, residuals)

    def _exchange(self, peers: Peers, sends: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        with self.timer.phase("exchange"):
            return peers.exchange(sends, sizes)

    def _all_reduce(self, values: Tensor) -> int:
        with self.timer.phase("exchange"):
            return self.peers.all_reduce(values)


def encode(segments: Sequence[Segment], leg: Leg, flat: Tensor, seed: int, residuals: Residuals | None) -> Tensor:
    """Return the payloads of segments, one after another in one uint8 buffer.

    Args:
        segments: Segments to encode.
        leg: Leg whose codecs encode them: ``first`` or ``second``.
        flat: The flat buffer that holds the segments.
        seed: Seed of the message.
        residuals: Error feedback, replaced in place and begun where there is none; None: encode and forget. A segment
            of zeros travels as zeros and leaves its residual alone: nobody may apply it (a branch without a gradient
            on any rank has none after DDP either), so it waits for the next value.
    """
    buffer = torch.empty(_nbytes(segments, leg), dtype=torch.uint8, device=flat.device)
    parts = _parts(segments, leg)
    for part, out in zip(parts, _cut(parts, leg, buffer), strict=True):
        segment, chosen = part[0], _codec_of(part[0], leg)
        x = flat[segment.slice] if len(part) == 1 else torch.cat([flat[s.slice] for s in part])
        own_seed = segment.seed(seed)
        if residuals is None or not chosen.wants_feedback:
            chosen.encode(x, seed=own_seed, out=out)
        elif x.device.type != "cpu":
            encode_unless_zero(chosen, x, residuals.of(leg, segment, x.device), seed=own_seed, out=out)
        elif is_zero(x):
            chosen.encode(x, seed=own_seed, out=out)
        else:
            chosen.encode_with_residual(x, residuals.of(leg, segment, x.device), seed=own_seed, out=out)
    return buffer


def is_zero(x: Tensor) -> bool:
    """Return whether a flat tensor on the CPU has zeros only; mostly its first element tells."""
    if not x.numel() or x[0].item():
        return not x.numel()
    return not (x.numpy().any() if x.dtype in (torch.float32, torch.float64) else x.any())


def encode_unless_zero(chosen: Codec, x: Tensor, residual: Tensor, *, seed: int, out: Tensor) -> None:
    """Encode ``x + residual`` as `Codec.encode_with_residual` does, zeros if ``x`` is zero; nothing waits for a GPU."""
    old, has_values = residual.clone(), x.any()
    residual.mul_(has_values)
    chosen.encode_with_residual(x, residual, seed=seed, out=out)
    residual.copy_(torch.where(has_values, residual, old))


def _parts(segments: Sequence[Segment], leg: Leg) -> list[list[Segment]]:
    """Return the segments in the order in which they travel, those together that are one payload.

    Small casts (biases, normalisation: two of three tensors of a network) come first and together: they need neither
    seed nor residual, so their bytes are the same, and a call of a kernel costs more than they do.
    """
    casts = [s for s in segments if s.numel <= _SMALL and isinstance(_codec_of(s, leg), Cast)]
    together = [s for s in casts if _codec_of(s, leg) == _codec_of(casts[0], leg)]
    keys = {segment.key for segment in together}
    return [*([together] if together else []), *([s] for s in segments if s.key not in keys)]


def _cut(parts: Sequence[Sequence[Segment]], leg: Leg, buffer: Tensor) -> Sequence[Tensor]:
    """Return each part's bytes of a message."""
    return buffer.split([_nbytes(part, leg) for part in parts]) if parts else []


def _payload(part: Sequence[Segment], leg: Leg, data: Tensor, seed: int) -> Payload:
    numel = sum(segment.numel for segment in part)
    return Payload(data, _codec_of(part[0], leg), (numel,), torch.float32, part[0].seed(seed))


def _scatter(values: Tensor, part: Sequence[Segment], flat: Tensor) -> None:
    """Write a part's values to the places of its segments."""
    for segment, own in zip(part, values.split([segment.numel for segment in part]), strict=True):
        flat[segment.slice] = own


def shared_seed(seed: int, leg: Leg) -> int:
    """Return a leg's seed whose noise is the same on all ranks."""
    return derive_seed(seed, leg)


def rank_seed(seed: int, leg: Leg, rank: int) -> int:
    """Return a leg's seed for one rank: rotation and index choice shared, rounding noise its own."""
    return derive_seed(seed, leg) | derive_seed(seed, leg, "noise", rank) << 32


def _codec_of(segment: Segment, leg: Leg) -> Codec:
    return segment.first if leg == "first" else segment.second


def _nbytes(segments: Sequence[Segment], leg: Leg) -> int:
    return sum(s.nbytes[leg] for s in segments)


def _value_type(chosen: Codec) -> torch.dtype:
    """Return the type of a reducible codec's values."""
    by_name: Mapping[object, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if isinstance(chosen, Cast):
        return by_name[chosen.dtype]
    return torch.float32 if getattr(chosen, "bits", 32) == 32 else torch.bfloat16
