"""The message that parties across a network exchange: a frame that describes itself, and how it travels in a stream.

A `Message` names its tensors, their shapes and their codecs, so a receiver needs no model to decode it. There is no
pickle anywhere; ``docs/wire_format.md`` is the specification. What a receiver refuses, it refuses with a `FieldError`
that names the field, the value and what is allowed, before anything is allocated for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedq.codecs import Payload
from fedq.errors import FieldError
from fedq.layout import Layout
from fedq.wire.crc32c import crc32c
from fedq.wire.frame import Frame, Kind, split_body
from fedq.wire.head import (
    FIXED,
    MAGIC,
    VERSION,
    Exact,
    Fixed,
    Head,
    announced_nbytes,
    exact_places,
    head_nbytes,
    pack_head,
    pack_layout,
    pack_tables,
    read_head,
)
from fedq.wire.limits import DEFAULT_LIMITS, Limits

SERVER = 2**32 - 1
"""Number that stands for the server where a client's number stands."""
_LONGEST_INTEGER = 20  # digits: any 64-bit integer; a longer one takes quadratic time to read


@dataclass(frozen=True, eq=False)
class Message:
    """A frame with everything that is needed to decode it.

    Args:
        frame: Kind, round, client, seed and the rest; its body holds the payloads, or the text of a note or an error.
        layout: Layout of the payloads, a whole one; None for kinds without payloads.
        sequence: Number of 64 bits: of the task that the message answers, or the sender's counter.
        exact: Tensors of any type by name that travel bit for bit beside the payloads.

    Raises:
        FieldError: Layout, exact tensors and kind contradict each other.
    """

    frame: Frame
    layout: Layout | None = None
    sequence: int = 0
    exact: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = self.frame.kind
        if kind.has_payloads != (self.layout is not None) or (self.exact and not kind.has_payloads):
            allowed = "a layout with payloads (UPDATE, CHANGE, MODEL), and neither layout nor exact tensors without"
            raise FieldError("message layout", (kind.name, self.layout is not None, len(self.exact)), allowed)
        if self.layout is not None and (self.layout.whole or self.layout.hash != self.frame.layout_hash):
            allowed = f"{self.layout.hash:016x}, that of the layout given, which is no part of another"
            raise FieldError("message layout", f"{self.frame.layout_hash:016x}", allowed)

    @property
    def nbytes(self) -> int:
        """Bytes that travel, all included; none for `Kind.MISSING`."""
        return 0 if self.frame.kind == Kind.MISSING else head_nbytes(self._tables[0]) + self._body_nbytes

    def head(self) -> bytes:
        """Return fixed fields and tables with their checksum; the body follows.

        Raises:
            FieldError: A number does not fit into its field, or the kind never travels.
        """
        return self._head

    def chunks(self, size: int = 1 << 20) -> Iterator[bytes]:
        """Yield the whole message in pieces of ``size`` bytes; the last may be shorter."""
        piece: list[memoryview] = []
        room = size
        for part in self._parts():
            while part:
                piece.append(part[:room])
                part = part[room:]
                room -= len(piece[-1])
                if room == 0:
                    yield b"".join(piece)
                    piece, room = [], size
        if piece:
            yield b"".join(piece)

    def pack(self) -> bytes:
        """Return the whole message."""
        return b"".join(self._parts())

    def tensors(self) -> dict[str, Tensor]:
        """Return the payloads decoded, float32 by name, and copies of the exact tensors.

        Raises:
            FieldError: The payloads are not those of the layout (never after `unpack`).
        """
        spans = self.layout.spans if self.layout is not None else ()
        found = {span.name: payload.decode() for span, payload in zip(spans, self.payloads(), strict=True)}
        return found | {name: tensor.clone() for name, tensor in self.exact.items()}

    def payloads(self) -> list[Payload]:
        """Return the payloads in the layout's order, none of a kind without them.

        Raises:
            FieldError: The payloads are not those of the layout (never after `unpack`).
        """
        if self.layout is None:
            return []
        datas = split_body(self.layout, self.frame.body)
        return [payload for _, payload in self.layout.payloads(datas, seed=self.frame.seed)]

    # ---- what travels --------------------------------------------------------------------------------------------

    @cached_property
    def _tables(self) -> tuple[bytes, int]:
        if self.layout is not None and not self.exact:
            return pack_layout(self.layout)
        return pack_tables(self.layout.spans if self.layout else (), self._places)

    @cached_property
    def _places(self) -> tuple[Exact, ...]:
        return exact_places(self.exact, self.frame.body.numel())

    @property
    def _body_nbytes(self) -> int:
        return self._places[-1].stop if self._places else self.frame.body.numel()

    @cached_property
    def _body(self) -> tuple[memoryview, ...]:
        """The body in order: payloads, and exact tensors with zeros in front of those that need them."""
        parts, at = [_bytes_of(self.frame.body)], self.frame.body.numel()
        for place, tensor in zip(self._places, self.exact.values(), strict=True):
            parts += (memoryview(bytes(place.start - at)), _bytes_of(tensor))
            at = place.stop
        return tuple(parts)

    @cached_property
    def _head(self) -> bytes:
        frame, (tables, num_codecs) = self.frame, self._tables
        if frame.kind == Kind.MISSING:
            raise FieldError("message kind", frame.kind.name, "a kind that travels")
        checksum = 0
        for part in self._body:
            checksum = crc32c(part, checksum)
        fixed = Fixed(
            magic=MAGIC,
            version=VERSION,
            kind=frame.kind,
            num_codecs=num_codecs,
            head_nbytes=0,
            num_tensors=len(self.layout.spans) if self.layout else 0,
            num_exact=len(self.exact),
            body_checksum=checksum,
            round=frame.round,
            client=frame.client,
            loss=frame.loss,
            accuracy=frame.accuracy,
            sequence=self.sequence,
            layout_hash=frame.layout_hash,
            seed=frame.seed,
            weight=frame.weight,
            payload_nbytes=frame.body.numel(),
            body_nbytes=self._body_nbytes,
        )
        return pack_head(fixed, tables)

    def _parts(self) -> Iterator[memoryview]:
        yield memoryview(self._head)
        yield from self._body


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, without a copy if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# ---- from bytes --------------------------------------------------------------------------------------------------


def unpack(data: bytes | bytearray | memoryview | Tensor, limits: Limits = DEFAULT_LIMITS) -> Message:
    """Read a whole message; body and exact tensors are views of ``data`` and must not be written to.

    What is returned decodes: tables, sizes, checksums and the positions in sparse payloads were checked.

    Args:
        data: Contiguous bytes, or a flat uint8 tensor.
        limits: Largest sizes that are accepted.

    Raises:
        FieldError: The data are no message, are damaged, contradict themselves, or are beyond the limits.
    """
    whole = _tensor_of(data)
    if not FIXED.size <= whole.numel() <= limits.message_bytes:
        raise FieldError("message bytes", whole.numel(), f"{FIXED.size} to {limits.message_bytes}")
    view = whole.numpy().data
    split = announced_nbytes(view, limits)
    if split > whole.numel():
        raise FieldError("message bytes", whole.numel(), f"{split} for its head alone")
    head = read_head(view[:split], limits)
    if whole.numel() != split + head.fixed.body_nbytes:
        raise FieldError("message bytes", whole.numel(), f"{split + head.fixed.body_nbytes}, as its head says")
    return _message(head, whole[split:], crc32c(view[split:]))


def _tensor_of(data: bytes | bytearray | memoryview | Tensor) -> Tensor:
    """Return bytes as a flat uint8 tensor, without a copy."""
    if isinstance(data, Tensor):
        if data.dtype != torch.uint8 or data.dim() != 1:
            raise FieldError("message", f"{data.dtype} {tuple(data.shape)}", "flat torch.uint8")
        return data.cpu().contiguous()
    try:
        array = np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError):
        raise FieldError("message", type(data).__name__, "contiguous bytes, bytearray or memoryview") from None
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_ReadOnly(array)))


class _ReadOnly:
    """Shows numpy, and so torch, read-only bytes; torch knows no tensor that must not be written to, and warns."""

    def __init__(self, array: np.ndarray) -> None:
        self._keeps = array
        address = array.__array_interface__["data"][0]
        self.__array_interface__ = {"data": (address, False), "shape": array.shape, "typestr": "|u1", "version": 3}


def _message(head: Head, body: Tensor, checksum: int) -> Message:
    """Put a head and the whole body together.

    Raises:
        FieldError: Head and body do not fit each other.
    """
    fixed = head.fixed
    if checksum != fixed.body_checksum:
        raise FieldError("message body checksum", f"{checksum:08x}", f"{fixed.body_checksum:08x}, as its head says")
    payloads = body[: fixed.payload_nbytes]
    if head.layout is not None:
        head.layout.check(split_body(head.layout, payloads))
    at = fixed.payload_nbytes
    for place in head.exact:
        if body[at : place.start].any():
            raise FieldError("message padding", place.name, "zeros in front of an exact tensor")
        at = place.stop
    exact = {place.name: place.read(body) for place in head.exact}
    return Message(head.frame(payloads), head.layout, fixed.sequence, exact)


class Assembler:
    """Puts the chunks of one stream together to messages.

    At most a head is held before its checksum was checked; then the body's memory is allocated, once.

    Args:
        limits: Largest sizes that are accepted.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._start()
        self._refused: tuple[str, object, str] | None = None

    def _start(self) -> None:
        self._head_data = bytearray()
        self._head_nbytes = FIXED.size
        self._head: Head | None = None
        self._body = torch.empty(0, dtype=torch.uint8)
        self._filled = self._checksum = 0

    @property
    def pending(self) -> int:
        """Bytes of a message that is not complete."""
        return len(self._head_data) + self._filled

    def add(self, chunk: bytes | bytearray | memoryview) -> list[Message]:
        """Take the next bytes of the stream and return the messages that they complete.

        Raises:
            FieldError: A message cannot be read (see `unpack`); the stream is lost then: any further chunk is refused.
        """
        if self._refused is not None:
            raise FieldError(*self._refused)
        try:
            return list(self._messages(memoryview(chunk).cast("B")))
        except FieldError as error:
            self._start()
            self._refused = error.field, error.value, error.allowed
            raise

    def _messages(self, rest: memoryview) -> Iterator[Message]:
        while rest:
            rest = rest[self._take_head(rest) if self._head is None else self._take_body(rest) :]
            if self._head is not None and self._filled == self._body.numel():
                head, body, checksum = self._head, self._body, self._checksum
                self._start()
                yield _message(head, body, checksum)

    def _take_head(self, chunk: memoryview) -> int:
        """Take bytes of the head, make room for the body once it is whole, and return how many were taken."""
        taken = chunk[: self._head_nbytes - len(self._head_data)]
        self._head_data += taken
        if len(self._head_data) == self._head_nbytes == FIXED.size:
            self._head_nbytes = announced_nbytes(memoryview(self._head_data), self._limits)
        elif len(self._head_data) == self._head_nbytes:
            self._head = read_head(memoryview(bytes(self._head_data)), self._limits)
            self._body = torch.empty(self._head.fixed.body_nbytes, dtype=torch.uint8)
        return len(taken)

    def _take_body(self, chunk: memoryview) -> int:
        """Take bytes of the body and return how many were taken."""
        taken = np.frombuffer(chunk, np.uint8)[: self._body.numel() - self._filled]
        self._body.numpy()[self._filled : self._filled + taken.size] = taken
        self._checksum = crc32c(taken.data, self._checksum)
        self._filled += taken.size
        return int(taken.size)


# ---- notes -------------------------------------------------------------------------------------------------------


def note(text: Mapping[str, Any], *, round: int = 0, client: int = SERVER, sequence: int = 0) -> Message:
    """Return a control message.

    Args:
        text: Content that JSON can say: texts, finite numbers, true, false, null, lists and objects.
        round: Round number, from 0.
        client: Number of the client that sends it; `SERVER` for the server.
        sequence: Number of the task or the sender's counter, as in `Message`.

    Raises:
        FieldError: JSON cannot say the text.
    """
    try:
        data = json.dumps(dict(text), allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise FieldError("note", text, f"what JSON can say ({error})") from None
    body = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Message(Frame(Kind.NOTE, round, client, 0, 0, 0.0, 0.0, 0.0, body), sequence=sequence)


def read_note(message: Message) -> dict[str, Any]:
    """Return what a control message says.

    Raises:
        FieldError: The message is of another kind, or holds no JSON object.
    """
    if message.frame.kind != Kind.NOTE:
        raise FieldError("message kind", message.frame.kind.name, "NOTE")
    try:
        text = json.loads(bytes(_bytes_of(message.frame.body)), parse_int=_integer, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FieldError("note", f"{message.frame.body.numel()} bytes", f"JSON ({type(error).__name__})") from None
    if not isinstance(text, dict):
        raise FieldError("note", type(text).__name__, "a JSON object")
    return text


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError
    return int(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
