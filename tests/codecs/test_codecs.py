"""The contract that every registered codec passes, and what single codecs promise beyond it."""

from __future__ import annotations

import importlib.util
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from properties import few, tried
from torch import Tensor

import fedq.codecs.base as base
from fedq.codecs import Codec, codec, codec_names, codec_schedule
from fedq.errors import FieldError
from fedq.kernels import reference
from fedq.kernels.plan import bf16_bits, largest_scale

OPTIONS = {
    "int1": ["rounding=stochastic", "scale=tensor"],
    "int2": ["block=64", "rotate=false"],
    "int3": ["rounding=stochastic"],
    "int4": ["block=1024", "rotate=false", "scale=tensor", "scale=channel", "rounding=stochastic"],
    "int6": ["scale=channel,rounding=stochastic"],
    "int8": ["rotate=true", "scale=channel", "rounding=stochastic", "block=8"],
    "ternary": ["rotate=true", "rounding=stochastic", "scale=channel", "scale=tensor"],
    "sign": ["scale=unbiased", "rotate=true", "rounding=stochastic", "scale=tensor", "scale=channel"],
    "topk": ["density=0.1,bits=32", "density=0.123456789,bits=4", "density=1,bits=1"],
    "blocktopk": ["k=1,block=64,bits=2", "k=7,block=16,bits=8", "k=12000,block=16384,bits=4"],
    "randk": ["density=0.1,bits=32", "density=0.5,bits=3", "density=0.1,unbias=true"],
    "threshold": ["value=0.5", "value=0.1,bits=5"],
}
SPECS = [f"{name}:{options}" if options else name for name in codec_names() for options in ["", *OPTIONS.get(name, [])]]
SHAPES = [(0,), (3, 0, 2), (), (1,), (37,), (1000,), (5, 3, 3, 3), (64, 70)]
CHUNK = 5 << 15


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nmse(x: Tensor, decoded: Tensor) -> float:
    x, decoded = x.double(), decoded.double()
    return ((decoded - x).square().sum() / x.square().sum()).item()


def seed_list(num: int) -> list[int]:
    source = random.Random(7)
    return [source.getrandbits(64) for _ in range(num)]


# ---- the contract ----------------------------------------------------------------------------------------------------


def check_sizes(c: Codec) -> None:
    """What is announced, what the sections add up to and what travels are one number."""
    for shape in SHAPES:
        payload = c.encode(gaussian(*shape), seed=1)
        assert payload.data.dtype == torch.uint8
        assert payload.data.dim() == 1
        assert payload.data.is_contiguous()
        assert payload.nbytes == sum(c.section_nbytes(shape, payload.data).values()), shape
        assert payload.bits_per_element == 8 * payload.nbytes / max(1, math.prod(shape))
        if c.fixed_size:
            assert payload.nbytes == c.payload_nbytes(shape)
    if not c.fixed_size:
        with pytest.raises(FieldError, match="size follows from the shape"):
            c.payload_nbytes(5)
    elif "channel" not in c.spec:
        assert c.payload_nbytes(90) == c.payload_nbytes((9, 10))


def check_round_trip(c: Codec) -> None:
    """Shape and data type come back, values are finite, the input is left alone."""
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = gaussian(*shape).to(dtype)
            before = x.clone()
            decoded = c.encode(x, seed=3).decode()
            assert (decoded.shape, decoded.dtype) == (x.shape, dtype)
            assert decoded.isfinite().all()
            assert torch.equal(x, before)
    with pytest.raises(FieldError, match=r"x\.dtype.*floating-point"):
        c.encode(torch.arange(5), seed=0)


def check_bytes_are_determined(c: Codec) -> None:
    """Same values, shape and seed: same bytes, whatever the memory format."""
    x = gaussian(6, 5, 4, 3)
    data = c.encode(x, seed=9).data
    for twin in (
        x.clone(),
        x.to(memory_format=torch.channels_last),
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):
        assert torch.equal(c.encode(twin, seed=9).data, data)
    wide = torch.zeros(6, 5, 4, 7)
    wide[..., 2:5] = x
    assert torch.equal(c.encode(wide[..., 2:5], seed=9).data, data)
    assert torch.equal(c.encode(x.requires_grad_(), seed=9).data, data)


def check_the_payload_is_its_own(c: Codec) -> None:
    """Neither the input nor a decoded tensor shares memory with the payload."""
    x = gaussian(300)
    payload = c.encode(x, seed=2)
    before, first = payload.data.clone(), payload.decode()
    payload.decode().fill_(7.0)
    x.fill_(7.0)
    assert torch.equal(payload.data, before)
    assert torch.equal(payload.decode(), first)


def check_out(c: Codec) -> None:
    """``out`` receives the same bytes and must have their size."""
    x = gaussian(300)
    data = c.encode(x, seed=2).data
    out = torch.full_like(data, 255)
    assert c.encode(x, seed=2, out=out).data is out
    assert torch.equal(out, data)
    for wrong in (-1, 1):
        with pytest.raises(FieldError, match=f"out bytes={data.numel() + wrong}.*{data.numel()} for"):
            c.encode(x, seed=2, out=torch.empty(data.numel() + wrong, dtype=torch.uint8))


def check_spec(c: Codec) -> None:
    """A codec is its spec string."""
    assert codec(c.spec) == c
    assert hash(codec(c.spec)) == hash(c)
    assert codec(c) is c
    assert str(c) == c.spec
    for feedback in (False, True):
        resolved = c.resolved(feedback=feedback)
        assert codec(resolved.spec) == resolved
        assert resolved.resolved(feedback=feedback) == resolved


def check_decode_add(c: Codec) -> None:
    """``decode_add`` rounds product and sum separately."""
    payload, out = c.encode(gaussian(400), seed=2), gaussian(400, seed=5)
    expected = out + torch.tensor(0.3) * payload.decode()
    c.decode_add(payload, out, 0.3)
    assert torch.equal(out, expected)


def check_damaged_sizes(c: Codec) -> None:
    """Bytes that are missing or too many are refused with the size that would fit."""
    payload = c.encode(gaussian(300), seed=2)
    longer = torch.cat((payload.data, payload.data.new_zeros(1)))
    for data in (payload.data[:-1], payload.data[:3], payload.data[:0], longer):
        with pytest.raises(FieldError, match=rf"payload bytes={data.numel()}\b.*allowed"):
            type(payload)(data, c, payload.shape, payload.dtype, payload.seed).decode()


def check_zeros(c: Codec) -> None:
    """Nothing to say is decoded as nothing."""
    for x in (torch.zeros(700), -torch.zeros(3, 200)):
        assert (c.encode(x, seed=4).decode() == 0).all()


def check_extremes(c: Codec) -> None:
    """Finite values stay finite: denormal, tiny, huge, and huge beside tiny."""
    ramp = torch.linspace(-1, 1, 300)
    mixed = torch.where(torch.arange(300) % 7 == 0, ramp * 1e30, ramp * 1e-30)
    for x in (ramp * 1e-40, ramp * 1e-44, ramp * 1e-25, ramp * 1e30, mixed, torch.full((300,), 1e-38)):
        residual = torch.zeros(300)
        payload = c.encode_with_residual(x, residual, seed=4)
        assert payload.decode().isfinite().all()
        assert residual.isfinite().all()


def check_nonfinite(c: Codec) -> None:
    """NaN and infinity arrive where they sat, if that element is sent at all."""
    for value in (math.nan, math.inf, -math.inf):
        x = gaussian(600)
        x[137] = value
        first, again = c.encode(x, seed=4), c.encode(x, seed=4)
        assert torch.equal(first.data, again.data)
        if not c.spec.startswith("randk"):
            assert not first.decode()[137].isfinite(), value


def check_nonfinite_residual(c: Codec) -> None:
    """A residual never takes up a NaN or an infinity."""
    for value in (math.nan, math.inf, -math.inf):
        x = gaussian(600)
        x[137] = value
        residual = gaussian(600, seed=5)
        c.encode_with_residual(x, residual, seed=4)
        assert residual.isfinite().all()


CONTRACT: list[Callable[[Codec], None]] = [
    check_sizes,
    check_round_trip,
    check_bytes_are_determined,
    check_the_payload_is_its_own,
    check_out,
    check_spec,
    check_decode_add,
    check_damaged_sizes,
    check_zeros,
    check_extremes,
    check_nonfinite,
    check_nonfinite_residual,
]


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__[6:])
@pytest.mark.parametrize("spec", few(SPECS, 18))
def test_contract(spec: str, check: Callable[[Codec], None]) -> None:
    check(codec(spec))


HUGE = float(np.float32(1e30))
finite = st.floats(-HUGE, HUGE, width=32)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=12), elements=finite)


def check_residual(c: Codec, x: Tensor, old: Tensor, seed: int) -> None:
    new = old.clone()
    payload = c.encode_with_residual(x, new, seed=seed)
    decoded, total = payload.decode().double(), x.double() + old.double()
    assert decoded.isfinite().all()
    # Two float32 roundings, of x + old and of its difference to the decoded value; together at most
    # 2^-23·max(|decoded|, |x + old|) where both have one sign.
    bound = 2.0**-24 * (1 + 2.0**-20) * (total.abs() + (total - decoded).abs()) + 2.0**-148
    assert ((decoded + new.double() - total).abs() <= bound).all()


@pytest.mark.parametrize("spec", few(SPECS, 18))
@given(values=arrays, seed=st.integers(0, 2**64 - 1))
@example(values=np.full((2, 3), 1e-45, np.float32), seed=0)
@example(values=np.array([1e30, 1e-30], np.float32), seed=1)
@tried(6)
def test_any_values(spec: str, values: np.ndarray, seed: int) -> None:
    x = torch.from_numpy(values.copy())
    check_residual(codec(spec), x, x.flip(0) * 0.25, seed)


@pytest.mark.parametrize("spec", few(SPECS, 18))
def test_residual_on_ordinary_values(spec: str) -> None:
    check_residual(codec(spec), gaussian(40, 50), 0.1 * gaussian(40, 50, seed=1), 5)


# ---- the codec of the documentation ----------------------------------------------------------------------------------


def test_the_documented_codec_passes_the_contract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    text = (Path(__file__).parents[2] / "docs" / "adding_a_codec.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    file = tmp_path / "power.py"
    file.write_text(blocks[0])
    module_spec = importlib.util.spec_from_file_location("documented_codec", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    monkeypatch.setitem(sys.modules, "documented_codec", module)
    module_spec.loader.exec_module(module)

    for spec in ("pow2", "pow2:block=32", "pow2:rotate=true", "pow2:scale=channel"):
        for check in CONTRACT:
            check(codec(spec))
        check_residual(codec(spec), gaussian(400), gaussian(400, seed=1), 5)
    with pytest.raises(FieldError, match="pow2:rounding='stochastic'"):
        codec("pow2:rounding=stochastic")
    x = torch.tensor([64.0, 32.0, 33.0, -24.5, -16.0, 1.0, 0.9, 0.3, 0.0, 47.0])
    expected = [64.0, 32.0, 32.0, -32.0, -16.0, 1.0, 1.0, 0.0, 0.0, 32.0]
    assert codec("pow2").encode(x, seed=0).decode().tolist() == expected
    monkeypatch.undo()
    assert "pow2" not in codec_names()


# ---- more than one chunk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["int1", "int3", "int4", "int8:rounding=stochastic", "ternary:rotate=true", "sign"])
@pytest.mark.parametrize("tail", [0, 1, 300])
def test_chunks_never_show(spec: str, tail: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQ_KERNELS", "reference")
    x, c = gaussian(CHUNK + tail), codec(spec)
    payload = c.encode(x, seed=11)
    whole = payload.decode()
    assert payload.nbytes == c.payload_nbytes(x.numel())
    for chunk in (1 << 12, 1 << 20):
        monkeypatch.setattr(reference.blocks, "CHUNK", chunk)
        assert torch.equal(c.encode(x, seed=11).data, payload.data)
        assert torch.equal(payload.decode(), whole)


def test_blocks_are_independent() -> None:
    x, c = gaussian(CHUNK + 700), codec("int8")
    data = c.encode(x, seed=0).data
    parts = [c.encode(part, seed=0) for part in x.split(256)]
    codes = torch.cat([p.data[: math.prod(p.shape)] for p in parts])
    scales = torch.cat([p.data[math.prod(p.shape) :] for p in parts])
    assert torch.equal(data, torch.cat((codes, scales)))


# ---- unbiased codecs -------------------------------------------------------------------------------------------------

UNBIASED = [spec for spec in SPECS if codec(spec).unbiased]


def test_which_codecs_are_unbiased() -> None:
    stochastic = {spec for spec in SPECS if "stochastic" in spec}
    assert set(UNBIASED) == stochastic | {"randk:density=0.1,unbias=true"}
    assert not any(codec(spec).wants_feedback for spec in UNBIASED)


@pytest.mark.parametrize("spec", UNBIASED)
def test_the_mean_over_seeds_is_the_input(spec: str) -> None:
    c, num_seeds, num = codec(spec), 500, 512
    x = gaussian(4, num // 4)
    decoded = torch.stack([c.encode(x, seed=seed).decode().double().view(-1) for seed in seed_list(num_seeds)])
    error = decoded.mean(dim=0) - x.double().view(-1)
    # Without bias the squared error is var/num_seeds in the mean. Its sum over 512 elements, weighted at worst by x^2,
    # has a relative deviation of sqrt(2·3/512) = 0.11: five of them. A bias of 0.04 standard deviations would show.
    assert error.square().sum() * num_seeds / decoded.var(dim=0).sum() < 1.55


@pytest.mark.parametrize("spec", ["int8", "int4:rotate=false", "int4", "int2", "int1", "ternary", "sign"])
def test_stochastic_rounding_has_no_common_bias(spec: str) -> None:
    # A quick rounder may look right element by element and still be off by 0.006 of a step in the mean. So all elements
    # have one value between two levels, next to a 1 in each block that sets the scale.
    c = codec(spec + (":" if ":" not in spec else ",") + "rounding=stochastic")
    num = 1 << 17
    for value in (0.016, 0.3, -0.55):
        x = torch.full((num,), value)
        x[:: c.block] = 1.0  # type: ignore[attr-defined]
        decoded = c.encode(x, seed=0xABCDEF0123456789).decode()
        error = (decoded - x).double()
        # Five standard errors, 0.007 of a step for int8; a rotation keeps the errors uncorrelated.
        assert abs(error.mean().item()) <= 5 * error.std().item() / math.sqrt(num) + 1e-7, value


def test_noise_belongs_to_the_client_and_rotation_to_the_round() -> None:
    x = gaussian(2000)
    for spec, differs in (
        ("int8:rounding=stochastic", True),
        ("int4", False),
        ("randk", False),
        ("sign:rotate=true", False),
    ):
        one, two = (codec(spec).encode(x, seed=5 | high << 32) for high in (1, 2))
        assert torch.equal(one.data, two.data) is not differs, spec
    for spec in ("int4", "randk", "int8:rounding=stochastic"):
        assert not torch.equal(codec(spec).encode(x, seed=5).data, codec(spec).encode(x, seed=6).data), spec


# ---- grids -----------------------------------------------------------------------------------------------------------


def test_int8_keeps_the_upper_half_of_its_range() -> None:
    x = torch.linspace(-1, 1, 256)
    decoded = codec("int8").encode(x, seed=0).decode()
    # Half a step of absmax/127, and the bfloat16 rounding (2^-8) of that step over 127 of them at the ends.
    assert (decoded - x).abs().max() <= 1 / 254 + 2.0**-9
    assert (decoded.diff() >= 0).all()
    assert (decoded.sign() == x.sign())[x.abs() > 1 / 254].all()


@given(hnp.arrays(np.float32, 256, elements=st.floats(-1e4, 1e4, width=32)))
@tried(50)
def test_int8_error_is_half_a_step(values: np.ndarray) -> None:
    x = torch.from_numpy(values.copy())
    payload = codec("int8").encode(x, seed=0)
    codes, absmax = payload.data[:256], float(x.abs().max())
    assert codes.min() >= 1  # -127 .. 127: the grid is symmetric
    error = (payload.decode() - x).abs().max().item()
    assert error <= absmax / 254 * (1 + 2.0**-7) + absmax * 2.0**-9 + 2.0**-126 * 127


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    "options", ["rotate=false", "rotate=true", "rounding=stochastic", "rotate=true,rounding=stochastic"]
)
def test_codes_stay_on_the_grid(bits: int, options: str) -> None:
    c = codec(f"int{bits}:{options}")
    x = torch.cat((gaussian(256), torch.linspace(-3, 3, 256), torch.full((256,), 5.0), -torch.eye(256)[7] * 9))
    decoded = codec(f"int{bits}:{options}").encode(x, seed=3).decode()
    half = 1 << (bits - 1)
    scales = c.encode(x, seed=3).data[-8:].clone().view(torch.bfloat16).float()
    if not c.rotates:  # type: ignore[attr-defined]
        levels = decoded.view(4, 256) / scales.unsqueeze(1)
        offset = 0.5 if bits == 1 else 0.0
        # A level times a bfloat16 scale, divided by it again: exact to one rounding.
        assert torch.allclose(levels + offset, (levels + offset).round(), atol=1e-4)
        assert levels.abs().max() <= max(half - 1, 0.5) + 1e-4
    if "stochastic" in options:
        # Nothing is clipped, so no element is off by more than a step; rotated, the norm of a block is.
        step = 16 if c.rotates else 1  # type: ignore[attr-defined]
        assert ((decoded - x).view(4, 256).abs().amax(dim=1) <= scales * step * 1.001).all()


def test_ternary_has_three_levels_and_sign_two() -> None:
    x = gaussian(1024)
    for spec, count in (
        ("ternary:block=1024", 3),
        ("sign", 2),
        ("int1:block=1024", 2),
        ("int2:rotate=false,block=1024", 3),
    ):
        decoded = codec(spec).encode(x, seed=0).decode()
        assert decoded.unique().numel() == count, spec
        assert (decoded * x >= 0).all()


def test_channels_have_their_own_scale() -> None:
    x = gaussian(3, 50) * torch.tensor([[1.0], [1e3], [1e-3]])
    decoded = codec("int8:scale=channel").encode(x, seed=0).decode()
    for row in range(3):
        assert nmse(x[row], decoded[row]) < 1e-4


def test_sign_scales() -> None:
    x = gaussian(1000)
    for spec, expected in (("sign", x.abs().mean()), ("sign:scale=unbiased", x.square().sum() / x.abs().sum())):
        decoded = codec(spec).encode(x, seed=0).decode()
        assert decoded.abs().max().item() == pytest.approx(expected.item(), rel=2.0**-8)  # bfloat16
    assert codec("sign").resolved(feedback=True) == codec("sign:magnitude=mean") == codec("sign:scale=mean")
    assert codec("sign").resolved(feedback=False) == codec("sign:scale=mean")
    rotated = codec("sign:rotate=true")
    assert rotated.resolved(feedback=False) == codec("sign:rotate=true,scale=unbiased")
    assert rotated.resolved(feedback=True) == codec("sign:rotate=true,scale=mean")


# ---- sparse codecs ---------------------------------------------------------------------------------------------------


def strongest(values: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k])


few_values = st.lists(st.sampled_from([-2.0, -1.0, 1.0, 2.0, 3.0, 0.5]), min_size=1, max_size=120)


@given(few_values, st.sampled_from([0.01, 0.1, 0.37, 1.0]))
def test_topk_keeps_the_strongest_and_of_ties_the_first(values: list[float], density: float) -> None:
    kept = strongest(values, max(1, round(density * len(values))))
    decoded = codec(f"topk:density={density}").encode(torch.tensor(values), seed=0).decode()
    assert decoded.tolist() == [v if i in kept else 0.0 for i, v in enumerate(values)]


@given(few_values, st.sampled_from([(1, 4), (3, 8), (1, 64), (16, 16)]))
def test_blocktopk_keeps_the_strongest_of_each_block(values: list[float], option: tuple[int, int]) -> None:
    k, block = option
    expected = [0.0] * len(values)
    for start in range(0, len(values), block):
        for i in strongest(values[start : start + block], k):
            expected[start + i] = values[start + i]
    payload = codec(f"blocktopk:k={k},block={block}").encode(torch.tensor(values), seed=0)
    assert payload.decode().tolist() == expected
    num_kept = k * -(-len(values) // block)
    assert payload.nbytes == math.ceil(num_kept * math.log2(block) / 8) + 2 * num_kept


@given(few_values)
def test_threshold_keeps_exactly_what_reaches_it(values: list[float]) -> None:
    decoded = codec("threshold:value=1,bits=32").encode(torch.tensor(values), seed=0).decode()
    assert decoded.tolist() == [v if abs(v) >= 1 else 0.0 for v in values]


def test_randk_positions_are_shared_and_spread() -> None:
    c, x = codec("randk:density=0.1,bits=32"), torch.arange(1.0, 1006.0)
    decoded = c.encode(x, seed=3).decode()
    kept = decoded.nonzero().view(-1)
    assert kept.numel() == 100
    assert torch.equal(decoded[kept], x[kept])
    runs = [range(1005 * i // 100, 1005 * (i + 1) // 100) for i in range(100)]
    assert all(int(p) in run for p, run in zip(kept, runs, strict=True))
    assert torch.equal(c.encode(x, seed=3 | 9 << 32).decode(), decoded)
    counts = sum((c.encode(x, seed=seed).decode() != 0).int() for seed in seed_list(300))
    # 300 draws at a tenth: 30 hits an element; eight standard deviations of 5.2 would be 72.
    assert int(counts.min()) > 0
    assert int(counts.max()) < 72


def test_reducible_payloads_may_be_summed() -> None:
    for spec in ("fp32", "randk:density=0.1,bits=32"):
        c, xs = codec(spec), [gaussian(500, seed=i) for i in range(3)]
        assert c.reducible
        payloads = [c.encode(x, seed=4 | i << 32) for i, x in enumerate(xs)]
        total = sum(p.data.view(torch.float32) for p in payloads)
        assert isinstance(total, Tensor)
        summed = type(payloads[0])(total.view(torch.uint8), c, (500,), torch.float32, 4)
        torch.testing.assert_close(summed.decode(), sum(p.decode() for p in payloads))
    assert not any(codec(s).reducible for s in ("int8", "sign", "topk", "randk:bits=4"))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_sparse_values_get_better_with_bits(bits: int) -> None:
    x = gaussian(9000)
    kept = codec("blocktopk:bits=32").encode(x, seed=0).decode()
    decoded = codec(f"blocktopk:bits={bits}").encode(x, seed=0).decode()
    assert torch.equal(decoded != 0, kept != 0)
    assert torch.equal(decoded.sign(), kept.sign())
    # Maxima of 64 Gaussians: mean 2.4, sd 0.4, so one level leaves (0.4/2.4)^2 = 0.03 and a grid a quarter a bit,
    # once it is not spent on the empty range below (4 bits: a third of the levels).
    assert nmse(kept, decoded) < (0.05, 0.05, 0.012, 0.012, 0.004, 0.001, 3e-4, 1e-4)[bits - 1]


# ---- distortion ------------------------------------------------------------------------------------------------------


def draw(distribution: str, num: int) -> Tensor:
    generator = np.random.default_rng(1)
    values = {"gauss": generator.standard_normal, "laplace": lambda n: generator.laplace(size=n)}
    return torch.from_numpy(values.get(distribution, lambda n: generator.standard_t(3, n))(num)).float()


# NMSE at equal bytes, iid data: the scaled sign per block of 256, plain absmax grids and the rotated grid.
DISTORTION = [
    ("int4", (0.011, 0.011, 0.011)),
    ("int2", (0.118, 0.117, 0.112)),
    ("int4:rotate=false", (0.016, 0.032, 0.076)),
    ("int2:rotate=false", (0.65, 0.69, 0.62)),
    ("sign:block=256", (0.36, 0.50, 0.60)),
    ("sign:block=256,rotate=true", (0.36, 0.36, 0.33)),
]


@pytest.mark.parametrize(("spec", "expected"), DISTORTION)
def test_distortion_is_near_the_designed_one(spec: str, expected: tuple[float, ...]) -> None:
    for distribution, value in zip(("gauss", "laplace", "t3"), expected, strict=True):
        x = draw(distribution, 1 << 18)
        # 5 % for the two digits of the reference, 10 % for a sample of a heavy-tailed law.
        assert nmse(x, codec(spec).encode(x, seed=1).decode()) == pytest.approx(value, rel=0.15), distribution


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if codec(s).wants_feedback and "unbias" not in s and "threshold" not in s]
)
def test_codecs_under_feedback_contract(spec: str) -> None:
    # Error feedback converges if the codec removes some of the energy (Karimireddy et al. 2019).
    x = gaussian(64, 70)
    assert nmse(x, codec(spec).encode(x, seed=1).decode()) < 1


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "field", "value", "allowed"),
    [
        ("int9", "codec", "int9", "did you mean 'int8'"),
        ("", "codec", "", "blocktopk"),
        ("int0", "codec", "int0", "int1"),
        ("int4:blok=256", "int4:option", "blok", "did you mean 'block'"),
        ("int4:block=512,scale=tensor", "int4:block", 512, "left out unless scale=block"),
        ("sign:rounding=stochastic,magnitude=mean", "sign:magnitude", "mean", "left out with rounding=stochastic"),
        ("int4:bits=3", "int4:option", "bits", "block, rotate, rounding, scale"),
        ("fp32:block=8", "fp32:option", "block", "no options"),
        ("int4:block=300", "int4:block", 300, "a power of two"),
        ("int4:block=0", "int4:block", 0, "a power of two"),
        ("int4:block=-256", "int4:block", -256, "a power of two"),
        ("int8:block=2097152", "int8:block", 2097152, "2^20"),
        ("int4:block=big", "int4:block", "big", "a whole number"),
        ("int4:block=128,rotate=true", "int4:block", 128, "at least 256"),
        ("int4:scale=row", "int4:scale", "row", "block, tensor, channel"),
        ("int4:rounding=up", "int4:rounding", "up", "nearest, stochastic"),
        ("int4:rotate=maybe", "int4:rotate", "maybe", "auto, true, false"),
        ("int4:rotate=true,scale=channel", "int4:rotate", "true", "false when scale=channel"),
        ("sign:magnitude=max", "sign:magnitude", "max", "auto, mean, unbiased"),
        ("sign:scale=mean,magnitude=unbiased", "sign:magnitude", "unbiased", "mean"),
        ("topk:density=0", "topk:density", 0.0, "above 0, at most 1"),
        ("topk:density=1.1", "topk:density", 1.1, "above 0, at most 1"),
        ("randk:density=nan", "randk:density", float("nan"), "above 0, at most 1"),
        ("randk:density=x", "randk:density", "x", "a number"),
        ("randk:unbias=maybe", "randk:unbias", "maybe", "auto, true, false"),
        ("topk:bits=9", "topk:bits", 9, "1 to 8, 16"),
        ("blocktopk:bits=0", "blocktopk:bits", 0, "1 to 8, 16"),
        ("blocktopk:k=0", "blocktopk:k", 0, "1 to block=64"),
        ("blocktopk:k=65", "blocktopk:k", 65, "1 to block=64"),
        ("blocktopk:block=48", "blocktopk:block", 48, "a power of two"),
        ("threshold:value=0", "threshold:value", 0.0, "above 0"),
        ("threshold:value=inf", "threshold:value", float("inf"), "finite"),
        ("int4:block", "spec", "int4:block", "name:option=value"),
        ("int4:block=8,block=8", "spec", "int4:block=8,block=8", "each option once"),
    ],
)
def test_messages_name_field_value_and_what_is_allowed(spec: str, field: str, value: object, allowed: str) -> None:
    with pytest.raises(FieldError) as caught:
        codec(spec)
    error = caught.value
    assert error.field == field
    assert repr(error.value) == repr(value)
    assert allowed in error.allowed
    assert all(part in str(error) for part in (field, repr(value), allowed))


def test_specs_are_forgiving_about_case_and_blanks() -> None:
    assert codec(" INT4: block=512 , rotate=false ") == codec("int4:block=512,rotate=false")
    assert codec("int4:block=256").spec == "int4"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sign", [(0, "sign")]),
        ("int4: block=512", [(0, "int4:block=512")]),
        ("int4 sign@7", [(0, "int4"), (6, "sign")]),
        ("blocktopk:k=2 sign@3  int4:block=512@24", [(0, "blocktopk:k=2"), (2, "sign"), (23, "int4:block=512")]),
    ],
)
def test_a_schedule_names_codecs_and_their_first_rounds(text: str, expected: list[tuple[int, str]]) -> None:
    assert [(first, c.spec) for first, c in codec_schedule(text)] == expected


@pytest.mark.parametrize(
    "text", ["int4@1", "int4 sign@1", "int4 sign@x", "int4 sign@5 int2@5", "int4 sign", "a@", "@", "int4 @3"]
)
def test_a_schedule_whose_rounds_do_not_rise_is_refused(text: str) -> None:
    with pytest.raises(FieldError):
        codec_schedule(text)


# ---- finite stays finite -------------------------------------------------------------------------------------------

BOUNDED = [
    *("fp32", "fp16", "bf16", *(f"int{bits}" for bits in range(1, 9))),
    *(f"int{bits}:rotate=true" for bits in (1, 5, 8)),
    *(f"int{bits}:rotate=false,block=8" for bits in (1, 2, 4, 8)),
    *(f"int{bits}:rounding=stochastic" for bits in (1, 2, 4, 8)),
    *(f"int4:scale={scale},rotate=false" for scale in ("tensor", "channel")),
    *("int4:scale=tensor", "int8:rotate=true,scale=tensor", "int8:rotate=true,rounding=stochastic"),
    *("ternary", "ternary:rotate=true", "ternary:rounding=stochastic", "ternary:rotate=true,rounding=stochastic"),
    *("sign", "sign:scale=tensor", "sign:scale=channel", "sign:scale=unbiased", "sign:rotate=true,scale=unbiased"),
    *("sign:rounding=stochastic", "sign:rotate=true,rounding=stochastic"),
    *(f"topk:density=0.2,bits={bits}" for bits in (1, 2, 3, 8, 16, 32)),
    *(f"blocktopk:k=3,block=16,bits={bits}" for bits in (1, 2, 4, 16, 32)),
    *(f"randk:density=0.1,unbias=true,bits={bits}" for bits in (1, 2, 4, 16, 32)),
    *(f"threshold:value=0.001,bits={bits}" for bits in (1, 2, 6, 16, 32)),
]


def extremes(dtype: torch.dtype, num: int) -> dict[str, torch.Tensor]:
    """Return finite values that lie at the ends of a type's range."""
    info, noise = torch.finfo(dtype), torch.randn(num, generator=torch.Generator().manual_seed(num)).double()
    place = torch.arange(num)
    return {
        "largest": torch.full((num,), info.max, dtype=dtype),
        "largest of either sign": (noise.sign() * info.max).to(dtype),
        "up to the largest": (noise / noise.abs().max() * info.max).to(dtype),
        "one among small": torch.where(place == num // 2, -info.max, noise * info.tiny * 8).to(dtype),
        "denormal": (noise * info.tiny / 4).to(dtype),
        "near the end of bfloat16": (noise.sign() * info.max * (1 - 2.0**-10)).to(dtype),
        "wide": (noise.sign() * 10.0 ** (noise * 12)).clamp(-info.max, info.max).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spec", few(BOUNDED, 12))
def test_no_finite_value_decodes_to_one_that_is_not(spec: str, dtype: torch.dtype) -> None:
    made = codec(spec)
    for shape in ((5,), (3, 300)):
        for name, x in extremes(dtype, math.prod(shape)).items():
            x = x.view(shape)
            assert made.encode(x, seed=1).decode().isfinite().all(), name
            for old in (x.float().nan_to_num(), torch.full(shape, torch.finfo(torch.float32).max), -x.float()):
                residual = old.nan_to_num().clone()
                assert made.encode_with_residual(x, residual, seed=1).decode().isfinite().all(), name
                assert residual.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", few(BOUNDED, 12))
def test_nan_and_infinity_travel(spec: str, value: float, dtype: torch.dtype) -> None:
    if spec.startswith("randk"):
        pytest.skip("keeps elements at random")
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, 7] = value
    assert not codec(spec).encode(x, seed=1).decode().isfinite().all()
    assert not codec(spec).encode_with_residual(x, torch.ones(3, 300), seed=1).decode().isfinite().all()


@pytest.mark.parametrize("spec", ["int8", "int8:rotate=true", "int4", "int4:rotate=false", "ternary", "sign", "int1"])
def test_large_blocks_lose_no_more_than_small_ones(spec: str) -> None:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(2))

    def loss(values: torch.Tensor) -> float:
        decoded = codec(spec).encode(values, seed=1).decode()
        return float((decoded.double() - values.double()).norm() / values.double().norm())

    for exponent in (60, 89, 100, 110, 120):  # the products with powers of two have the same codes
        assert loss(x * 2.0**exponent) == pytest.approx(loss(x), rel=1e-12)


def test_a_scale_never_takes_its_levels_beyond_float32() -> None:
    largest = torch.finfo(torch.float32).max
    for level in [0.5, 1.0, *(2.0**bits - 1 for bits in range(2, 8)), *(2.0**bits - 0.5 for bits in range(1, 8))]:
        scale = largest_scale(level)
        assert torch.tensor(scale).bfloat16().item() == scale
        assert level * scale <= largest
        bits = bf16_bits(scale)
        assert bits == 0x7F7F or level * float(torch.tensor(bits + 1, dtype=torch.int16).view(torch.bfloat16)) > largest


# ---- numpy arrays, and bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8"])
def test_numpy_arrays_are_encoded_like_tensors(dtype: str) -> None:
    array = np.random.default_rng(0).standard_normal((6, 50)).astype(dtype)
    expected = codec("int4").encode(torch.from_numpy(array.astype(array.dtype.newbyteorder("="))), seed=0)
    frozen = array.copy()
    frozen.setflags(write=False)
    for same in (array, frozen, np.asfortranarray(array), array[::-1][::-1]):
        payload = codec("int4").encode(same)
        assert torch.equal(payload.data, expected.data)
        assert (payload.shape, payload.dtype, payload.seed) == (expected.shape, expected.dtype, 0)
    residual, other = torch.ones(6, 50), torch.ones(6, 50)
    with_array = codec("int4").encode_with_residual(array, residual)
    with_tensor = codec("int4").encode_with_residual(expected.decode().new_tensor(array.astype("f8")), other, seed=0)
    assert torch.equal(with_array.data, with_tensor.data)
    assert torch.equal(residual, other)
    assert codec("fp32").encode(np.array(2.5)).decode() == 2.5


@pytest.mark.parametrize(
    "x", [[1.0, 2.0], 1.0, np.float32(1), None, np.arange(3), np.zeros(3, complex), np.zeros(3, np.longdouble), "x"]
)
def test_what_is_no_array_of_floats_is_refused(x: object) -> None:
    with pytest.raises(FieldError, match=r"^x(\.dtype)?="):
        codec("int4").encode(x)  # type: ignore[arg-type]
