"""Files of packed few-bit models (`model.fedq`): nothing in them is executed, and every size is checked before use.

All numbers are little endian:

| bytes | content |
|---|---|
| 8 | ``89 66 65 64 71 0d 0a 1a`` (``\\x89fedq\\r\\n\\x1a``) |
| 2 | version, 1 |
| 4 | bytes of the header, `h` |
| 8 | bytes of the file |
| `h` | header: JSON, compressed as a raw deflate stream |
| | of each tensor in turn: codes and float32 scales, or the values as they are |
| 4 | CRC-32 of all bytes before |

The header is one object of columns, an entry a tensor, because that is what compresses well. The i-th name is the first
``shared[i]`` characters of the name before it and ``rest[i]``; its shape is ``shapes[i]``; ``kind[i]`` counts through
``dtypes`` (``float32``) and on through ``quantizers`` (specs, ``int4:grid=symmetric``). ``errors`` has the error of
each packed weight, or null.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedq.errors import FieldError
from fedq.files import replace_file, writable
from fedq.lowbit.packed import PackedModel, PackedWeight, codes_nbytes, scales_shape
from fedq.lowbit.quantizers import Quantizer, quantizer

MAGIC = b"\x89fedq\r\n\x1a"
VERSION = 1

_PRELUDE = struct.Struct("<8sHIQ")
_CRC_NBYTES = 4
_MAX_HEADER_NBYTES = 2**26
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class _Damaged(Exception):
    """What is wrong with a file, in words."""


def is_packed(path: Path) -> bool:
    """Return whether a file says that it is a packed model.

    Raises:
        FieldError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise FieldError("file", str(path), f"a file that can be read ({error.strerror})") from None


def save_packed(model: PackedModel, path: Path) -> int:
    """Write a packed model, atomically; return the bytes of the file.

    Raises:
        FieldError: A tensor has a type that the format does not have, or the file cannot be written.
    """
    data = packed_bytes(model)
    with writable("file", path):
        replace_file(path, data)
    return len(data)


def load_packed(path: Path) -> PackedModel:
    """Read a packed model.

    Raises:
        FieldError: The file cannot be read, is no packed model or of another version, is cut short or damaged.
    """
    try:
        data = bytearray(Path(path).read_bytes())  # tensors want memory that can be written
    except OSError as error:
        raise FieldError("file", str(path), f"a file that can be read ({error.strerror})") from None
    try:
        return _parse(data)
    except _Damaged as problem:
        raise FieldError("file", str(path), f"a whole file of a packed model; this one {problem}") from None


def packed_bytes(model: PackedModel) -> bytes:
    """Return the bytes of a packed model's file: the same for the same tensors."""
    header = _header(model.tensors)
    sections = [_raw(part) for tensor in model.tensors.values() for part in _parts(tensor)]
    size = _PRELUDE.size + len(header) + sum(map(len, sections)) + _CRC_NBYTES
    body = b"".join((_PRELUDE.pack(MAGIC, VERSION, len(header), size), header, *sections))
    return body + zlib.crc32(body).to_bytes(_CRC_NBYTES, "little")


# ---- writing -----------------------------------------------------------------------------------------------------


def _header(tensors: Mapping[str, PackedWeight | Tensor]) -> bytes:
    packed = [tensor for tensor in tensors.values() if isinstance(tensor, PackedWeight)]
    dtypes = list(dict.fromkeys(_dtype(n, t) for n, t in tensors.items() if isinstance(t, Tensor)))
    specs = list(dict.fromkeys(weight.quantizer.spec for weight in packed))
    shared = [_num_shared(*pair) for pair in pairwise(["", *tensors])]
    columns = {
        "shared": shared,
        "rest": [name[count:] for name, count in zip(tensors, shared, strict=True)],
        "dtypes": dtypes,
        "quantizers": specs,
        "kind": [
            dtypes.index(_dtype(n, t)) if isinstance(t, Tensor) else len(dtypes) + specs.index(t.quantizer.spec)
            for n, t in tensors.items()
        ],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "errors": [weight.error for weight in packed],
    }
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
    text = json.dumps(columns, separators=(",", ":"), allow_nan=False)
    return deflate.compress(text.encode()) + deflate.flush()


def _dtype(name: str, tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise FieldError(name, dtype, ", ".join(_DTYPES))
    return dtype


def _parts(tensor: PackedWeight | Tensor) -> tuple[Tensor, ...]:
    return (tensor.codes, tensor.scales) if isinstance(tensor, PackedWeight) else (tensor,)


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _num_shared(before: str, name: str) -> int:
    """Return the number of first characters that two names share."""
    differ = (i for i, pair in enumerate(zip(before, name, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(before), len(name)))


# ---- reading -----------------------------------------------------------------------------------------------------


def _parse(data: bytearray) -> PackedModel:
    if not data.startswith(MAGIC):
        raise _Damaged("does not begin as one")
    if len(data) < _PRELUDE.size:
        raise _Damaged(f"is cut short, after {len(data)} bytes")
    _, version, header_nbytes, size = _PRELUDE.unpack_from(data)
    if version != VERSION:
        raise _Damaged(f"is of version {version}, and this program reads version {VERSION}")
    if len(data) < size:
        raise _Damaged(f"is cut short, after {len(data):,} of {size:,} bytes")
    if len(data) > size:
        raise _Damaged(f"has {len(data):,} bytes where it says {size:,}")
    begin, end = _PRELUDE.size + header_nbytes, size - _CRC_NBYTES
    if begin > end or zlib.crc32(memoryview(data)[:end]) != int.from_bytes(data[end:], "little"):
        raise _Damaged("has another checksum than it says")
    entries = _entries(_columns(bytes(data[_PRELUDE.size : begin])))
    if sum(entry.nbytes for entry in entries) != end - begin:
        raise _Damaged("has a header that does not fit its size")
    sections = torch.from_numpy(np.frombuffer(data, np.uint8)[begin:end])
    parts = sections.split([entry.nbytes for entry in entries])
    return PackedModel({entry.name: entry.read(part) for entry, part in zip(entries, parts, strict=True)})


def _columns(header: bytes) -> dict[str, list[Any]]:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        columns = json.loads(inflate.decompress(header, _MAX_HEADER_NBYTES))
    except (zlib.error, ValueError, RecursionError):
        raise _Damaged("has a header that cannot be read") from None
    names = ("shared", "rest", "dtypes", "quantizers", "kind", "shapes", "errors")
    if not isinstance(columns, dict) or any(not isinstance(columns.get(name), list) for name in names):
        raise _Damaged("has a header of another kind")
    return columns


def _entries(columns: Mapping[str, list[Any]]) -> list[_Entry]:
    kinds = _kinds(columns["dtypes"], columns["quantizers"])
    errors = iter(columns["errors"])
    entries: list[_Entry] = []
    name = ""
    try:
        rows = zip(columns["shared"], columns["rest"], columns["kind"], columns["shapes"], strict=True)
        for shared, rest, kind, shape in rows:
            name = name[:shared] + rest
            chosen = kinds[kind]
            error = next(errors) if isinstance(chosen, Quantizer) else None
            entries.append(_Entry(name, chosen, shape, error))
    except (ValueError, TypeError, LookupError, StopIteration):
        raise _Damaged("has a header whose columns do not fit together") from None
    if len({entry.name for entry in entries}) != len(entries):
        raise _Damaged("has two tensors of one name")
    return entries


def _kinds(dtypes: list[Any], specs: list[Any]) -> list[Quantizer | torch.dtype]:
    try:
        return [*(_DTYPES[name] for name in dtypes), *map(quantizer, specs)]
    except (FieldError, LookupError, TypeError) as error:
        raise _Damaged(f"has tensors of a kind that is not known ({error})") from None


class _Entry:
    """What a header says of one tensor.

    Args:
        name: Name of the tensor.
        kind: The tensor's quantizer, or the type of an exact tensor.
        shape: Shape of the tensor, as the header has it.
        error: Error of a packed weight against its float weight, as the header has it; None if it is not known.

    Raises:
        _Damaged: The shape or the error is none that a tensor can have.
    """

    def __init__(self, name: str, kind: Quantizer | torch.dtype, shape: Any, error: Any) -> None:
        if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
            raise _Damaged(f"says that {name} has the shape {shape}")
        if isinstance(kind, Quantizer) and not math.prod(shape, start=len(shape)):
            raise _Damaged(f"says that {name} has the shape {shape}")
        if not (error is None or (isinstance(error, (int, float)) and error >= 0)):
            raise _Damaged(f"says that {name} has the error {error}")
        self.name, self.kind, self.shape, self.error = name, kind, tuple(shape), error

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        num = math.prod(self.shape)
        if isinstance(self.kind, torch.dtype):
            return num * self.kind.itemsize
        return codes_nbytes(self.kind, num) + 4 * math.prod(scales_shape(self.kind, self.shape))

    def read(self, data: Tensor) -> PackedWeight | Tensor:
        """Return the tensor that so many bytes are."""
        if isinstance(self.kind, torch.dtype):
            return data.clone().view(self.kind).view(self.shape)
        split = codes_nbytes(self.kind, math.prod(self.shape))
        scales = data[split:].clone().view(torch.float32).view(scales_shape(self.kind, self.shape))
        return PackedWeight(self.kind, self.shape, data[:split].clone(), scales, self.error)
