"""Golden messages: their bytes are a promise between versions, and a second reader reads them by the document alone.

``tests/wire/golden_wire`` holds each message and, as JSON, what it says. After a change that is meant to change the
bytes, ``python tests/wire/test_wire_golden.py`` writes the files again; say so in the changelog and raise the version.
"""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import wire_reader
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from torch import Tensor

from fedq.codecs import codec, codec_names
from fedq.layout import Layout, Role, Span
from fedq.wire import SERVER, Frame, Kind, Message, crc32c, join_payloads, note, unpack
from fedq.wire.head import DTYPES

FOLDER = Path(__file__).parent / "golden_wire"
DOCUMENT = Path(__file__).parents[2] / "docs" / "wire_format.md"
SEED = 0x0123456789ABCDEF
EMPTY = torch.empty(0, dtype=torch.uint8)


def values(num: int) -> Tensor:
    """Return values that integers make: multiples of 1/64 in -7.9 .. 7.9."""
    return torch.tensor([((i * i * 37 + i * 11) % 1013 - 506) / 64 for i in range(num)])


def coded(
    kind: Kind, *tensors: tuple[str, tuple[int, ...], str, Role], sent: str = "change", **exact: Tensor
) -> Message:
    """Return a message of tensors given by name, shape, spec and role."""
    spans, offset = [], 0
    for name, shape, spec, role in tensors:
        spans.append(Span(name, shape, offset, codec(spec), role, sent if role == "coded" else "change"))  # type: ignore[arg-type]
        offset += math.prod(shape)
    layout = Layout(tuple(spans))
    body = join_payloads(layout, layout.encode(values(offset), seed=SEED))
    client = 4 if kind == Kind.UPDATE else SERVER
    return Message(Frame(kind, 6, client, layout.hash, SEED, 600.0, 0.5, 0.875, body), layout, 2**40 + 1, exact)


def model(spec: str) -> tuple[tuple[str, tuple[int, ...], str, Role], ...]:
    plain = spec if spec in ("fp32", "fp16") else "bf16"
    return (
        ("conv.weight", (4, 3, 3), spec, "coded"),
        ("conv.bias", (4,), plain, "exempt"),
        ("bn.mean", (4,), plain, "stats"),
    )


UPDATES = ("int8", "int6:rounding=stochastic", "int4", "int5:scale=channel", "int3:rotate=false,scale=tensor", "int1")
UPDATES += ("ternary", "sign", "sign:block=8", "fp16", "bf16", "topk:density=0.25", "topk:bits=4,density=0.25")
UPDATES += ("blocktopk:bits=3,k=2,block=8", "randk:bits=32,density=0.1", "randk:bits=8,density=0.2")
UPDATES += ("threshold:value=6.0", "threshold:bits=5,value=5.0", "int2", "int7")


def file_name(spec: str) -> str:
    return "update_" + re.sub(r"[:=,]", "_", spec)


def messages() -> dict[str, Message]:
    """Return the golden messages by file name."""
    found = {file_name(spec): coded(Kind.UPDATE, *model(spec)) for spec in UPDATES}
    found["model_fp32"] = coded(Kind.MODEL, *model("fp32"))
    found["change_int8"] = coded(Kind.CHANGE, *model("int8"))
    found["change_values_sign"] = coded(Kind.CHANGE, *model("sign:rotate=true"), sent="values")
    shapes = ("scalar", (), "fp32", "coded"), ("none", (2, 0), "int8", "coded"), ("größe", (3,), "bf16", "exempt")
    exact = {"steps": torch.tensor(7), "flags": torch.tensor([True, False, True]), "mean": torch.tensor([0.1]).double()}
    found["update_exact"] = coded(Kind.UPDATE, *shapes, **exact)  # type: ignore[arg-type]
    found["example"] = coded(Kind.UPDATE, ("w", (2, 3), "int8", "coded"))
    found["left_out"] = Message(Frame(Kind.LEFT_OUT, 6, 4, 99, SEED, 600.0, 0.5, 0.875, EMPTY), sequence=3)
    text = torch.frombuffer(bytearray(b"RuntimeError: out of memory"), dtype=torch.uint8)
    found["failed"] = Message(Frame(Kind.FAILED, 6, 4, 99, SEED, 600.0, 0.5, 0.875, text), sequence=3)
    found["note"] = note(
        {"do": "train", "round": 6, "lr": 0.05, "größe": [1, None]}, round=6, client=SERVER, sequence=8
    )
    return found


def said(message: Message) -> dict[str, Any]:
    """Return what a message says, as the second reader does."""
    frame = message.frame
    names = ("kind", "round", "client", "layout_hash", "seed", "weight", "loss", "accuracy")
    found = {name: getattr(frame, name) for name in names} | {"kind": int(frame.kind), "sequence": message.sequence}
    if message.layout is None:
        return found | {"text": frame.body.numpy().tobytes().decode()}
    numbers = {dtype: number for number, dtype in DTYPES.items()}
    decoded = message.tensors()
    found["tensors"] = [
        {
            "name": span.name,
            "spec": span.codec.spec,
            "role": span.role,
            "values": span.sent == "values",
            "shape": list(span.shape),
            "decoded": decoded[span.name].reshape(-1).tolist(),
        }
        for span in message.layout.spans
    ]
    found["exact"] = [
        {"name": name, "dtype": numbers[t.dtype], "shape": list(t.shape), "decoded": t.reshape(-1).tolist()}
        for name, t in message.exact.items()
    ]
    return found


NAMES = sorted(messages())


@pytest.mark.parametrize("name", NAMES)
def test_golden_bytes(name: str) -> None:
    data, expected = (FOLDER / f"{name}.bin").read_bytes(), json.loads((FOLDER / f"{name}.json").read_text())
    assert messages()[name].pack() == data
    got = unpack(data)
    assert said(got) == expected
    assert got.pack() == data
    assert wire_reader.read(data) == expected


def test_every_codec_and_kind_is_there() -> None:
    files = {file.stem for file in FOLDER.glob("*.*")}
    assert files == set(NAMES)
    assert all(file.stat().st_size < 4096 for file in FOLDER.iterdir())
    whole = [json.loads((FOLDER / f"{name}.json").read_text()) for name in NAMES]
    assert {message["kind"] for message in whole} == {1, 2, 3, 4, 5, 6}
    specs = {tensor["spec"].partition(":")[0] for message in whole for tensor in message.get("tensors", [])}
    assert specs == set(codec_names())


def test_the_document_shows_the_example() -> None:
    text = DOCUMENT.read_text()
    lines = re.findall(r"^    ([0-9a-f]{4})  ((?:[0-9a-f]{2} ?){1,16})", text, re.MULTILINE)
    data = (FOLDER / "example.bin").read_bytes()
    assert b"".join(bytes.fromhex(line) for _, line in lines) == data
    assert [int(at, 16) for at, _ in lines] == list(range(0, len(data), 16))
    decoded = json.loads((FOLDER / "example.json").read_text())["tensors"][0]["decoded"]
    assert ", ".join(f"{value:g}" for value in decoded) in text


def test_the_second_reader_refuses_damage() -> None:
    data = (FOLDER / "update_topk_density_0.25.bin").read_bytes()
    for at in (0, 4, 8, 40, 100, len(data) - 70, len(data) - 1):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(wire_reader.Refused):
            wire_reader.read(bytes(damaged))
    assert wire_reader.crc32c(b"123456789") == 0xE3069283
    body = data[int.from_bytes(data[8:12], "little") :]
    assert struct.unpack_from("<I", data, 20)[0] == crc32c(body) == wire_reader.crc32c(body)


@given(
    st.sampled_from(UPDATES),
    st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple),
    st.integers(0, 2**64 - 1),
)
@tried(60)
def test_both_readers_agree(spec: str, shape: tuple[int, ...], seed: int) -> None:
    span = Span("w", shape, 0, codec(spec), "coded")
    layout = Layout((span,))
    flat = values(span.numel)[: span.numel]
    body = join_payloads(layout, layout.encode(flat, seed=seed))
    data = Message(Frame(Kind.UPDATE, 0, 0, layout.hash, seed, 1.0, 0.0, 0.0, body), layout).pack()
    (read,) = wire_reader.read(data)["tensors"]
    assert read["decoded"] == unpack(data).tensors()["w"].reshape(-1).tolist()


def write() -> None:
    """Write all files again."""
    for file in FOLDER.iterdir():
        file.unlink()
    for name, message in messages().items():
        (FOLDER / f"{name}.bin").write_bytes(message.pack())
        (FOLDER / f"{name}.json").write_text(json.dumps(said(unpack(message.pack())), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write()
