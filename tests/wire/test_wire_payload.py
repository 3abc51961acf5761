"""A payload as bytes: another process needs nothing else, any reader of the format understands them, damage is said."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import wire_reader
from distributed import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from properties import few, is_all, tried

import fedq
from fedq import kernels
from fedq.codecs import codec
from fedq.errors import FieldError
from fedq.layout import Layout
from fedq.wire import Frame, Kind, Limits, Message, join_payloads, note, unpack

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
SPECS = ["fp32", "bf16", "int8", "int4:block=256", "int2", "ternary", "sign:scale=tensor", "int6:scale=channel"]
SPARSE = ["topk:density=0.1", "blocktopk", "randk:density=0.1", "threshold:value=0.5"]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.double(), b.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", few([*SPECS, *SPARSE], 9))
def test_bytes_decode_to_what_the_payload_does(spec: str, dtype: torch.dtype) -> None:
    for shape in ((), (0,), (3, 0, 2), (1,), (7,), (20, 30)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for seed in (0, 5, 2**32, 2**64 - 1, 0xFEDCBA9876543210):
            payload = codec(spec).encode(x, seed=seed)
            for data in (payload.to_bytes(), bytearray(payload.to_bytes()), memoryview(payload.to_bytes())):
                assert same(fedq.decode(data), payload.decode())


@given(st.integers(0, 2**64 - 1), st.integers(0, 10_000))
def test_a_messages_seed_follows_from_that_of_a_span(seed: int, index: int) -> None:
    assert kernels.span_seed(kernels.message_seed(seed, index), index) == seed


@pytest.mark.parametrize("spec", [*SPECS, *SPARSE])
def test_another_reader_of_the_format_understands_them(spec: str) -> None:
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(1)).half()
    payload = codec(spec).encode(x, seed=99)
    read = wire_reader.read(payload.to_bytes())
    (tensor,), (dtype,) = read["tensors"], read["exact"]
    assert (tensor["name"], tensor["shape"], tensor["spec"]) == ("tensor", [20, 30], payload.codec.spec)
    assert tensor["values"]
    assert tensor["decoded"] == replace(payload, dtype=torch.float32).decode().view(-1).tolist()
    assert dtype == {"name": "dtype", "dtype": 7, "shape": [0], "decoded": []}


def decoded(data: bytes) -> str:
    tensor = fedq.decode(data)
    return f"{tensor.dtype} {[*tensor.shape]} {tensor.sum().item()}"


def test_another_process_needs_nothing_else() -> None:
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(1)).half()
    payload = codec("int4").encode(x)
    (told,) = run_ranks(decoded, (payload.to_bytes(),))
    assert told == f"torch.float16 [8, 40] {payload.decode().sum().item()}"
    if is_all():  # in one that has imported nothing
        program = (
            "import sys, fedq; t = fedq.decode(sys.stdin.buffer.read()); print(t.dtype, [*t.shape], t.sum().item())"
        )
        new = subprocess.run([sys.executable, "-c", program], input=payload.to_bytes(), capture_output=True, check=True)
        assert new.stdout.decode().strip() == told


@tried(200)
@given(st.sampled_from(["int4", "threshold:value=0.5"]), st.integers(0, 10**6), st.integers(1, 255))
def test_damage_is_a_field_error(spec: str, at: int, flip: int) -> None:
    whole = bytearray(codec(spec).encode(torch.linspace(-1, 1, 50)).to_bytes())
    whole[at % len(whole)] ^= flip
    with pytest.raises(FieldError):
        fedq.decode(whole)
    with pytest.raises(FieldError):
        fedq.decode(whole[: at % len(whole)])


@pytest.mark.parametrize("data", ["text", None, [1, 2], 7, memoryview(b"abcdef")[::2]])
def test_what_are_no_bytes_is_refused(data: object) -> None:
    with pytest.raises(FieldError, match=r"^message="):
        fedq.decode(data)  # type: ignore[arg-type]


def test_limits_are_kept() -> None:
    data = codec("int4").encode(torch.zeros(1000)).to_bytes()
    fedq.decode(data, Limits(decoded_bytes=4000))
    with pytest.raises(FieldError, match="decoded bytes"):
        fedq.decode(data, Limits(decoded_bytes=3999))
    with pytest.raises(FieldError, match="dimensions"):
        fedq.decode(codec("int4").encode(torch.zeros((1,) * 9)).to_bytes())


def test_messages_of_more_than_a_tensor_are_refused() -> None:
    layout = Layout.of_shapes({"a": (3, 4), "b": (5,)}, "int8")
    body = join_payloads(layout, layout.encode(torch.zeros(17), seed=0))
    frame = Frame(Kind.UPDATE, 0, 0, layout.hash, 0, 1.0, 0.0, 0.0, body)
    for message in (Message(frame, layout), note({"kind": "hello"})):
        with pytest.raises(FieldError, match=r"message tensors=.*fedq\.wire\.unpack"):
            fedq.decode(message.pack())
    one = unpack(codec("int8").encode(torch.zeros(3)).to_bytes())
    for exact, words in (({"more": torch.zeros(1)}, "message tensors"), ({"dtype": torch.zeros(0).int()}, "dtype")):
        with pytest.raises(FieldError, match=words):
            fedq.decode(replace(one, exact=exact).pack())


def test_a_type_without_a_number_is_refused() -> None:
    with pytest.raises(FieldError, match="float8_e4m3fnuz"):
        codec("int8").encode(torch.zeros(3, dtype=torch.float8_e4m3fnuz)).to_bytes()
