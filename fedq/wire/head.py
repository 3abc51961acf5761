"""The head of a message, to bytes and back: fixed fields, the codecs, and the tensors that the body is made of.

``docs/wire_format.md`` is the specification. Nothing here trusts a byte: every number is compared with the limits
before it is used, and every refusal is a `FieldError` that names the field.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from ctypes import c_float
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedq.codecs import Codec, codec
from fedq.errors import FieldError
from fedq.layout import Layout, Role, Span
from fedq.wire.crc32c import crc32c
from fedq.wire.frame import Frame, Kind
from fedq.wire.limits import Limits

MAGIC = b"FEDQ"
VERSION = 1
FIXED = struct.Struct("<4sBBHIIIIIIffQQQdQQ")
"""The fixed fields, 88 bytes; see `Fixed`."""
ALIGNMENT = 64
"""Alignment of the body in bytes: the head's size is a multiple of it."""

ROLES: tuple[Role, ...] = ("coded", "exempt", "stats")
SENT: tuple[Literal["change", "values"], ...] = ("change", "values")
DTYPES: dict[int, torch.dtype] = {
    1: torch.bool,
    2: torch.uint8,
    3: torch.int8,
    4: torch.int16,
    5: torch.int32,
    6: torch.int64,
    7: torch.float16,
    8: torch.bfloat16,
    9: torch.float32,
    10: torch.float64,
    11: torch.complex64,
    12: torch.complex128,
    13: torch.uint16,
    14: torch.uint32,
    15: torch.uint64,
    16: torch.float8_e4m3fn,
    17: torch.float8_e5m2,
}
"""Types of exact tensors by their number in the table."""
_DTYPE_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
_ROLE_WORDS, _SENT_WORDS, _DTYPE_WORDS, _KIND_WORDS = (
    ", ".join(f"{number} ({what})" for number, what in pairs)
    for pairs in (
        enumerate(ROLES),
        enumerate(SENT),
        DTYPES.items(),
        ((kind.value, kind.name) for kind in Kind if kind != Kind.MISSING),
    )
)
_CODEC = struct.Struct("<H")
_TENSOR = struct.Struct("<HHBBB")
_EXACT = struct.Struct("<HBB")
_CHECKSUM = struct.Struct("<I")
_REMEMBERED_NBYTES = 64 << 10
"""Size of the largest tables whose reading is remembered: what a sender can make a receiver keep is bounded."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Fixed(NamedTuple):
    """The fixed fields, in order."""

    magic: bytes
    version: int
    kind: int
    num_codecs: int
    head_nbytes: int
    num_tensors: int
    num_exact: int
    body_checksum: int
    round: int
    client: int
    loss: float
    accuracy: float
    sequence: int
    layout_hash: int
    seed: int
    weight: float
    payload_nbytes: int
    body_nbytes: int


class Exact(NamedTuple):
    """A tensor that travels bit for bit: its place in the body."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self, body: Tensor) -> Tensor:
        """Return the tensor, as a view of the body where the address allows it.

        Raises:
            FieldError: A bool is neither 0 nor 1.
        """
        data = body[self.start : self.stop]
        if self.dtype == torch.bool and data.numel() and int(data.max()) > 1:
            raise FieldError("message exact tensor", self.name, "bytes of 0 or 1 in a tensor of bool")
        if data.data_ptr() % self.dtype.itemsize or data.storage_offset() % self.dtype.itemsize:
            data = data.clone()
        return data.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Head:
    """What the head says.

    Args:
        fixed: The fixed fields.
        layout: Layout of the payloads; None for kinds without payloads.
        exact: The tensors that travel bit for bit.
    """

    fixed: Fixed
    layout: Layout | None
    exact: tuple[Exact, ...]

    def frame(self, body: Tensor) -> Frame:
        """Return the frame of a body of payloads."""
        f = self.fixed
        return Frame(Kind(f.kind), f.round, f.client, f.layout_hash, f.seed, f.weight, f.loss, f.accuracy, body)


# ---- to bytes ----------------------------------------------------------------------------------------------------


def exact_places(exact: Mapping[str, Tensor], start: int) -> tuple[Exact, ...]:
    """Return where exact tensors lie in a body whose payloads end at ``start``: each at a multiple of its item size.

    Raises:
        FieldError: A tensor has a type that has no number.
    """
    places = []
    for name, tensor in exact.items():
        if tensor.dtype not in _DTYPE_NUMBERS:
            allowed = ", ".join(str(dtype) for dtype in _DTYPE_NUMBERS)
            raise FieldError(f"exact tensor {name!r}", tensor.dtype, allowed)
        start += -start % tensor.dtype.itemsize
        stop = start + tensor.numel() * tensor.dtype.itemsize
        places.append(Exact(name, tensor.dtype, tuple(tensor.shape), start, stop))
        start = stop
    return tuple(places)


def pack_tables(spans: Sequence[Span], exact: Sequence[Exact]) -> tuple[bytes, int]:
    """Return the tables, and how many codecs they name."""
    specs = {spec: number for number, spec in enumerate(dict.fromkeys(span.codec.spec for span in spans))}
    parts = [_CODEC.pack(len(spec.encode())) + spec.encode() for spec in specs]
    for span in spans:
        name, number = span.name.encode(), specs[span.codec.spec]
        entry = _TENSOR.pack(len(name), number, ROLES.index(span.role), SENT.index(span.sent), len(span.shape))
        parts += (entry, _pack_shape(span.shape), name)
    for place in exact:
        name = place.name.encode()
        entry = _EXACT.pack(len(name), _DTYPE_NUMBERS[place.dtype], len(place.shape))
        parts += (entry, _pack_shape(place.shape), name)
    return b"".join(parts), len(specs)


@lru_cache(16)
def pack_layout(layout: Layout) -> tuple[bytes, int]:
    """Return the tables of a layout alone, made once for all its messages, and how many codecs they name."""
    return pack_tables(layout.spans, ())


def _pack_shape(shape: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(shape)}Q", *shape)


def pack_head(fixed: Fixed, tables: bytes) -> bytes:
    """Return the head: fixed fields, tables, zeros up to a multiple of 64 bytes less four, and their checksum.

    Raises:
        FieldError: A number does not fit into its field.
    """
    nbytes = head_nbytes(tables)
    # As float32 a finite loss may be infinite: `struct` would raise.
    loss, accuracy = c_float(fixed.loss).value, c_float(fixed.accuracy).value
    try:
        data = FIXED.pack(*fixed._replace(head_nbytes=nbytes, loss=loss, accuracy=accuracy)) + tables
    except struct.error as error:
        raise FieldError("message fields", fixed, f"numbers that fit their fields ({error})") from None
    data += bytes(nbytes - len(data) - _CHECKSUM.size)
    return data + _CHECKSUM.pack(crc32c(data))


def head_nbytes(tables: bytes) -> int:
    """Return the size of a head with these tables."""
    nbytes = FIXED.size + len(tables) + _CHECKSUM.size
    return nbytes + -nbytes % ALIGNMENT


# ---- from bytes --------------------------------------------------------------------------------------------------


def _check(holds: bool, field: str, value: object, allowed: str) -> None:
    """Raise `FieldError` about a field of a message unless something holds."""
    if not holds:
        raise FieldError(f"message {field}", value, allowed)


def announced_nbytes(data: memoryview, limits: Limits) -> int:
    """Return the size that the first `FIXED` bytes give the head, before its checksum can be checked.

    Raises:
        FieldError: The data are no message, have another version, or a head beyond the limits.
    """
    fixed = Fixed._make(FIXED.unpack(data[: FIXED.size]))
    _check(fixed.magic == MAGIC, "magic", fixed.magic, repr(MAGIC))
    _check(fixed.version == VERSION, "version", fixed.version, str(VERSION))
    nbytes, least = fixed.head_nbytes, FIXED.size + _CHECKSUM.size
    _check(least <= nbytes <= limits.header_bytes, "head bytes", nbytes, f"{least} to {limits.header_bytes}")
    _check(nbytes % ALIGNMENT == 0, "head bytes", nbytes, f"a multiple of {ALIGNMENT}")
    return nbytes


def read_head(data: memoryview, limits: Limits) -> Head:
    """Read a head of the size that it announces.

    Raises:
        FieldError: The head is damaged, contradicts itself, or calls for something beyond the limits.
    """
    end = len(data) - _CHECKSUM.size
    (checksum,), found = _CHECKSUM.unpack(data[end:]), crc32c(data[:end])
    _check(found == checksum, "head checksum", f"{found:08x}", f"{checksum:08x}, as the head says")
    fixed = Fixed._make(FIXED.unpack(data[: FIXED.size]))
    _check_fixed(fixed, limits)
    tables = bytes(data[FIXED.size : end])
    read = _read_tables if len(tables) <= _REMEMBERED_NBYTES else _read_tables.__wrapped__
    layout, exact = read(
        tables, limits, fixed.kind, fixed.num_codecs, fixed.num_tensors, fixed.num_exact, fixed.payload_nbytes
    )
    if layout is not None:
        _check_layout(fixed, layout)
    stop = exact[-1].stop if exact else fixed.payload_nbytes
    _check(stop == fixed.body_nbytes, "body bytes", fixed.body_nbytes, f"{stop}, as the tables say")
    return Head(fixed, layout, exact)


@lru_cache(8)  # round after round the same tables come, of a model in one codec or a few
def _read_tables(
    data: bytes, limits: Limits, kind: int, num_codecs: int, num_tensors: int, num_exact: int, payload_nbytes: int
) -> tuple[Layout | None, tuple[Exact, ...]]:
    """Return what tables say, of a head with these numbers."""
    tables = _Tables(memoryview(data), limits)
    layout = tables.layout(num_codecs, num_tensors) if Kind(kind).has_payloads else None
    exact = tables.exact(num_exact, payload_nbytes, layout)
    tables.check_end()
    return layout, exact


def _check_fixed(fixed: Fixed, limits: Limits) -> None:
    _check(fixed.kind in set(Kind) - {Kind.MISSING}, "kind", fixed.kind, _KIND_WORDS)
    num, nbytes = fixed.num_tensors + fixed.num_exact, fixed.head_nbytes + fixed.body_nbytes
    _check(nbytes <= limits.message_bytes, "bytes", nbytes, f"at most {limits.message_bytes}")
    _check(num <= limits.tensors, "tensors", num, f"at most {limits.tensors}")
    _check(fixed.num_codecs <= fixed.num_tensors, "codecs", fixed.num_codecs, f"at most {fixed.num_tensors}")
    weight = fixed.weight
    _check(math.isfinite(weight) and weight >= 0, "weight", weight, "a finite number of at least 0")
    if not Kind(fixed.kind).has_payloads:
        largest = 0 if fixed.kind == Kind.LEFT_OUT else limits.note_bytes
        _check(num == 0, "tensors", num, f"none in a message of kind {Kind(fixed.kind).name}")
        _check(fixed.body_nbytes <= largest, "body bytes", fixed.body_nbytes, f"at most {largest}")


def _check_layout(fixed: Fixed, layout: Layout) -> None:
    found = layout.hash
    allowed = f"{found:016x}, as its tables say"
    _check(found == fixed.layout_hash, "layout", f"{fixed.layout_hash:016x}", allowed)
    needed = layout.fixed_nbytes
    if needed is not None:
        _check(fixed.payload_nbytes == needed, "payload bytes", fixed.payload_nbytes, f"{needed} for its tensors")


@lru_cache(1024)  # messages name the same few codecs again and again
def _codec_of(spec: str) -> Codec:
    """Return the codec of a canonical spec."""
    made = codec(spec)
    _check(made.spec == spec, "spec", spec, f"{made.spec!r}, its canonical text")
    return made


class _Tables:
    """Reads the tables from front to back, and adds up what their tensors take decoded."""

    def __init__(self, data: memoryview, limits: Limits) -> None:
        self._data, self._limits = data, limits
        self._at = self._decoded_nbytes = 0

    def layout(self, num_codecs: int, num_tensors: int) -> Layout:
        """Read the codecs and the tensors that they code."""
        codecs = [self._codec() for _ in range(num_codecs)]
        num_specs = len({made.spec for made in codecs})
        _check(num_specs == num_codecs, "codecs", num_codecs, f"{num_specs}, each once")
        spans, num_used = [], 0
        for _ in range(num_tensors):
            name_nbytes, number, role, sent, ndim = self._numbers(_TENSOR)
            _check(number <= min(num_used, num_codecs - 1), "codec number", number, "in order of first use")
            _check(role < len(ROLES), "role", role, _ROLE_WORDS)
            _check(sent < len(SENT), "sent", sent, _SENT_WORDS)
            shape = self._shape(ndim, 4)
            spans.append((self._name(name_nbytes), shape, codecs[number], ROLES[role], SENT[sent]))
            num_used = max(num_used, number + 1)
        _check(num_used == num_codecs, "codecs", num_codecs, f"{num_used}, as the tensors use")
        self._check_names([span[0] for span in spans])
        offsets = accumulate((math.prod(span[1]) for span in spans), initial=0)
        return Layout(tuple(Span(n, sh, at, c, r, se) for (n, sh, c, r, se), at in zip(spans, offsets, strict=False)))

    def exact(self, num: int, start: int, layout: Layout | None) -> tuple[Exact, ...]:
        """Read the exact tensors, whose bytes begin behind ``start`` bytes of payloads."""
        places = []
        for _ in range(num):
            name_nbytes, number, ndim = self._numbers(_EXACT)
            _check(number in DTYPES, "dtype", number, _DTYPE_WORDS)
            itemsize = DTYPES[number].itemsize
            shape, name = self._shape(ndim, itemsize), self._name(name_nbytes)
            start += -start % itemsize
            places.append(Exact(name, DTYPES[number], shape, start, start + math.prod(shape) * itemsize))
            start = places[-1].stop
        self._check_names([span.name for span in layout.spans] if layout else [], [place.name for place in places])
        return tuple(places)

    def check_end(self) -> None:
        """Raise `FieldError` unless nothing but the padding is left: zeros, and less than a whole alignment of them."""
        left = bytes(self._data[self._at :])
        _check(len(left) < ALIGNMENT and not any(left), "head padding", left[:ALIGNMENT], f"under {ALIGNMENT} zeros")

    def _check_names(self, *groups: Sequence[str]) -> None:
        seen: set[str] = set()
        for name in (name for group in groups for name in group):
            _check(name not in seen, "tensor name", name, "each name once")
            seen.add(name)

    def _codec(self) -> Codec:
        (nbytes,) = self._numbers(_CODEC)
        _check(0 < nbytes <= self._limits.spec_bytes, "spec bytes", nbytes, f"1 to {self._limits.spec_bytes}")
        spec = self._text(nbytes, "spec")
        return _codec_of(spec)

    def _name(self, nbytes: int) -> str:
        _check(0 < nbytes <= self._limits.name_bytes, "name bytes", nbytes, f"1 to {self._limits.name_bytes}")
        name = self._text(nbytes, "tensor name")
        _check(not _CONTROL.search(name), "tensor name", name, "a name without control characters")
        return name

    def _shape(self, ndim: int, itemsize: int) -> tuple[int, ...]:
        _check(ndim <= self._limits.dims, "dimensions", ndim, f"at most {self._limits.dims}")
        shape = self._numbers(struct.Struct(f"<{ndim}Q"))
        # Zeros count as ones: a tensor without elements may have no stride beyond the limits either.
        extent, largest = itemsize * math.prod(max(1, size) for size in shape), self._limits.decoded_bytes
        self._decoded_nbytes += itemsize * math.prod(shape)
        total = max(extent, self._decoded_nbytes)
        _check(total <= largest, "decoded bytes", total, f"at most {largest}")
        return shape

    def _text(self, nbytes: int, field: str) -> str:
        data = self._bytes(nbytes)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise FieldError(f"message {field}", data, "UTF-8") from None

    def _numbers(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self._bytes(form.size))

    def _bytes(self, nbytes: int) -> bytes:
        left = len(self._data) - self._at
        _check(nbytes <= left, "table bytes", nbytes, f"{left}, which are left of the head")
        self._at += nbytes
        return bytes(self._data[self._at - nbytes : self._at])
