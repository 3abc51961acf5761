"""Hostile bytes: whatever a sender writes, with checksums that are right, ends in one kind of error or in a tensor."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import fuzz_wire
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from torch import Tensor
from wire_mutants import mutant

from fedq import kernels
from fedq.codecs import Payload, codec
from fedq.errors import FieldError
from fedq.kernels import SparsePlan, cpu
from fedq.kernels.reference import pack_bits
from fedq.layout import Layout, Span
from fedq.wire import Frame, Kind, Message, join_payloads, unpack

BATCH = 20


@pytest.fixture(params=["cpp", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpp" and cpu.why_missing():
        pytest.skip(cpu.why_missing())
    monkeypatch.setenv("FEDQ_KERNELS", request.param)
    return str(request.param)


@given(st.integers(0, 2**48))
@tried(100)
def test_mutants(seed: int) -> None:
    """Two thousand frames; ``tests/stress/fuzz_wire.py`` takes a million."""
    for number in range(BATCH):
        fuzz_wire.check(mutant(seed * BATCH + number), number)


def test_the_fuzzer_ends_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fuzz_wire.main(["--seed", "3", "--out", str(tmp_path), "--frames", "300"]) == 0
    found = capfd.readouterr().out
    assert "300 frames in" in found
    assert re.search(r"^ +\d+  decoded$", found, re.MULTILINE)
    assert not list(tmp_path.iterdir())


FAILURES: dict[str, Callable[[], object]] = {
    "ended with -9": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "RecursionError": lambda: json.loads("[" * 100_000),
    "MemoryError": lambda: bytearray(1 << 34),  # more than a process that ran other tests has left in its heap
}


@pytest.mark.parametrize("words", FAILURES)
def test_the_fuzzer_reports_a_failure(
    words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that dies, raises something else or allocates too much at one frame."""
    check, wrong = fuzz_wire.check, mutant(3 << 40 | 249)

    def breaks(data: bytes, number: int) -> str:
        if data == wrong:
            FAILURES[words]()
        return check(data, number)

    monkeypatch.setattr(fuzz_wire, "check", breaks)
    assert fuzz_wire.main(["--seed", "3", "--out", str(tmp_path), "--frames", "300"]) == 1
    found = capfd.readouterr().out
    assert "frame 249 FAILED" in found
    assert words in found
    (saved,) = tmp_path.iterdir()
    assert saved.read_bytes() == wrong


# ---- positions ---------------------------------------------------------------------------------------------------


def elias_fano(indices: list[int], universe: int) -> Tensor:
    """Code indices that need not rise inside equal upper bits, nor lie below the universe."""
    num = len(indices)
    low = (universe // num).bit_length() - 1
    upper = torch.zeros(num + ((universe - 1) >> low), dtype=torch.uint8)
    upper[[(at >> low) + i for i, at in enumerate(indices)]] = 1
    return torch.cat((pack_bits(torch.tensor([at & (1 << low) - 1 for at in indices]), low), pack_bits(upper, 1)))


def sparse_payload(spec: str, indices: list[int], num: int) -> Payload:
    """Return a payload of ones at given positions."""
    kept = len(indices)
    sections = [torch.tensor([kept]).view(torch.uint8)] if spec.startswith("threshold") else []
    if spec.startswith("blocktopk"):
        sections.append(pack_bits(torch.tensor(indices), 4))
    else:
        sections.append(elias_fano(indices, num))
    sections.append(torch.ones(kept).view(torch.uint8))
    return Payload(torch.cat(sections), codec(spec), (num,), torch.float32, 0)


WRONG = [
    ("topk:bits=32,density=0.04", [5, 5, 70, 80]),  # twice the same
    ("topk:bits=32,density=0.04", [6, 5, 70, 80]),  # falls inside its upper bits
    ("topk:bits=32,density=0.04", [5, 7, 80, 100]),  # behind the last element
    ("threshold:bits=32", [5, 5, 70, 80]),
    ("threshold:bits=32", [5, 7, 80, 110]),
    ("blocktopk:bits=32,block=16,k=2", [3, 3, *range(2, 14)]),
    ("blocktopk:bits=32,block=16,k=2", [4, 3, *range(2, 14)]),
    ("blocktopk:bits=32,block=16,k=2", [*range(2, 14), 15, 14]),
]


@pytest.mark.parametrize(("spec", "indices"), WRONG)
def test_positions_out_of_order_are_refused(spec: str, indices: list[int], implementation: str) -> None:
    """Without the check the implementations differ: one adds a value twice, the other once; two threads may race."""
    payload = sparse_payload(spec, indices, 100)
    out = torch.full((100,), 3.0)
    for act in (
        payload.decode,
        lambda: payload.codec.decode_add(payload, out),
        lambda: payload.codec.decode_sum([payload], [1.0], out),
        lambda: payload.codec.check(payload.data, (100,)),
    ):
        with pytest.raises(FieldError, match=r"indices='out of order'.*rising"):
            act()
    assert bool((out == 3.0).all()), "what is refused leaves the sum alone"
    layout = Layout((Span("w", (100,), 0, payload.codec, "coded"),))
    body = join_payloads(layout, [payload])
    data = Message(Frame(Kind.UPDATE, 0, 1, layout.hash, 0, 1.0, 0.0, 0.0, body), layout).pack()
    with pytest.raises(FieldError, match=r"indices='out of order'"):
        unpack(data)


def test_padding_of_the_last_block_is_no_error(implementation: str) -> None:
    payload = sparse_payload("blocktopk:bits=32,block=16,k=2", [0, 1] * 6 + [3, 15], 100)
    decoded = payload.decode()
    assert decoded.nonzero().view(-1).tolist() == [i for b in range(0, 96, 16) for i in (b, b + 1)] + [99]


@given(st.data())
@tried(60)
def test_implementations_refuse_and_decode_alike(data: st.DataObject) -> None:
    """Random bytes of the right size, in pieces that threads share: large enough for several of them."""
    if cpu.why_missing():
        pytest.skip(cpu.why_missing())
    plan = data.draw(
        st.sampled_from(
            [
                SparsePlan("topk", 4, density=0.4),
                SparsePlan("topk", 16, density=0.001),
                SparsePlan("blocktopk", 2, k=1, block=64),
                SparsePlan("blocktopk", 8, k=7, block=8),
                SparsePlan("randk", 32, density=0.1),
            ]
        )
    )
    num = data.draw(st.sampled_from([1, 5, 100, 4097, 50_000]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    if data.draw(st.booleans()):
        payload = torch.randint(0, 256, (plan.nbytes(num),), dtype=torch.uint8, generator=generator)
    else:
        payload = kernels.reference.encode(plan, torch.randn(num, generator=generator), seed=3)
        at = torch.randint(0, payload.numel(), (2,), generator=generator)
        payload[at] = torch.randint(0, 256, (2,), dtype=torch.uint8, generator=generator)
    outcomes = []
    for module in (cpu, kernels.reference):
        out = torch.zeros(num)
        try:
            module.check(plan, payload, num)
            module.decode(plan, payload, num, seed=3, out=out, weight=0.5)
            outcomes.append(out)
        except FieldError as error:
            assert not out.any()
            outcomes.append(str(error))
    first, second = outcomes
    if isinstance(first, str) or isinstance(second, str):
        assert first == second
    else:
        assert torch.equal(first.nan_to_num(), second.nan_to_num())


def test_a_count_that_lies(implementation: str) -> None:
    payload = sparse_payload("threshold:bits=32", [5, 7, 70, 80], 100)
    payload.codec.check(payload.data, (100,))
    for count in (-1, 3, 5, 101, 2**62):
        payload.data[:8] = torch.tensor([count]).view(torch.uint8)
        with pytest.raises(FieldError, match=r"threshold"):
            payload.decode()
        with pytest.raises(FieldError, match=r"threshold"):
            payload.codec.check(payload.data, (100,))


def test_elements_that_64_bits_cannot_cut_into_runs() -> None:
    with pytest.raises(FieldError, match=r"randk:elements=4294967296 .*below 2\^63"):
        codec("randk:density=0.9").payload_nbytes((1 << 32,))


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80, 0x8000, 0x0001])
@pytest.mark.parametrize("spec", ["int8", "int4", "sign", "ternary", "topk:bits=4,density=0.2", "blocktopk:bits=2"])
def test_any_scale_is_a_value(spec: str, bits: int, implementation: str) -> None:
    """NaN, infinity, minus zero and denormals are for the receiver of the tensor to find, and harm no memory."""
    payload = codec(spec).encode(torch.linspace(-1, 1, 300), seed=1)
    payload.data[-2:] = torch.tensor([bits & 255, bits >> 8], dtype=torch.uint8)
    payload.codec.check(payload.data, (300,))
    assert payload.decode().shape == (300,)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_the_upper_half_of_the_range_survives_eight_bits(size: int, implementation: str) -> None:
    """The reference system casts codes 0 .. 255 to int8, so weights above the middle come back negative."""
    x = np.random.default_rng(size).uniform(0.5, 1.0, size).astype(np.float32)
    layout = Layout((Span("w", (size,), 0, codec("int8"), "coded"),))
    payloads = layout.encode(torch.from_numpy(x), seed=7)
    frame = Frame(Kind.UPDATE, 0, 1, layout.hash, 7, 1.0, 0.0, 0.0, join_payloads(layout, payloads))
    decoded = unpack(Message(frame, layout).pack()).tensors()["w"].numpy()
    codes = payloads[0].data[:size].numpy()
    assert codes.min() > 128
    assert (codes.view(np.int8) < 0).all(), "what the wrap-around would make of them"
    expected = np.empty_like(x)
    for start in range(0, size, 256):
        block = x[start : start + 256]
        scale = np.float32(torch.tensor(np.abs(block).max() / np.float32(127)).to(torch.bfloat16).item())
        expected[start : start + 256] = np.clip(np.rint(block / scale), -127, 127).astype(np.float32) * scale
    # A quotient next to a half may round to either side: the kernels multiply by the reciprocal.
    assert np.allclose(decoded, expected, rtol=0, atol=0.009)
    assert (decoded == expected).mean() > 0.99
    assert np.abs(decoded - x).max() <= 0.005
    assert decoded.min() > 0.49
