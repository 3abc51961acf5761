"""A second reader of messages, written from ``docs/wire_format.md`` and ``docs/codecs.md`` alone: plain Python.

It shares nothing with fedq and is slow. Float32 arithmetic is a double's, rounded after every operation, which gives
the same float32 for sums and products.
"""

from __future__ import annotations

import hashlib
import math
import struct
from itertools import pairwise
from typing import Any

DTYPES = {1: "?", 2: "B", 3: "b", 4: "h", 5: "i", 6: "q", 7: "e", 9: "f", 10: "d", 13: "H", 14: "I", 15: "Q"}
HAS_PAYLOADS = (1, 3, 5)
MASK = 0xFFFFFFFF


class Refused(Exception):
    """A message that a receiver must refuse."""


def need(holds: bool, what: str) -> None:
    if not holds:
        raise Refused(what)


# ---- the message -------------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    state = MASK
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ MASK


class Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def bytes(self, size: int) -> bytes:
        self.at += size
        need(self.at <= len(self.data), "short")
        return self.data[self.at - size : self.at]

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self.bytes(struct.calcsize("<" + form)))

    def text(self, size: int) -> str:
        return self.bytes(size).decode()


def read(data: bytes) -> dict[str, Any]:
    """Return what a message says: fixed fields by name, ``tensors`` and ``exact``, or ``text``."""
    cursor = Cursor(data)
    magic, version, kind, num_codecs, head_nbytes, num_tensors, num_exact, body_checksum = cursor.numbers("4sBBHIIII")
    number, client, loss, accuracy, sequence, layout_hash, seed = cursor.numbers("IIffQQQ")
    weight, payload_nbytes, body_nbytes = cursor.numbers("dQQ")
    need(magic == b"FEDQ" and version == 1, "version")
    need(head_nbytes % 64 == 0 and len(data) == head_nbytes + body_nbytes, "sizes")
    need(crc32c(data[: head_nbytes - 4]) == int.from_bytes(data[head_nbytes - 4 : head_nbytes], "little"), "head")
    body = data[head_nbytes:]
    need(crc32c(body) == body_checksum, "body")
    found: dict[str, Any] = {
        "kind": kind,
        "round": number,
        "client": client,
        "sequence": sequence,
        "layout_hash": layout_hash,
        "seed": seed,
        "weight": weight,
        "loss": loss,
        "accuracy": accuracy,
    }
    if kind not in HAS_PAYLOADS:
        need(num_codecs == num_tensors == num_exact == 0 and payload_nbytes == body_nbytes, "tables")
        return found | {"text": body.decode()}
    specs = [cursor.text(*cursor.numbers("H")) for _ in range(num_codecs)]
    tensors = [_entry(cursor, specs) for _ in range(num_tensors)]
    exact = [_exact_entry(cursor) for _ in range(num_exact)]
    padding = data[cursor.at : head_nbytes - 4]
    need(len(padding) < 64 and not any(padding), "padding")
    lines = [f"{t['name']} {t['shape']} {t['spec']} {t['role']}{' values' * t['values']}" for t in tensors]
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest()
    need(int.from_bytes(digest, "little") == layout_hash, "layout")
    _read_payloads(Cursor(body[:payload_nbytes]), tensors, seed)
    _read_exact(body, payload_nbytes, exact)
    return found | {"tensors": tensors, "exact": exact}


def _entry(cursor: Cursor, specs: list[str]) -> dict[str, Any]:
    name_nbytes, number, role, values, ndim = cursor.numbers("HHBBB")
    shape = list(cursor.numbers(f"{ndim}Q"))
    role = ("coded", "exempt", "stats")[role]
    return {
        "name": cursor.text(name_nbytes),
        "spec": specs[number],
        "role": role,
        "values": bool(values),
        "shape": shape,
    }


def _exact_entry(cursor: Cursor) -> dict[str, Any]:
    name_nbytes, dtype, ndim = cursor.numbers("HBB")
    shape = list(cursor.numbers(f"{ndim}Q"))
    return {"name": cursor.text(name_nbytes), "dtype": dtype, "shape": shape}


def _read_payloads(cursor: Cursor, tensors: list[dict[str, Any]], seed: int) -> None:
    sizes = [cursor.numbers("Q")[0] if t["spec"].startswith("threshold") else None for t in tensors]
    for index, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        num = math.prod(tensor["shape"])
        reader = Payload(tensor["spec"], tensor["shape"], span_seed(seed, index))
        if size is None:
            size = reader.nbytes() if num else 0
        tensor["decoded"] = reader.decode(cursor.bytes(size)) if num else []
    need(cursor.at == len(cursor.data), "payload bytes")


def _read_exact(body: bytes, at: int, exact: list[dict[str, Any]]) -> None:
    for tensor in exact:
        form = DTYPES[tensor["dtype"]]
        width, num = struct.calcsize(form), math.prod(tensor["shape"])
        start = -(-at // width) * width
        need(not any(body[at:start]), "gap")
        at = start + num * width
        tensor["decoded"] = list(struct.unpack(f"<{num}{form}", body[start:at]))
    need(at == len(body), "body bytes")


# ---- payloads ----------------------------------------------------------------------------------------------------


def f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def bf16(data: bytes) -> list[float]:
    return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]


def unpack_bits(data: bytes, bits: int, num: int) -> list[int]:
    whole = int.from_bytes(data, "little")
    return [whole >> i * bits & (1 << bits) - 1 for i in range(num)]


def mix(x: int) -> int:
    x &= MASK
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def span_seed(seed: int, index: int) -> int:
    low, high = seed & MASK, seed >> 32
    return mix(low + (index + 1) * 0x9E3779B9) | mix(high + (index + 1) * 0x85EBCA6B) << 32


def shared_hash(seed: int, counter: int) -> int:
    key = mix((seed & MASK) + 0x9E3779B9)
    return mix(mix((counter & MASK) ^ key) + (counter >> 32) + 0x9E3779B9)


class Payload:
    """One tensor's payload."""

    def __init__(self, spec: str, shape: list[int], seed: int) -> None:
        self.name, _, rest = spec.partition(":")
        self.options = dict(item.split("=") for item in rest.split(",") if item)
        self.shape, self.num, self.seed = shape, math.prod(shape), seed
        if self.name.startswith("int") or self.name in ("sign", "ternary"):
            self._scaled()
        elif self.name in ("topk", "blocktopk", "randk", "threshold"):
            self._sparse()

    def _scaled(self) -> None:
        get, name = self.options.get, self.name
        block, scale = int(get("block", 1024 if name == "sign" else 256)), get("scale", "block")
        self.bits = {"sign": 1, "ternary": 0}.get(name) if not name.startswith("int") else int(name[3:])
        auto = name in ("int2", "int3", "int4") and block >= 256 and scale != "channel"
        self.rotated = {"true": True, "false": False, "auto": auto}[get("rotate", "auto")]
        self.codes = -(-self.num // 256) * 256 if self.rotated else self.num
        rows = self.shape[0] if len(self.shape) > 1 and self.num else 1
        self.width = {"block": block, "tensor": self.codes, "channel": self.codes // rows}[scale]

    def _sparse(self) -> None:
        self.bits, n = int(self.options.get("bits", 16)), self.num
        if self.name == "blocktopk":
            self.k, self.block = int(self.options.get("k", 1)), int(self.options.get("block", 64))
            self.kept = self.k * -(-n // self.block)
        elif self.name != "threshold":
            self.kept = min(n, max(1, round(float(self.options.get("density", "0.01")) * n)))

    # ---- sizes ----

    def code_nbytes(self) -> int:
        return -(-self.codes // 5) if self.name == "ternary" else -(-self.codes * self.bits // 8)

    def fano(self) -> tuple[int, int, int]:
        """Return low bits, bytes of the low section, bits of the high section."""
        if not self.kept:
            return 0, 0, 0
        low = (self.num // self.kept).bit_length() - 1
        return low, -(-self.kept * low // 8), self.kept + ((self.num - 1) >> low)

    def index_nbytes(self) -> int:
        if self.name == "randk":
            return 0
        if self.name == "blocktopk":
            return -(-self.kept * (self.block.bit_length() - 1) // 8)
        _, low_nbytes, high_bits = self.fano()
        return low_nbytes + -(-high_bits // 8)

    def nbytes(self) -> int:
        casts = {"fp32": 4, "fp16": 2, "bf16": 2}
        if self.name in casts:
            return casts[self.name] * self.num
        if hasattr(self, "width"):
            return self.code_nbytes() + 2 * -(-self.codes // self.width)
        scales = 2 * -(-self.num // 4096) if self.bits <= 8 else 0
        return self.index_nbytes() + -(-self.kept * self.bits // 8) + scales

    # ---- values ----

    def decode(self, data: bytes) -> list[float]:
        if self.name == "bf16":
            return bf16(data)
        if self.name in ("fp32", "fp16"):
            return list(struct.unpack(f"<{self.num}{'f' if self.name == 'fp32' else 'e'}", data))
        return self._decode_scaled(data) if hasattr(self, "width") else self._decode_sparse(data)

    def _decode_scaled(self, data: bytes) -> list[float]:
        codes, scales = data[: self.code_nbytes()], bf16(data[self.code_nbytes() :])
        if self.name == "ternary":
            levels = [float(byte // 3**j % 3 - 1) for byte in codes for j in range(5)][: self.codes]
        elif self.name == "sign":
            levels = [1.0 - 2.0 * bit for bit in unpack_bits(codes, 1, self.codes)]
        else:
            half = (1 << self.bits - 1) - (0.5 if self.rotated or self.bits == 1 else 0.0)
            levels = [code - half for code in unpack_bits(codes, self.bits, self.codes)]
        values = [f32(level * scales[i // self.width]) for i, level in enumerate(levels)]
        return self._unrotated(values)[: self.num] if self.rotated else values

    def _unrotated(self, values: list[float]) -> list[float]:
        stride = 1
        while stride < 256:
            for i in range(len(values)):
                if not i & stride:
                    a, b = values[i], values[i + stride]
                    values[i], values[i + stride] = f32(a + b), f32(a - b)
            stride *= 2
        signs = [1 - 2 * (shared_hash(self.seed, i // 32) >> i % 32 & 1) for i in range(len(values))]
        return [f32(value / 16) * sign for value, sign in zip(values, signs, strict=True)]

    def _decode_sparse(self, data: bytes) -> list[float]:
        if self.name == "threshold":
            (self.kept,) = struct.unpack("<q", data[:8])
            data = data[8:]
        need(len(data) == self.nbytes(), "payload bytes")
        split = self.index_nbytes()
        places = self._places(data[:split])
        out = [0.0] * self.num
        for place, value in zip(places, self._values(data[split:], places), strict=True):
            if place < self.num:
                out[place] = value
        return out

    def _places(self, data: bytes) -> list[int]:
        if self.name == "randk":
            edges = [i * self.num // self.kept for i in range(self.kept + 1)]
            return [a + shared_hash(self.seed, i) % (b - a) for i, (a, b) in enumerate(pairwise(edges))]
        if self.name == "blocktopk":
            local = unpack_bits(data, self.block.bit_length() - 1, self.kept)
            places = [i // self.k * self.block + at for i, at in enumerate(local)]
        else:
            low, low_nbytes, high_bits = self.fano()
            ones = [i for i, bit in enumerate(unpack_bits(data[low_nbytes:], 1, high_bits)) if bit]
            need(len(ones) == self.kept, "positions")
            lower = unpack_bits(data[:low_nbytes], low, self.kept)
            places = [(one - i) << low | lower[i] for i, one in enumerate(ones)]
            need(not places or places[-1] < self.num, "positions")
        need(all(a < b for a, b in pairwise(places)), "positions")
        return places

    def _values(self, data: bytes, places: list[int]) -> list[float]:
        if self.bits == 32:
            return list(struct.unpack(f"<{self.kept}f", data))
        if self.bits == 16:
            return bf16(data)
        split = -(-self.kept * self.bits // 8)
        codes, scales = unpack_bits(data[:split], self.bits, self.kept), bf16(data[split:])
        half, last = 1 << self.bits - 1, (self.num - 1) // 4096
        levels = [(code & half - 1) + 0.5 for code in codes]
        signed = [-level if code & half else level for level, code in zip(levels, codes, strict=True)]
        return [f32(v * scales[min(place // 4096, last)]) for v, place in zip(signed, places, strict=True)]
