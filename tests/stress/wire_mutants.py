"""Mutants of messages of `fedq.wire`, for `fuzz_wire.py` and the tests: damaged, and wrong with right checksums.

A mutant is made in three steps from one 64-bit seed: the parts of a valid message are changed (specs, shapes, payloads,
names, roles, ...); the parts are joined by a writer that is independent of `fedq.wire` and may lie in any field; bits
of the result are flipped, bytes cut out or taken from another message. In most mutants both checksums are then made
right again, so that what they would have caught reaches the checks behind them.
"""

from __future__ import annotations

import hashlib
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from fedq.codecs import codec
from fedq.errors import FieldError
from fedq.wire import crc32c

HEAD = struct.Struct("<4sBBHIIIIIIffQQQdQQ")
FIELDS = (
    *("magic", "version", "kind", "num_codecs", "head_nbytes", "num_tensors", "num_exact", "body_checksum", "round"),
    *("client", "loss", "accuracy", "sequence", "layout_hash", "seed", "weight", "payload_nbytes", "body_nbytes"),
)
ROLES, SENT = ("coded", "exempt", "stats"), ("", " values")
SPECS = (
    *("fp32", "fp16", "bf16", "int1", "int2", "int3", "int4", "int5", "int6", "int7", "int8", "ternary", "sign"),
    *("int4:rotate=false", "int4:scale=tensor", "int4:scale=channel", "int8:block=8", "int8:rounding=stochastic"),
    *("int5:scale=channel", "ternary:rotate=true", "sign:magnitude=mean", "sign:rotate=true,rounding=stochastic"),
    *("ternary:scale=tensor", "topk:bits=4,density=0.1", "topk:density=0.1", "topk:bits=32,density=0.3"),
    *("blocktopk", "blocktopk:bits=2", "blocktopk:bits=8,k=4,block=32", "blocktopk:k=16,block=16"),
    *("randk:bits=32,density=0.1", "randk:bits=3,density=0.5,unbias=true", "threshold:value=0.1"),
    *("threshold:bits=3,value=0.05", "threshold:bits=32"),
)
BAD_SPECS = (
    *("", ":", "int9", "INT4", "int4:", "int4:block", "int4:block=256", "int4:block=1099511627776", "int8:block=-8"),
    *("int4:block=512,block=512", "int4:block=5_12", "int8:block=" + "9" * 300, "int8:rotate=yes", "topk:density=nan"),
    *("topk:density=1e-300", "topk:density=inf", "randk:density=2", "blocktopk:block=1048576", "blocktopk:k=0"),
    *("threshold:value=1e300", "threshold:value=-1", "sign:scale=mean", "powersgd:rank=2", "a" * 256, "b" * 300),
    *("int4:" + ",".join(f"x{i}=1" for i in range(60)), "topk:k=1", "blocktopk:k=1048576,block=1048576", "ﬁnt4"),
)
SHAPES = ((), (1,), (7,), (33,), (0,), (3, 0), (6, 50), (2, 3, 4), (1, 257), (300, 1), (4, 4, 3, 3), (600,))
NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 63, 64, 127, 128, 255, 256, 4096, 65535, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 33),
    *(1 << 40, 1 << 61, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)
NAMES = (b"", b"a", b"a.weight", b"b c", b"x" * 600, b"new\nline", b"\xff\xfe", "größe".encode(), b"\0", b"[1] fp32")
ITEM_BYTES = {
    1: 1,
    2: 1,
    3: 1,
    4: 2,
    5: 4,
    6: 8,
    7: 2,
    8: 2,
    9: 4,
    10: 8,
    11: 8,
    12: 16,
    13: 2,
    14: 4,
    15: 8,
    16: 1,
    17: 1,
}
LARGEST = 8000  # elements for which a right payload is made


@dataclass
class Coded:
    """A payload's entry and bytes."""

    name: bytes
    spec: bytes
    shape: list[int]
    data: bytes
    role: int = 0
    sent: int = 0


@dataclass
class Bits:
    """An exact tensor's entry and bytes."""

    name: bytes
    dtype: int
    shape: list[int]
    data: bytes


@dataclass
class Parts:
    """A message in parts; ``lies`` replaces fixed fields after everything else was computed."""

    kind: int = 1
    seed: int = 5
    weight: float = 10.0
    coded: list[Coded] = field(default_factory=list)
    exact: list[Bits] = field(default_factory=list)
    text: bytes = b""
    lies: dict[str, int | float | bytes] = field(default_factory=dict)
    sizes: list[int] | None = None


# ---- the writer --------------------------------------------------------------------------------------------------


def join(parts: Parts) -> bytes:
    """Return the message: consistent, but for what the parts themselves say."""
    body, exact_entries = _body(parts)
    payload_nbytes = len(body) - sum(len(entry) for _, entry in exact_entries)
    specs = list(dict.fromkeys(c.spec for c in parts.coded))
    tables = b"".join(_sized(spec, 2) for spec in specs)
    for c in parts.coded:
        numbers = (len(c.name), specs.index(c.spec), c.role, c.sent, len(c.shape))
        tables += struct.pack("<HHBBB", *numbers) + _shape(c.shape) + c.name
    for e in parts.exact:
        tables += struct.pack("<HBB", len(e.name), e.dtype, len(e.shape)) + _shape(e.shape) + e.name
    size = -(-(HEAD.size + len(tables) + 4) // 64) * 64
    values: dict[str, int | float | bytes] = {
        "magic": b"FEDQ",
        "version": 1,
        "kind": parts.kind,
        "num_codecs": len(specs),
        "head_nbytes": size,
        "num_tensors": len(parts.coded),
        "num_exact": len(parts.exact),
        "body_checksum": 0,
        "round": 3,
        "client": 17,
        "loss": 0.5,
        "accuracy": 0.25,
        "sequence": 9,
        "layout_hash": _layout_hash(parts) if parts.kind in (1, 3, 5) else 0,
        "seed": parts.seed,
        "weight": parts.weight,
        "payload_nbytes": payload_nbytes,
        "body_nbytes": len(body),
    }
    values |= parts.lies
    head = HEAD.pack(*(values[name] for name in FIELDS)) + tables
    return summed(head + bytes(size - len(head)) + body)


def _body(parts: Parts) -> tuple[bytes, list[tuple[Bits, bytes]]]:
    sizes = parts.sizes
    if sizes is None:
        sizes = [len(c.data) for c in parts.coded if c.spec.startswith(b"threshold")]
    body = struct.pack(f"<{len(sizes)}Q", *sizes) + b"".join(c.data for c in parts.coded) + parts.text
    entries = []
    for e in parts.exact:
        padded = bytes(-len(body) % ITEM_BYTES.get(e.dtype, 1)) + e.data
        entries.append((e, padded))
        body += padded
    return body, entries


def _sized(text: bytes, width: int) -> bytes:
    return len(text).to_bytes(width, "little") + text


def _shape(shape: list[int]) -> bytes:
    return struct.pack(f"<{len(shape)}Q", *shape)


def _layout_hash(parts: Parts) -> int:
    lines = []
    for c in parts.coded:
        end = f" {c.shape} ".encode() + c.spec + b" " + ROLES[c.role % 3].encode() + SENT[c.sent % 2].encode()
        lines.append(c.name + end)
    return int.from_bytes(hashlib.blake2b(b"\n".join(lines), digest_size=8).digest(), "little")


def summed(data: bytes) -> bytes:
    """Return a message with right checksums, as far as its sizes allow."""
    if len(data) < HEAD.size:
        return data
    size = int.from_bytes(data[8:12], "little")
    if not HEAD.size + 4 <= size <= len(data):
        return data
    head = data[:20] + struct.pack("<I", crc32c(data[size:])) + data[24 : size - 4]
    return head + struct.pack("<I", crc32c(head)) + data[size:]


# ---- valid messages ----------------------------------------------------------------------------------------------


@lru_cache(1024)
def payload_of(spec: str, shape: tuple[int, ...]) -> bytes:
    """Return a payload of Gaussian values."""
    x = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return codec(spec).encode(x, seed=5).data.numpy().tobytes()


@lru_cache(1024)
def right_nbytes(spec: str, shape: tuple[int, ...]) -> int | None:
    """Return a payload's size; None where there is no such codec, or its size depends on the values."""
    try:
        return codec(spec).payload_nbytes(shape)
    except FieldError:
        return None


def valid(rng: random.Random) -> Parts:
    """Return a valid message of any kind, of a few small tensors."""
    kind = rng.choice((1, 1, 1, 1, 3, 5, 2, 4, 6))
    if kind == 2:
        return Parts(kind)
    if kind in (4, 6):
        text = rng.choice(
            (b"{}", b'{"a":[1,2,{"b":null}]}', b"[" * 2000, b'{"a":' + b"9" * 400 + b"}", b"RuntimeError: no")
        )
        return Parts(kind, text=text)
    parts = Parts(kind, seed=rng.getrandbits(3))
    for number in range(rng.randrange(4)):
        spec, shape = rng.choice(SPECS), rng.choice(SHAPES)
        parts.coded.append(Coded(b"layer%d.weight" % number, spec.encode(), list(shape), payload_of(spec, shape)))
    if rng.random() < 0.3:
        parts.exact.append(Bits(b"steps", 6, [], (7).to_bytes(8, "little")))
    if rng.random() < 0.2:
        parts.exact.append(Bits(b"flags", 1, [3], b"\1\0\1"))
    return parts


# ---- changes of the parts ----------------------------------------------------------------------------------------


def _respec(rng: random.Random, parts: Parts) -> None:
    c = rng.choice(parts.coded)
    c.spec = rng.choice(SPECS if rng.random() < 0.6 else BAD_SPECS).encode()
    if rng.random() < 0.7:
        _fit(rng, c)


def _reshape(rng: random.Random, parts: Parts) -> None:
    c = rng.choice(parts.coded)
    shape = list(rng.choice(SHAPES))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 12))):
        shape.insert(rng.randint(0, len(shape)), rng.choice(NUMBERS))
    c.shape = shape
    if rng.random() < 0.8:
        _fit(rng, c)


def _fit(rng: random.Random, c: Coded) -> None:
    """Give an entry random bytes of the right size, if it is one that can have them."""
    num, spec = math.prod(c.shape), c.spec.decode()
    if num > LARGEST:
        return
    nbytes = right_nbytes(spec, tuple(c.shape))
    if nbytes is not None:
        c.data = rng.randbytes(nbytes)
    elif spec in SPECS:
        c.data = payload_of(spec, (num,))
        _corrupt(rng, c)


def _corrupt(rng: random.Random, c: Coded) -> None:
    """Change a payload's bytes, not their number."""
    data = bytearray(c.data)
    if not data:
        return
    way = rng.randrange(5)
    if way == 0:
        data[:] = rng.randbytes(len(data))
    elif way == 1:
        data[:] = bytes([rng.choice((0, 255, 0x55, 0x7F, 0x80))]) * len(data)
    elif way == 2:  # scales, or the last values: NaN, infinity, negative
        data[-2:] = rng.choice((b"\xc0\x7f", b"\x80\x7f", b"\x80\xff", b"\x01\x00"))[: len(data)]
    elif way == 3:  # the count of a threshold, or positions
        data[:8] = rng.choice(NUMBERS).to_bytes(8, "little")[: len(data)]
    else:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    c.data = bytes(data)


def _repayload(rng: random.Random, parts: Parts) -> None:
    c = rng.choice(parts.coded)
    way = rng.randrange(8)
    if way == 0:
        c.data = c.data[: rng.randint(0, len(c.data))]
    elif way == 1:
        c.data += rng.randbytes(rng.randint(1, 20))
    else:
        _corrupt(rng, c)


def _rename(rng: random.Random, parts: Parts) -> None:
    entries: list[Coded | Bits] = [*parts.coded, *parts.exact]
    rng.choice(entries).name = rng.choice([*NAMES, *(other.name for other in parts.coded)])


def _retype(rng: random.Random, parts: Parts) -> None:
    c = rng.choice(parts.coded)
    if rng.random() < 0.5:
        c.role = rng.choice((0, 1, 2, 2, 3, 255))
    else:
        c.sent = rng.choice((0, 1, 1, 2, 255))


def _reorder(rng: random.Random, parts: Parts) -> None:
    way = rng.randrange(3)
    if way == 0:
        rng.shuffle(parts.coded)
    elif way == 1:
        parts.coded.append(rng.choice(parts.coded))
    else:
        parts.coded.pop(rng.randrange(len(parts.coded)))


def _resize(rng: random.Random, parts: Parts) -> None:
    """Lie about the sizes of payloads without a fixed size."""
    sizes = [len(c.data) for c in parts.coded if c.spec.startswith(b"threshold")]
    for _ in range(rng.randint(0, 2)):
        sizes.insert(rng.randint(0, len(sizes)), rng.choice(NUMBERS))
    if sizes:
        sizes[rng.randrange(len(sizes))] = rng.choice(NUMBERS)
    parts.sizes = sizes


def _exact(rng: random.Random, parts: Parts) -> None:
    shape = list(rng.choice(SHAPES))
    if rng.random() < 0.3:
        shape.insert(0, rng.choice(NUMBERS))
    dtype = rng.choice((*ITEM_BYTES, 0, 18, 255))
    num = math.prod(shape)
    data = rng.randbytes(min(num, LARGEST) * ITEM_BYTES.get(dtype, 1))
    if dtype == 1 and rng.random() < 0.5:
        data = bytes(byte & 1 for byte in data)
    parts.exact.insert(rng.randint(0, len(parts.exact)), Bits(rng.choice(NAMES), dtype, shape, data))


def _rekind(rng: random.Random, parts: Parts) -> None:
    parts.kind = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 255))


def _lie(rng: random.Random, parts: Parts) -> None:
    name = rng.choice(FIELDS)
    if name == "magic":
        parts.lies[name] = rng.choice((b"FEDQ", b"fedq", b"\0\0\0\0"))
    elif name in ("loss", "accuracy", "weight"):
        parts.lies[name] = rng.choice((0.0, -0.0, 1.0, -1.0, 1e38, math.inf, -math.inf, math.nan))
    else:
        width = {"version": 8, "kind": 8, "num_codecs": 16, "sequence": 64, "layout_hash": 64, "seed": 64}.get(name, 32)
        width = 64 if name in ("payload_nbytes", "body_nbytes") else width
        parts.lies[name] = rng.choice(NUMBERS) & ((1 << width) - 1)


_OF_CODED: tuple[Callable[[random.Random, Parts], None], ...] = (
    *(_respec, _respec, _reshape, _reshape, _repayload, _repayload, _repayload, _retype, _reorder, _resize, _rename),
)
_OF_ANY: tuple[Callable[[random.Random, Parts], None], ...] = (_exact, _exact, _rekind, _lie, _lie)


def _change(rng: random.Random, parts: Parts) -> None:
    changes = _OF_CODED + _OF_ANY if parts.coded else _OF_ANY if parts.kind in (1, 3, 5) else _OF_ANY[2:]
    rng.choice(changes)(rng, parts)


# ---- changes of the bytes ----------------------------------------------------------------------------------------


def _damage(rng: random.Random, data: bytes) -> bytes:
    way = rng.randrange(9)
    if way == 0:
        return data[: rng.randint(0, len(data))]
    if way == 1:
        return data + rng.randbytes(rng.randint(1, 80))
    if way == 2:  # the head of one, the body of another
        other = join(valid(rng))
        size, from_other = (int.from_bytes(d[8:12], "little") for d in (data, other))
        return data[:size] + other[from_other:]
    damaged = bytearray(data)
    if way == 3 and len(data) > 8:
        start, stop = sorted(rng.randint(0, len(data)) for _ in range(2))
        del damaged[start:stop]
    elif data:
        for _ in range(rng.choice((1, 1, 2, 8))):
            # Half of it in the head, which is the smaller part.
            at = rng.randrange(min(len(data), rng.choice((256, len(data)))))
            damaged[at] = damaged[at] ^ 1 << rng.randrange(8) if rng.random() < 0.5 else rng.choice((0, 1, 127, 255))
    return bytes(damaged)


def mutant(seed: int) -> bytes:
    """Return the mutant of a seed."""
    rng = random.Random(seed)
    parts = valid(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        _change(rng, parts)
    data = join(parts)
    for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 2))):
        data = _damage(rng, data)
    return summed(data) if rng.random() < 0.85 else data
