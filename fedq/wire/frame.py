"""The frame that ranks of one job exchange: a header of fixed size in front of the payload bytes.

Everything a receiver needs beyond the shared `Layout` is in the header: who, when, with what weight, from which
seed. No pickle; sizes are checked before anything is decoded. How a frame travels is not decided here; between parties
that share no layout, or do not trust each other, it travels inside a `fedq.wire.Message`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from fedq.codecs import Payload
from fedq.errors import FieldError
from fedq.layout import Layout, end_to_end

MAGIC = b"FQ"
VERSION = 1
_HEADER = struct.Struct("<2sBBIIQQdffQ")
HEADER_NBYTES = _HEADER.size
"""Size of the header in bytes: 52."""


class Kind(IntEnum):
    """What a frame carries."""

    UPDATE = 1
    """A client's update."""
    LEFT_OUT = 2
    """No update: the client's values were not finite; the body is empty."""
    CHANGE = 3
    """The server's change to the replica."""
    FAILED = 4
    """No update: the client's training raised; the body is the error's text in UTF-8."""
    MODEL = 5
    """The whole model, for a newcomer."""
    NOTE = 6
    """A control message: the body is a JSON object in UTF-8."""
    MISSING = 7
    """Never travels: a client that did not answer; the body is the reason in UTF-8."""

    @property
    def has_payloads(self) -> bool:
        """Whether the body is made of payloads."""
        return self in (Kind.UPDATE, Kind.CHANGE, Kind.MODEL)


@dataclass(frozen=True)
class Frame:
    """One message.

    Args:
        kind: Kind of the message.
        round: Round number, from 0.
        client: Client number, or 2^32 - 1 for the server.
        layout_hash: `Layout.hash` of the sender.
        seed: Message seed; a span's seed follows from it.
        weight: Weight in the average, here the client's number of examples.
        loss: Mean local training loss.
        accuracy: Local training accuracy, 0 to 1.
        body: uint8, the payloads one after another; in front of them 8 bytes of size for each span whose codec has
            no fixed size.
    """

    kind: Kind
    round: int
    client: int
    layout_hash: int
    seed: int
    weight: float
    loss: float
    accuracy: float
    body: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that travel, header included."""
        return HEADER_NBYTES + self.body.numel()

    def header(self) -> Tensor:
        """Return the header, uint8 [`HEADER_NBYTES`], on the body's device."""
        head = _HEADER.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.round,
            self.client,
            self.layout_hash,
            self.seed,
            self.weight,
            self.loss,
            self.accuracy,
            self.body.numel(),
        )
        return torch.frombuffer(bytearray(head), dtype=torch.uint8).to(self.body.device)

    def pack(self) -> Tensor:
        """Return the whole message as one uint8 tensor, on the body's device."""
        return torch.cat((self.header(), self.body))

    @classmethod
    def unpack(cls, message: Tensor) -> Frame:
        """Read a message; the body is a view of it.

        Raises:
            FieldError: The message is no frame, of another version or cut short, or its weight cannot be averaged with.
        """
        if message.numel() < HEADER_NBYTES:
            raise FieldError("frame bytes", message.numel(), f"at least {HEADER_NBYTES}")
        return cls.of(message[:HEADER_NBYTES], message[HEADER_NBYTES:])

    @classmethod
    def of(cls, header: Tensor, body: Tensor) -> Frame:
        """Put a header and the body that came with it together.

        Raises:
            FieldError: The header or the weight cannot be used, as for `unpack`.
        """
        head = header.cpu().numpy().tobytes()
        magic, version, kind, number, client, layout_hash, seed, weight, loss, accuracy, nbytes = _HEADER.unpack(head)
        if magic != MAGIC or version != VERSION:
            raise FieldError("frame version", (magic, version), f"({MAGIC!r}, {VERSION})")
        if kind not in set(Kind):
            raise FieldError("frame kind", kind, ", ".join(f"{k.value} ({k.name})" for k in Kind))
        if nbytes != body.numel():
            raise FieldError("frame body bytes", body.numel(), f"{nbytes}, as its header says")
        if not (math.isfinite(weight) and weight >= 0):
            raise FieldError("frame weight", weight, "a finite number of at least 0")
        return cls(Kind(kind), number, client, layout_hash, seed, weight, loss, accuracy, body)


def body_nbytes(header: Tensor) -> int:
    """Return the size of the body that a header announces."""
    return int(_HEADER.unpack(header.cpu().numpy().tobytes())[-1])


def join_payloads(layout: Layout, payloads: Sequence[Payload]) -> Tensor:
    """Return the body: sizes of the spans without a fixed size, then all payloads in layout order."""
    return join_body(layout, [payload.data for payload in payloads])


def join_body(layout: Layout, datas: Sequence[Tensor]) -> Tensor:
    """Return the body made of each span's bytes; empty, and on the CPU, for a layout without spans.

    What `Layout.encode` has put one after another already is not copied.

    Raises:
        FieldError: There are more or fewer buffers than spans.
    """
    layout.check_number(datas)
    sizes = [data.numel() for data, span in zip(datas, layout.spans, strict=True) if not span.codec.fixed_size]
    table = [torch.tensor(sizes, dtype=torch.int64, device=datas[0].device).view(torch.uint8)] if sizes else []
    parts = [*table, *datas]
    return end_to_end(parts) if parts else torch.empty(0, dtype=torch.uint8)


def split_body(layout: Layout, body: Tensor) -> list[Tensor]:
    """Undo `join_body`: return each span's bytes, as views.

    Raises:
        FieldError: The body has another size than the layout calls for.
    """
    sizes, start = layout.payload_nbytes, 0
    if sizes is None:
        start = 8 * sum(not span.codec.fixed_size for span in layout.spans)
        if body.numel() < start:
            raise FieldError("frame body bytes", body.numel(), f"at least {start}")
        table = iter(body[:start].clone().view(torch.int64).tolist())
        spans = layout.spans
        sizes = tuple(s.codec.payload_nbytes(s.shape) if s.codec.fixed_size else next(table) for s in spans)
    if min(sizes, default=0) < 0 or start + sum(sizes) != body.numel():
        raise FieldError("frame body bytes", body.numel(), f"{start + sum(sizes)} for this layout")
    return list(body[start:].split(list(sizes))) if sizes else []


def check_layout(frame: Frame, layout: Layout) -> None:
    """Raise `FieldError` unless sender and receiver have the same model and codecs."""
    if frame.layout_hash != layout.hash:
        allowed = f"{layout.hash:016x} (the same model and codecs on both sides)"
        raise FieldError("frame layout", f"{frame.layout_hash:016x}", allowed)
