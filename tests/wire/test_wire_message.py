"""The self-describing message: what is packed is what is read, whole or in chunks, and what is refused is named."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from torch import Tensor, nn

from fedq.codecs import codec
from fedq.codecs.dense import Cast
from fedq.errors import FieldError
from fedq.layout import Layout, Span
from fedq.models import build_model
from fedq.wire import SERVER, Assembler, Frame, Kind, Limits, Message, crc32c, join_payloads, note, read_note, unpack
from fedq.wire.head import FIXED, Fixed

SPECS = ["fp32", "fp16", "int8", "int4", "int8:scale=channel", "sign", "ternary:rotate=true", "topk:density=0.1,bits=4"]
SPECS += ["blocktopk:k=3,block=64,bits=2", "randk:density=0.1,bits=32", "threshold:value=0.1,bits=3"]
EXACT = {
    "bn.num_batches_tracked": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3, dtype=torch.float64),
    "phase": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128),
    "half": torch.tensor([[1.5], [math.nan]], dtype=torch.bfloat16),
    "eight": torch.ones(3).to(torch.float8_e5m2),
    "mask": torch.arange(5).to(torch.uint16),
}


def layout_of(spec: str) -> Layout:
    with torch.device("meta"):
        return Layout.of(nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 4)), spec)


def values_of(layout: Layout) -> Tensor:
    return 0.2 * torch.randn(layout.numel, generator=torch.Generator().manual_seed(1))


def message_of(layout: Layout, kind: Kind = Kind.UPDATE, seed: int = 0x123456789ABCDEF0) -> Message:
    body = join_payloads(layout, layout.encode(values_of(layout), seed=seed))
    frame = Frame(kind, 3, 17, layout.hash, seed, 100.0, 0.5, 0.25, body)
    return Message(frame, layout, 2**63 + 5, EXACT)


def tensor_of(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def same_frame(a: Frame, b: Frame) -> bool:
    names = ("kind", "round", "client", "layout_hash", "seed", "weight", "loss", "accuracy")
    return all(getattr(a, name) == getattr(b, name) for name in names) and torch.equal(a.body, b.body)


def same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors agree in type, shape and every bit."""
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip_of_every_codec(spec: str) -> None:
    sent = message_of(layout_of(spec))
    data = sent.pack()
    assert len(data) == sent.nbytes
    got = unpack(data)
    assert same_frame(got.frame, sent.frame)
    assert got.layout == sent.layout
    assert got.sequence == sent.sequence
    assert got.pack() == data
    decoded, layout = got.tensors(), sent.layout
    assert layout is not None
    expected = torch.zeros(layout.numel)
    layout.decode_add(
        [p.data for p in layout.encode(values_of(layout), seed=sent.frame.seed)], expected, seed=got.frame.seed
    )
    assert list(decoded) == [span.name for span in layout.spans] + list(EXACT)
    for span in layout.spans:
        assert torch.equal(decoded[span.name], expected[span.slice].view(span.shape))
    for name, tensor in EXACT.items():
        assert same(decoded[name], tensor)
        assert same(got.exact[name], tensor)


@pytest.mark.parametrize(
    "make", [bytes, bytearray, memoryview, lambda b: torch.frombuffer(bytearray(b), dtype=torch.uint8)]
)
def test_unpack_makes_no_copy(make: Callable[[bytes], bytes | Tensor]) -> None:
    data = make(message_of(layout_of("int4")).pack())
    got = unpack(data)
    address = data.data_ptr() if isinstance(data, Tensor) else np.frombuffer(data, np.uint8).ctypes.data
    head = len(got.head())
    assert head % 64 == 0
    assert got.frame.body.data_ptr() == address + head
    views = [t for t in got.exact.values() if t.numel()]
    end = address + got.nbytes
    assert all(address + head <= t.data_ptr() < end or (t.data_ptr() - address) % t.itemsize for t in views)
    assert got.tensors()["flags"].data_ptr() != got.exact["flags"].data_ptr()


@pytest.mark.parametrize("kind", [Kind.LEFT_OUT, Kind.FAILED, Kind.NOTE])
def test_kinds_without_payloads(kind: Kind) -> None:
    text = b"" if kind == Kind.LEFT_OUT else b'{"a":1}'
    sent = Message(Frame(kind, 1, 4, 99, 2, 50.0, math.nan, 0.0, tensor_of(text)), sequence=9)
    got = unpack(sent.pack())
    assert got.layout is None
    assert got.tensors() == {}
    assert (got.frame.kind, got.frame.client, got.frame.layout_hash, got.sequence) == (kind, 4, 99, 9)
    assert got.frame.body.numpy().tobytes() == text
    assert math.isnan(got.frame.loss)
    assert sent.nbytes == len(sent.pack()) == 128 + len(text)


def test_what_is_missing_never_travels() -> None:
    empty = torch.empty(0, dtype=torch.uint8)
    missing = Message(Frame(Kind.MISSING, 1, 4, 0, 0, 0.0, 0.0, 0.0, empty))
    assert missing.nbytes == 0
    with pytest.raises(FieldError, match=r"message kind='MISSING'.*that travels"):
        missing.pack()


def test_notes() -> None:
    text = {"type": "hello", "rounds": 3, "rate": 1.5, "names": ["a", None, True], "größe": "Ω"}
    sent = note(text, round=2, client=5, sequence=11)
    got = unpack(sent.pack())
    assert read_note(got) == text
    assert (got.frame.round, got.frame.client, got.sequence) == (2, 5, 11)
    assert note({}).frame.client == SERVER == 2**32 - 1
    for bad in ({"a": math.nan}, {"a": object()}):
        with pytest.raises(FieldError, match=r"note=.*what JSON can say"):
            note(bad)
    with pytest.raises(FieldError, match=r"message kind='UPDATE'.*NOTE"):
        read_note(message_of(layout_of("int4")))


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b"{", b"\xff", b'{"a":NaN}', b'{"a":' + b"9" * 5000 + b"}", b"[" * 500_000, b'{"a":' * 100_000],
)
def test_hostile_notes(body: bytes) -> None:
    sent = note({})
    frame = replace(
        sent.frame, body=torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else sent.frame.body[:0]
    )
    with pytest.raises(FieldError, match=r"note="):
        read_note(unpack(replace(sent, frame=frame).pack()))


@given(st.integers(1, 700), st.lists(st.integers(0, 3), min_size=1, max_size=4))
@tried(50)
def test_chunks_and_assembler(size: int, which: list[int]) -> None:
    messages = [message_of(layout_of("int4")), note({"a": 1}), message_of(layout_of("threshold:value=0.1")), note({})]
    stream = [messages[i] for i in which]
    data = b"".join(m.pack() for m in stream)
    for one in stream:
        pieces = list(one.chunks(size))
        assert b"".join(pieces) == one.pack()
        assert all(len(piece) == size for piece in pieces[:-1])
        assert 0 < len(pieces[-1]) <= size
    assembler = Assembler()
    got = []
    for start in range(0, len(data), size):
        chunk = data[start : start + size]
        got += assembler.add(chunk)
        taken = start + len(chunk)
        assert assembler.pending == taken - sum(m.nbytes for m in got)
    assert [m.pack() for m in got] == [m.pack() for m in stream]
    assert assembler.pending == 0


def test_the_assembler_allocates_nothing_for_a_refused_head(monkeypatch: pytest.MonkeyPatch) -> None:
    data = message_of(layout_of("int4")).pack()
    empty = torch.empty

    def small(*args: int, **kwargs: object) -> Tensor:
        assert args[0] < 10_000
        return empty(*args, **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", small)
    huge = edited(data, body_nbytes=1 << 40)
    for limits in (Limits(), Limits(message_bytes=1 << 50)):
        assembler = Assembler(limits)
        with pytest.raises(FieldError, match=r"message (bytes|body bytes)="):
            assembler.add(huge)
        assert assembler.pending == 0
        with pytest.raises(FieldError, match=r"message (bytes|body bytes)="):
            assembler.add(data)


# ---- what is refused ---------------------------------------------------------------------------------------------


def edited(data: bytes, *, sums: bool = True, **fields: object) -> bytes:
    """Return a message with other fixed fields and, unless told otherwise, a right checksum of its head."""
    fixed = Fixed._make(FIXED.unpack(data[: FIXED.size]))
    size = fixed.head_nbytes
    head = FIXED.pack(*fixed._replace(**fields)) + data[FIXED.size : size - 4]
    return head + (struct.pack("<I", crc32c(head)) if sums else data[size - 4 : size]) + data[size:]


def cut(data: bytes, old: bytes, new: bytes) -> bytes:
    """Return a message in whose head some bytes are others, as many; the checksum is right."""
    assert len(old) == len(new)
    size = Fixed._make(FIXED.unpack(data[: FIXED.size])).head_nbytes
    head = data[: size - 4]
    assert head.count(old) >= 1
    head = head.replace(old, new, 1)
    return head + struct.pack("<I", crc32c(head)) + data[size:]


def entry(*numbers: int) -> bytes:
    """Return the first numbers of a tensor's entry: bytes of its name, codec, role, sent, dimensions."""
    return struct.pack("<HHBBB", *numbers)


ENTRY = entry(8, 0, 0, 0, 2)
INT4 = message_of(layout_of("int4")).pack()
LEFT_OUT = Message(Frame(Kind.LEFT_OUT, 1, 4, 9, 2, 5.0, 0.0, 0.0, torch.empty(0, dtype=torch.uint8))).pack()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "message bytes=0 .*88 to"),
        (INT4[:80], "message bytes=80 .*88 to"),
        (INT4[:100], "message bytes=100 .*for its head alone"),
        (INT4[:-1], r"message bytes=\d+ .*as its head says"),
        (INT4 + b"\0", r"message bytes=\d+ .*as its head says"),
        (b"PK" + INT4[2:], "message magic=b'PKDQ'.*FEDQ"),
        (edited(INT4, version=2), "message version=2 .*allowed: 1"),
        (edited(INT4, head_nbytes=1 << 30), "message head bytes=1073741824 .*92 to 4194304"),
        (edited(INT4, head_nbytes=91), "message head bytes=91 .*92 to"),
        (edited(INT4, head_nbytes=100), "message head bytes=100 .*multiple of 64"),
        (edited(INT4, sums=False, round=4), "message head checksum='[0-9a-f]{8}'.*as the head says"),
        (INT4[:-1] + bytes([INT4[-1] ^ 1]), "message body checksum='[0-9a-f]{8}'.*as its head says"),
        (edited(INT4, kind=7), r"message kind=7 .*1 \(UPDATE\).*6 \(NOTE\)$"),
        (edited(INT4, kind=0), "message kind=0 "),
        (edited(INT4, kind=4), r"message tensors=\d+ .*none in a message of kind FAILED"),
        (edited(LEFT_OUT, kind=1), "message layout='0000000000000009' .*as its tables say"),
        (edited(INT4, body_nbytes=2**64 - 1), r"message bytes=\d+ .*at most 2147483648"),
        (edited(INT4, payload_nbytes=2**64 - 1), r"message payload bytes=\d+ .*for its tensors"),
        (edited(INT4, num_tensors=2**32 - 1), r"message tensors=\d+ .*at most 10000"),
        (edited(INT4, num_codecs=0), "message codec number=.*order of first use"),
        (edited(INT4, num_codecs=60), "message codecs=60 .*at most"),
        (edited(INT4, num_exact=6), "message head padding="),
        (edited(INT4, num_exact=9), "message dtype=0 .*torch.bool"),
        (edited(INT4, weight=math.nan), "message weight=nan .*finite"),
        (edited(INT4, weight=-1.0), "message weight=-1.0 .*finite"),
        (edited(INT4, layout_hash=1), "message layout='0000000000000001' .*as its tables say"),
        (edited(LEFT_OUT + b"a", body_nbytes=1, payload_nbytes=1), "message body bytes=1 .*at most 0"),
        (cut(INT4, b"int4", b"int9"), "codec='int9' .*int4"),
        (cut(INT4, b"int4", b"INT4"), "message spec='INT4' .*'int4', its canonical text"),
        (cut(INT4, b"int4", b"in\xff4"), "message spec=b'in.xff4' .*UTF-8"),
        (cut(INT4, b"0.weight", b"2.weight"), "message tensor name='2.weight' .*each name once"),
        (cut(INT4, b"0.weight", b"0\nweight"), r"message tensor name='0\\nweight' .*control characters"),
        (cut(INT4, b"flags", b"empty"), "message tensor name='empty' .*each name once"),
        (cut(INT4, b"0.weight", b"9.weight"), "message layout="),
        (cut(INT4, struct.pack("<QQ", 30, 20), struct.pack("<QQ", 20, 30)), "message layout="),
        (cut(INT4, struct.pack("<QQ", 30, 20), struct.pack("<QQ", 2**40, 2**40)), "message decoded bytes=.*at most"),
        (cut(INT4, struct.pack("<QQ", 30, 20), struct.pack("<QQ", 0, 2**63)), "message decoded bytes=.*at most"),
        (cut(INT4, ENTRY, entry(8, 0, 3, 0, 2)), "message role=3 .*2 .stats"),
        (cut(INT4, ENTRY, entry(8, 0, 0, 2, 2)), "message sent=2 .*1 .values"),
        (cut(INT4, ENTRY, entry(8, 1, 0, 0, 2)), "message codec number=1"),
        (cut(INT4, ENTRY, entry(8, 0, 0, 0, 9)), "message dimensions=9 .*at most 8"),
        (cut(INT4, ENTRY, entry(0, 0, 0, 0, 2)), "message name bytes=0 .*1 to 512"),
    ],
)
def test_refused(data: bytes, words: str) -> None:
    for read in (unpack, lambda d: Assembler().add(d)):
        if read is not unpack and "message bytes=" in words and "at most" not in words:
            continue  # a stream has no size of its own
        with pytest.raises(FieldError, match=words):
            read(data)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(message_bytes=500), r"message bytes=\d+ .*500"),
        (Limits(header_bytes=128), r"message head bytes=\d+ .*92 to 128"),
        (Limits(tensors=12), "message tensors=15 .*at most 12"),
        (Limits(name_bytes=7), "message name bytes=8 .*1 to 7"),
        (Limits(spec_bytes=3), "message spec bytes=4 .*1 to 3"),
        (Limits(dims=1), "message dimensions=2 .*at most 1"),
        (Limits(decoded_bytes=2000), "message decoded bytes=2400 .*at most 2000"),
        (Limits(decoded_bytes=3310), r"message decoded bytes=\d+ .*at most 3310"),
    ],
)
def test_limits(limits: Limits, words: str) -> None:
    for read in (unpack, lambda d, limits: Assembler(limits).add(d)):
        with pytest.raises(FieldError, match=words):
            read(INT4, limits)


def test_a_note_beyond_its_limit() -> None:
    data = note({"text": "a" * 2000}).pack()
    assert read_note(unpack(data))["text"] == "a" * 2000
    with pytest.raises(FieldError, match=r"message body bytes=2011 .*at most 2000"):
        unpack(data, Limits(note_bytes=2000))


def test_exact_tensors_are_checked() -> None:
    data = message_of(layout_of("int4")).pack()
    sent = unpack(data)
    body = bytearray(data[len(sent.head()) :])
    at = body.index(b"\x01\x00\x01", sent.frame.body.numel())
    body[at] = 2
    with pytest.raises(FieldError, match=r"message exact tensor='flags' .*0 or 1"):
        unpack(edited(data[: len(sent.head())] + bytes(body), body_checksum=crc32c(body)))
    body[at] = 1
    gap = sent.frame.body.numel()
    assert gap % 8, "there is padding"
    body[gap] = 1
    with pytest.raises(FieldError, match=r"message padding='bn.num_batches_tracked' .*zeros"):
        unpack(edited(data[: len(sent.head())] + bytes(body), body_checksum=crc32c(body)))
    with pytest.raises(FieldError, match=r"exact tensor 'q'=torch.float8_e4m3fnuz"):
        replace(sent, exact={"q": torch.zeros(2, dtype=torch.float8_e4m3fnuz)}).pack()


def test_what_does_not_go_together() -> None:
    sent = message_of(layout_of("int4"))
    assert sent.layout is not None
    for change in (
        {"layout": None},
        {"layout": layout_of("int3")},
        {"layout": sent.layout.part([0])},
        {"frame": replace(sent.frame, kind=Kind.NOTE)},
        {"frame": note({}).frame, "layout": None},
    ):
        with pytest.raises(FieldError, match=r"message layout="):
            replace(sent, **change)
    with pytest.raises(FieldError, match=r"message fields"):
        replace(sent, sequence=-1).pack()


def test_tables_are_read_once_and_judged_by_each_receiver() -> None:
    layout = layout_of("int4")
    frame = replace(message_of(layout).frame, weight=1.0)
    data = [Message(replace(frame, round=number), layout).pack() for number in (1, 2)]
    first, second = (unpack(message) for message in data)
    assert first.layout is second.layout
    assert second.frame.round == 2
    with pytest.raises(FieldError, match="decoded bytes"):
        unpack(data[0], Limits(decoded_bytes=4 * layout.numel - 1))
    other = layout_of("int2")
    assert (
        unpack(
            Message(
                replace(
                    frame, layout_hash=other.hash, body=join_payloads(other, other.encode(values_of(other), seed=1))
                ),
                other,
            ).pack()
        ).layout
        == other
    )


def test_scalars_and_empty_tensors() -> None:
    spans = (
        Span("scalar", (), 0, Cast("fp32"), "coded"),
        Span("none", (3, 0), 1, codec("threshold"), "coded"),
        Span("int", (0,), 1, codec("int4"), "stats", "values"),
    )
    layout = Layout(spans)
    body = join_payloads(layout, layout.encode(torch.tensor([2.5]), seed=1))
    got = unpack(Message(Frame(Kind.MODEL, 0, SERVER, layout.hash, 1, 1.0, 0.0, 0.0, body), layout).pack())
    assert got.layout == layout
    found = got.tensors()
    assert found["scalar"].item() == 2.5
    assert found["scalar"].shape == ()
    assert found["none"].shape == (3, 0)
    # A size that lies about a tensor without elements.
    body = torch.cat((torch.tensor([2]).view(torch.uint8), body[8:], torch.zeros(2, dtype=torch.uint8)))
    lying = Message(Frame(Kind.MODEL, 0, SERVER, layout.hash, 1, 1.0, 0.0, 0.0, body), layout).pack()
    with pytest.raises(FieldError, match=r"threshold:payload bytes=2 .*none for shape"):
        unpack(lying)


def test_a_layout_without_tensors() -> None:
    layout = Layout(())
    empty = join_payloads(layout, [])
    got = unpack(Message(Frame(Kind.UPDATE, 0, 1, layout.hash, 0, 1.0, 0.0, 0.0, empty), layout, exact=EXACT).pack())
    assert got.layout == layout
    assert all(same(got.tensors()[name], tensor) for name, tensor in EXACT.items())


def test_a_small_model_has_little_overhead() -> None:
    with torch.device("meta"):
        layout = Layout.of(build_model("improved_cnn", in_channels=1, image_size=28), "sign")
    assert layout.fixed_nbytes is not None
    body = torch.zeros(layout.fixed_nbytes, dtype=torch.uint8)
    sent = Message(Frame(Kind.UPDATE, 0, 0, layout.hash, 0, 1.0, 0.0, 0.0, body), layout)
    assert sent.nbytes < 1.005 * layout.fixed_nbytes


def test_json_of_a_note_is_compact() -> None:
    body = note({"a": [1, 2]}).frame.body
    assert json.loads(body.numpy().tobytes()) == {"a": [1, 2]}
    assert body.numel() == len('{"a":[1,2]}')
