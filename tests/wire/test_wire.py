"""The round message: what is packed is what is read, and damaged bytes end in one kind of error."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from torch import Tensor, nn

from fedq.errors import FieldError
from fedq.layout import Layout
from fedq.wire import HEADER_NBYTES, Frame, Kind, check_layout, join_body, join_payloads, split_body

SPECS = ["fp32", "int4", "int8:rounding=stochastic", "sign", "ternary", "topk:density=0.1,bits=4"]
SPECS += ["blocktopk:k=1,block=64,bits=2", "randk:density=0.1,bits=32", "threshold:value=0.1,bits=3"]


def layout_of(spec: str) -> Layout:
    with torch.device("meta"):
        return Layout.of(nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 4)), spec)


def message(layout: Layout, seed: int = 5) -> Frame:
    flat = 0.2 * torch.randn(layout.numel, generator=torch.Generator().manual_seed(1))
    body = join_payloads(layout, layout.encode(flat, seed=seed))
    return Frame(Kind.UPDATE, 3, 17, layout.hash, seed, 100.0, 0.5, 0.25, body)


def read(layout: Layout, data: Tensor) -> Tensor:
    """Do what a server does with a message."""
    frame = Frame.unpack(data)
    check_layout(frame, layout)
    out = torch.zeros(layout.numel)
    layout.decode_add(split_body(layout, frame.body), out, seed=frame.seed, weight=frame.weight)
    return out


frames = st.builds(
    Frame,
    kind=st.sampled_from(Kind),
    round=st.integers(0, 2**32 - 1),
    client=st.integers(0, 2**32 - 1),
    layout_hash=st.integers(0, 2**64 - 1),
    seed=st.integers(0, 2**64 - 1),
    weight=st.floats(0, 1e300),
    loss=st.floats(width=32, allow_nan=False),
    accuracy=st.floats(0, 1, width=32),
    body=st.lists(st.integers(0, 255), max_size=40).map(lambda values: torch.tensor(values, dtype=torch.uint8)),
)


@given(frames)
def test_round_trip(frame: Frame) -> None:
    packed = frame.pack()
    assert packed.dtype == torch.uint8
    assert packed.numel() == frame.nbytes == HEADER_NBYTES + frame.body.numel()
    back = Frame.unpack(packed)
    assert torch.equal(back.body, frame.body)
    for name in ("kind", "round", "client", "layout_hash", "seed", "weight", "loss", "accuracy"):
        assert getattr(back, name) == getattr(frame, name)


def test_header_bytes() -> None:
    frame = Frame(Kind.CHANGE, 2, 2**32 - 1, 0xAABB, 7, 1.5, 0.25, 0.75, torch.tensor([9], dtype=torch.uint8))
    expected = b"FQ\x01\x03" + struct.pack("<IIQQdffQ", 2, 2**32 - 1, 0xAABB, 7, 1.5, 0.25, 0.75, 1) + b"\x09"
    assert frame.pack().numpy().tobytes() == expected
    assert HEADER_NBYTES == 52


def test_a_left_out_client_sends_a_header() -> None:
    empty = torch.empty(0, dtype=torch.uint8)
    frame = Frame(Kind.LEFT_OUT, 0, 4, 1, 2, 50.0, float("nan"), 0.0, empty)
    back = Frame.unpack(frame.pack())
    assert back.kind is Kind.LEFT_OUT
    assert back.body.numel() == 0
    assert back.loss != back.loss


@pytest.mark.parametrize("spec", SPECS)
def test_join_and_split_undo_each_other(spec: str) -> None:
    layout = layout_of(spec)
    payloads = layout.encode(torch.randn(layout.numel, generator=torch.Generator().manual_seed(1)), seed=5)
    body = join_payloads(layout, payloads)
    num_sizes = sum(s.role == "coded" for s in layout.spans) if spec.startswith("threshold") else 0
    assert body.numel() == 8 * num_sizes + sum(p.nbytes for p in payloads)
    parts = split_body(layout, body)
    assert all(torch.equal(part, p.data) for part, p in zip(parts, payloads, strict=True))
    if layout.fixed_nbytes is not None:
        assert body.numel() == layout.fixed_nbytes
    data = message(layout).pack()
    expected = torch.zeros(layout.numel)
    flat = 0.2 * torch.randn(layout.numel, generator=torch.Generator().manual_seed(1))
    layout.decode_add([p.data for p in layout.encode(flat, seed=5)], expected, seed=5, weight=100.0)
    assert torch.equal(read(layout, data), expected)


def damaged(data: Tensor, at: int, values: bytes) -> Tensor:
    data = data.clone()
    data[at : at + len(values)] = torch.tensor(list(values), dtype=torch.uint8)
    return data


def test_foreign_and_cut_messages() -> None:
    layout = layout_of("int4")
    data = message(layout).pack()
    for broken, words in [
        (data[:10], "frame bytes=10 .*at least 52"),
        (data[:0], "frame bytes=0 .*at least 52"),
        (data[:-1], "frame body bytes=.*as its header says"),
        (torch.cat((data, data[:1])), "frame body bytes=.*as its header says"),
        (damaged(data, 0, b"PK"), "frame version=.*b'FQ', 1"),
        (damaged(data, 2, b"\x02"), r"frame version=\(b'FQ', 2\).*b'FQ', 1"),
        (damaged(data, 3, b"\x09"), r"frame kind=9.*1 \(UPDATE\), 2 \(LEFT_OUT\), 3 \(CHANGE\)"),
        (damaged(data, 28, struct.pack("<d", float("nan"))), "frame weight=nan.*at least 0"),
        (damaged(data, 28, struct.pack("<d", float("inf"))), "frame weight=inf.*finite"),
        (damaged(data, 28, struct.pack("<d", -1.0)), "frame weight=-1.0.*at least 0"),
    ]:
        with pytest.raises(FieldError, match=words):
            Frame.unpack(broken)


def test_bodies_of_the_wrong_size() -> None:
    layout = layout_of("threshold:value=0.1")
    body = message(layout).body
    for broken in (
        body[:15],
        body[:-1],
        damaged(body, 0, struct.pack("<q", -1)),
        damaged(body, 0, struct.pack("<q", 2**62)),
    ):
        with pytest.raises(FieldError, match="frame body bytes"):
            split_body(layout, broken)
    with pytest.raises(FieldError, match="for this layout"):
        split_body(layout_of("int4"), body)
    for spec in ("int4", "threshold:value=0.1"):
        with pytest.raises(FieldError, match=r"payloads=1 is not allowed"):
            join_body(layout_of(spec), [body[:8]])
    parts = split_body(layout, body)
    parts[0] = damaged(parts[0], 0, struct.pack("<q", 2**60))
    with pytest.raises(FieldError, match=r"threshold:count=.*allowed: 0 to 600"):
        layout.decode_add(parts, torch.zeros(layout.numel), seed=0)


def test_another_layout_is_refused() -> None:
    frame = message(layout_of("int4"))
    check_layout(frame, layout_of("int4"))
    with pytest.raises(FieldError, match=r"frame layout=.*the same model and codecs"):
        check_layout(frame, layout_of("int3"))


MESSAGES = {spec: message(layout_of(spec)).pack() for spec in ("int4", *SPECS[4:])}
LAYOUTS = {spec: layout_of(spec) for spec in MESSAGES}
changes = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4
)


@given(st.sampled_from(sorted(MESSAGES)), changes, st.booleans(), st.floats(0, 1))
@tried(400)
def test_damaged_bytes_end_in_one_kind_of_error(
    spec: str, writes: list[tuple[float, bytes]], keep_header: bool, length: float
) -> None:
    data = MESSAGES[spec]
    for place, values in writes:
        # Half of the examples leave the header whole, so that the damage reaches the payloads.
        first = HEADER_NBYTES if keep_header else 0
        at = first + int(place * (data.numel() - first))
        data = damaged(data, at, values[: data.numel() - at])
    if length < 0.1:
        data = data[: int(10 * length * data.numel())]
    try:
        out = read(LAYOUTS[spec], data)
    except FieldError:
        return
    assert out.numel() == LAYOUTS[spec].numel
