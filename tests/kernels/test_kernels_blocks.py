"""Casts and block codecs: the C++ kernels give the reference's payloads, floats and residuals, bit for bit.

The reference itself is held against numpy in `test_codec_golden.py`; here it is the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import is_all, tried
from torch import Tensor

from fedq import kernels
from fedq.codecs import codec
from fedq.errors import FieldError
from fedq.kernels import BlockPlan, CastPlan, cpu, reference
from fedq.kernels.cpu.library import ISAS
from fedq.layout import Layout

CASTS = [CastPlan("fp32"), CastPlan("bf16"), CastPlan("fp16")]


def block_plans(block: int, rotate: bool) -> list[BlockPlan]:
    """Return every kind of plan with these blocks."""
    plans = [BlockPlan("sign", 1, block, rotate, unbiased=True)]
    for stochastic in (False, True):
        plans += [BlockPlan("integer", bits, block, rotate, stochastic) for bits in range(1, 9)]
        plans += [BlockPlan(kind, bits, block, rotate, stochastic) for kind, bits in (("ternary", 0), ("sign", 1))]  # type: ignore[arg-type]
    return plans


PLANS = [
    *CASTS,
    *block_plans(256, False),
    *block_plans(256, True),
    *block_plans(8, False)[::3],
    *block_plans(1024, True)[::3],
][:: 1 if is_all() else 3]  # each on every instruction set
SEED = 0xFEDCBA9876543210


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def runs_here(isa: str) -> bool:
    try:
        cpu.select_isa(isa)
    except ValueError:
        return False
    return True


@pytest.fixture(autouse=True)
def best_isa_afterwards() -> Iterator[None]:
    before = None if cpu.why_missing() else cpu.isa()
    yield
    if before is not None:
        cpu.select_isa(before)


@cache
def isas() -> list[str]:
    """Return the instruction sets of this machine; the oracle runs once for all of them."""
    return [] if cpu.why_missing() else [isa for isa in ISAS if runs_here(isa)]


needs_library = pytest.mark.skipif(bool(cpu.why_missing()), reason="needs the C++ kernels")


def same_floats(a: Tensor, b: Tensor) -> bool:
    """Whether two float32 tensors have the same bits; any NaN is like any other."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def check_encode(plan: kernels.Plan, x: Tensor, residual: Tensor | None, seed: int = SEED) -> None:
    """Payload and residual are the reference's, and the input is left alone."""
    before, expected_residual = x.clone(), None if residual is None else residual.clone()
    expected = reference.encode(plan, x, seed=seed, residual=expected_residual)
    for isa in isas():
        cpu.select_isa(isa)
        kept = None if residual is None else misplaced(residual, residual.storage_offset())
        out = misplaced(torch.full_like(expected, 255), x.storage_offset() % 3)
        assert cpu.encode(plan, x, seed=seed, out=out, residual=kept) is out
        differ = (out != expected).nonzero().view(-1)
        assert not differ.numel(), (isa, plan, x.numel(), differ[:8].tolist())
        if kept is not None and expected_residual is not None:
            assert same_floats(kept, expected_residual), (isa, plan, x.numel())
    assert torch.equal(x.view(torch.uint8), before.view(torch.uint8))


def check_decode(plan: kernels.Plan, data: Tensor, start: Tensor, weight: float | None, seed: int = SEED) -> None:
    """Decoded values, set or added, are the reference's."""
    expected = start.clone()
    reference.decode(plan, data, start.numel(), seed=seed, out=expected, weight=weight)
    for isa in isas():
        cpu.select_isa(isa)
        out = misplaced(start, start.storage_offset())
        cpu.decode(plan, data, start.numel(), seed=seed, out=out, weight=weight)
        assert same_floats(out, expected), (isa, plan, start.numel(), weight)


def misplaced(x: Tensor, offset: int) -> Tensor:
    """Return a copy that begins ``offset`` elements into its memory, so vectors are not aligned."""
    return torch.cat((x.new_zeros(offset), x))[offset:]


def check(plan: kernels.Plan, x: Tensor, residual: Tensor) -> None:
    """All that a plan does with one tensor."""
    check_encode(plan, x, None)
    check_encode(plan, x, residual)
    data = reference.encode(plan, x, seed=SEED)
    check_decode(plan, data, torch.full((x.numel(),), -0.0), None)
    check_decode(plan, data, torch.linspace(-3, 3, x.numel()), -0.3)


# ---- values ----------------------------------------------------------------------------------------------------------


def gaussian(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed))


def with_one(value: float, num: int = 700, at: int = 300) -> Tensor:
    x = gaussian(num)
    x[at] = value
    return x


RAMP = torch.linspace(-1, 1, 700)
EDGES: dict[str, Tensor] = {
    "zeros": torch.zeros(700),
    "negative zeros": -torch.zeros(700),
    "denormal": RAMP * 1e-39,
    "smallest": RAMP * 2e-45,
    "around the smallest normal scale": RAMP * 2.0**-125,
    "products below the normal range": RAMP * 1e-25,
    "huge": RAMP * 3e38,
    "largest": torch.full((700,), torch.finfo(torch.float32).max),
    "huge and tiny": torch.where(torch.arange(700) % 7 == 0, RAMP * 1e30, RAMP * 1e-30),
    "one value": torch.full((700,), 0.1),
    "ties": (RAMP * 508).round() / 8,
    "one NaN": with_one(math.nan),
    "one infinity": with_one(math.inf),
    "both infinities": with_one(-math.inf, at=1).where(torch.arange(700) != 2, torch.tensor(math.inf)),
    "NaN and infinity": with_one(math.nan, at=1).where(torch.arange(700) != 2, torch.tensor(math.inf)),
    "only NaN": torch.full((700,), math.nan),
    "only infinity": torch.full((700,), -math.inf),
    "largest of either sign": torch.finfo(torch.float32).max * gaussian(700, 5).sign(),
    "largest among tiny": torch.where(torch.arange(700) % 9 == 0, torch.finfo(torch.float32).max, RAMP * 1e-30),
    "at the bound of large sums": RAMP * 2.0**89,
    "bfloat16 overflow": torch.full((700,), 3.4e38) * RAMP.sign(),
    "float16 range": RAMP * 70_000,
    "float16 denormals": RAMP * 1e-5,
}


@needs_library
@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str) -> None:
    for plan in PLANS:
        check(plan, EDGES[name], 0.1 * gaussian(700, seed=1))


# Scales that no encoder writes; a message may have any.
ODD_SCALES = (-1e38, -3.3e38, 3.3e38, -(2.0**96), 2.0**96, -1.0, math.nan, math.inf, -math.inf, -0.0, -1e-40, 1e-40)


@needs_library
@pytest.mark.parametrize("scale", ODD_SCALES)
def test_any_scale_decodes_as_in_the_reference(scale: float) -> None:
    num = 4 * 1024 + 300
    for plan in PLANS:
        if isinstance(plan, CastPlan):
            continue
        data = reference.encode(plan, gaussian(num), seed=SEED)
        scales = data[plan.codes_nbytes(num) :].clone().view(torch.bfloat16)
        scales[::2] = scale
        data = torch.cat((data[: plan.codes_nbytes(num)], scales.view(torch.uint8)))
        for weight in (None, 0.5):
            check_decode(plan, data, torch.linspace(-3, 3, num), weight)
        if plan.rotate and math.isfinite(scale):
            out = torch.empty(num)
            reference.decode(plan, data, num, seed=SEED, out=out)
            assert out.isfinite().all(), plan


@needs_library
def test_sums_of_finite_numbers_beyond_float32() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.where(torch.arange(700) % 3 == 0, largest, gaussian(700))
    for residual in (x.clone(), -x, torch.full((700,), largest / 2), with_one(math.inf, at=303)):
        for plan in PLANS + CASTS:
            check_encode(plan, x, residual)
            check_encode(plan, with_one(math.nan).where(torch.arange(700) < 200, x), residual)


@needs_library
def test_nonfinite_residuals_and_sums() -> None:
    residual = gaussian(700, seed=1)
    residual[::97] = torch.tensor([math.nan, math.inf, -math.inf, 3e38] * 2)
    x = gaussian(700)
    x[3::97] = 3e38
    for plan in PLANS:
        check_encode(plan, x, residual)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(dtype: torch.dtype) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 6e-8, -6e-8, 3e-5, 65504.0, -0.0])
    x = gaussian(531)
    x[300:308] = special
    for plan in PLANS:
        check_encode(plan, x.to(dtype), None)
        check_encode(plan, x.to(dtype), 0.1 * gaussian(531, seed=1))


@needs_library
@pytest.mark.parametrize("num", [1, 2, 5, 7, 8, 9, 15, 16, 17, 40, 255, 256, 257, 300, 511, 1279, 1280, 1281, 2563])
def test_sizes(num: int) -> None:
    for plan in [*PLANS[num % 2 :: 2], *block_plans(16, False)[num % 3 :: 3], *block_plans(512, False)[num % 3 :: 3]]:
        check(plan, gaussian(num), 0.1 * gaussian(num, seed=1))


@needs_library
@pytest.mark.parametrize("block", [8, 32, 128, 2048, 1 << 15])
def test_block_widths(block: int) -> None:
    for kind, bits in (("integer", 3), ("integer", 8), ("ternary", 0), ("sign", 1)):
        for rotate in (False, True) if block >= 256 else (False,):
            plan = BlockPlan(kind, bits, block, rotate, unbiased=kind == "sign")  # type: ignore[arg-type]
            check(plan, gaussian(block + 1300), 0.1 * gaussian(block + 1300, seed=1))


@needs_library
@pytest.mark.parametrize("plan", [BlockPlan("ternary", 0, 1 << 20), BlockPlan("integer", 4, 1 << 20, True)], ids=str)
def test_the_widest_block(plan: BlockPlan) -> None:
    num = (1 << 20) + 1300
    check_encode(plan, gaussian(num), 0.1 * gaussian(num, seed=1))


# ---- any plan, any values, any place ---------------------------------------------------------------------------------

specials = st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1e-38, 3e38, -3e38, math.inf, -math.inf, math.nan, 1.0, -0.5])
seeds = st.integers(0, 2**64 - 1)


@st.composite
def plans(draw: st.DrawFn) -> kernels.Plan:
    kind = draw(st.sampled_from(["integer", "integer", "integer", "ternary", "sign", "cast"]))
    if kind == "cast":
        return draw(st.sampled_from(CASTS))
    rotate, stochastic = draw(st.booleans()), draw(st.booleans())
    block = 1 << draw(st.integers(8 if rotate else 3, 11))
    bits = {"integer": draw(st.integers(1, 8)), "ternary": 0, "sign": 1}[kind]
    return BlockPlan(kind, bits, block, rotate, stochastic, unbiased=kind == "sign" and draw(st.booleans()))  # type: ignore[arg-type]


@st.composite
def values(draw: st.DrawFn, num: int) -> Tensor:
    """Gaussians of magnitudes that differ by block, with a few special values anywhere."""
    scales = torch.tensor(draw(st.lists(st.sampled_from([1.0, 1e-3, 1e-30, 1e-39, 1e30]), min_size=1, max_size=4)))
    x = gaussian(num, draw(st.integers(0, 2**31))) * scales[torch.arange(num) // 97 % len(scales)]
    for at, value in draw(st.lists(st.tuples(st.integers(0, num - 1), specials), max_size=3)):
        x[at] = value
    return x


@needs_library
@given(data=st.data(), plan=plans(), num=st.integers(1, 3000), seed=seeds, offset=st.integers(0, 17))
@tried(150)
def test_any_plan(data: st.DataObject, plan: kernels.Plan, num: int, seed: int, offset: int) -> None:
    x = data.draw(values(num)).to(data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])))
    residual = misplaced(data.draw(values(num)), 17 - offset) if data.draw(st.booleans()) else None
    check_encode(plan, misplaced(x, offset), residual, seed)
    payload = reference.encode(plan, x, seed=seed)
    weight = data.draw(st.sampled_from([None, 1.0, 0.1, -2.5, 1e-30]))
    check_decode(plan, misplaced(payload, offset), misplaced(torch.full((num,), 0.5), offset), weight, seed)


@needs_library
@given(plan=plans(), num=st.integers(1, 700), seed=seeds, filler=st.integers(0, 2**31))
@tried(40)
def test_any_bytes_decode_alike(plan: kernels.Plan, num: int, seed: int, filler: int) -> None:
    nbytes = plan.nbytes(num)  # type: ignore[union-attr]
    data = torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(filler), dtype=torch.uint8)
    if isinstance(plan, CastPlan) and plan.dtype != "bf16":
        data = reference.encode(plan, reference.bf16_from_bytes(data.repeat(4)[: 2 * num]), seed=0)
    check_decode(plan, data, torch.zeros(num), None, seed)


@needs_library
@pytest.mark.parametrize("num", [65_536, 5 * 65_536 + 77])
def test_threads_never_show(num: int) -> None:
    x, residual = gaussian(num), 0.1 * gaussian(num, seed=1)
    chosen = [*CASTS, *block_plans(1024, True)[::4], *block_plans(64, False)[::3], BlockPlan("ternary", 0, 512)]
    for plan in chosen:
        kept = residual.clone()
        data = reference.encode(plan, x, seed=SEED, residual=kept)
        decoded = torch.empty(num)
        reference.decode(plan, data, num, seed=SEED, out=decoded)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again, out = residual.clone(), torch.empty(num)
            assert torch.equal(cpu.encode(plan, x, seed=SEED, residual=again), data), (plan, threads)
            assert same_floats(again, kept), (plan, threads)
            cpu.decode(plan, data, num, seed=SEED, out=out)
            assert same_floats(out, decoded), (plan, threads)
            torch.set_num_threads(1)


# ---- sums of payloads ------------------------------------------------------------------------------------------------

REDUCTIONS = [
    (BlockPlan("integer", 4, 256, True), BlockPlan("integer", 4, 256, True)),
    (BlockPlan("sign", 1, 1024), BlockPlan("integer", 8, 256)),
    (BlockPlan("ternary", 0, 256), BlockPlan("sign", 1, 1024)),
    (BlockPlan("integer", 8, 64, stochastic=True), BlockPlan("ternary", 0, 8, stochastic=True)),
    (CastPlan("bf16"), BlockPlan("integer", 2, 2048, True)),
    (BlockPlan("integer", 3, 512, True), CastPlan("fp32")),
    (BlockPlan("ternary", 0, 4096), BlockPlan("ternary", 0, 512, True)),
]


def on(isa: str) -> ModuleType:
    """Return the reference, or the kernels on an instruction set."""
    if isa == "reference":
        return reference
    cpu.select_isa(isa)
    return cpu


def added(plan: kernels.Plan, datas: list[Tensor], weights: list[float], seeds: list[int], num: int) -> Tensor:
    """Return the sum as the interface defines it, one payload after another."""
    total = torch.zeros(num)
    for data, weight, seed in zip(datas, weights, seeds, strict=True):
        decoded = torch.empty(num)
        reference.decode(plan, data, num, seed=seed, out=decoded)
        total += torch.tensor(weight, dtype=torch.float32) * decoded
    return total


@pytest.mark.parametrize("num", [1, 300, 9_001, 140_003])
def test_reduce_is_decode_add_then_encode(num: int) -> None:
    weights, seeds_in = [0.2, 0.5, -1.3], [SEED, SEED ^ 1 << 40, 7]
    for plan_in, plan_out in REDUCTIONS:
        datas = [reference.encode(plan_in, gaussian(num, seed=i), seed=s) for i, s in enumerate(seeds_in)]
        for residual in (None, 0.1 * gaussian(num, seed=9)):
            total = added(plan_in, datas, weights, seeds_in, num)
            expected = None if residual is None else residual.clone()
            data = reference.encode(plan_out, total, seed=11, residual=expected)
            for isa in ["reference", *isas()]:
                implementation = on(isa)
                kept = None if residual is None else residual.clone()
                out = torch.empty_like(data)
                implementation.reduce(plan_in, datas, weights, seeds_in, plan_out, num, seed=11, out=out, residual=kept)
                assert torch.equal(out, data), (isa, plan_in, plan_out)
                assert kept is None or expected is None or same_floats(kept, expected)


def test_a_sum_of_negative_zeros_is_zero() -> None:
    # The sum starts from +0, and 0 + -0 = 0; a cast shows the sign.
    plan = CastPlan("fp32")
    data = reference.encode(plan, -torch.zeros(20), seed=0)
    for isa in ["reference", *isas()]:
        assert not on(isa).reduce(plan, [data], [1.0], [0], plan, 20, seed=0).any()


@needs_library
def test_bare_addresses_are_never_taken_of_what_does_not_fit() -> None:
    plan, x = BlockPlan("integer", 4, 256), gaussian(600)
    data = kernels.encode(plan, x, seed=0)
    flat, short = torch.zeros(600), torch.zeros(599)
    for call in (
        lambda: kernels.encode(plan, x.view(2, 300), seed=0),
        lambda: kernels.encode(plan, gaussian(1200)[::2], seed=0),
        lambda: kernels.encode(plan, x, seed=0, residual=short),
        lambda: kernels.encode(plan, x, seed=0, residual=flat.double()),
        lambda: kernels.encode(plan, x, seed=0, out=data[1:]),
        lambda: kernels.decode(plan, data, 600, seed=0, out=short),
        lambda: kernels.decode(plan, data, 600, seed=0, out=torch.zeros(1200)[::2]),
        lambda: kernels.decode(plan, data[1:], 600, seed=0, out=flat),
        lambda: kernels.decode(plan, data, 600, seed=0, out=torch.empty(600, device="meta")),
        lambda: kernels.reduce(plan, [data, data[1:]], [1.0, 1.0], [0, 0], plan, 600, seed=0),
        lambda: kernels.reduce(plan, [data], [1.0, 1.0], [0, 0], plan, 600, seed=0),
        lambda: kernels.reduce(plan, [], [], [], plan, 600, seed=0),
    ):
        with pytest.raises(FieldError):
            call()


# ---- casts against numpy ---------------------------------------------------------------------------------------------


@given(patterns=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_casts_are_numpys(patterns: list[int]) -> None:
    x = np.array(patterns, np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        half = np.where(np.isinf(x), x, np.clip(x, -65504, 65504)).astype(np.float16)
    expected = np.where(np.isnan(x), np.uint16(0x7E00), half.view(np.uint16)).tobytes()
    for isa in ["reference", *isas()]:
        assert on(isa).encode(CastPlan("fp16"), torch.from_numpy(x.copy()), seed=0).numpy().tobytes() == expected
        assert on(isa).encode(CastPlan("fp32"), torch.from_numpy(x.copy()), seed=0).numpy().tobytes() == x.tobytes()


def test_every_half_decodes_like_numpy() -> None:
    halves = np.arange(65_536).astype(np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    for isa in ["reference", *isas()]:
        out = torch.empty(65_536)
        on(isa).decode(CastPlan("fp16"), torch.from_numpy(halves.view(np.uint8)), 65_536, seed=0, out=out)
        np.testing.assert_array_equal(out.numpy(), expected)
        assert (np.signbit(out.numpy()) == np.signbit(expected))[~np.isnan(expected)].all()


# ---- stochastic rounding ---------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(
    "plan", [BlockPlan("integer", bits, 256, False, True) for bits in (1, 2, 4, 8)]
    + [BlockPlan("integer", 3, 256, True, True), BlockPlan("ternary", 0, 256, False, True),
       BlockPlan("sign", 1, 256, False, True)], ids=str,
)  # fmt: skip
def test_stochastic_rounding_is_unbiased(plan: BlockPlan) -> None:
    # One value in every place, so that a common bias adds up: 2^20 draws show 0.005 of a step.
    num = 1 << 20
    for value in (0.0159, -0.4):
        x = torch.full((num,), value)
        x[::256] = 1.0  # sets the scale of its block
        out = torch.empty(num)
        cpu.decode(plan, cpu.encode(plan, x, seed=SEED), num, seed=SEED, out=out)
        error = (out - x).double()
        assert abs(error.mean().item()) <= 5 * error.std().item() / math.sqrt(num) + 1e-7, value


# ---- codecs on top ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["int4", "sign", "ternary", "bf16"])
def test_codecs_take_any_layout_of_memory(spec: str) -> None:
    c, x, residual = codec(spec), gaussian(1200).view(30, 40), 0.1 * gaussian(1200, seed=1).view(30, 40)
    expected = residual.clone()
    payload = c.encode_with_residual(x, expected, seed=3)
    wide = torch.zeros(30, 80)
    wide[:, ::2] = residual
    kept = wide[:, ::2]
    assert torch.equal(c.encode_with_residual(x.t().contiguous().t(), kept, seed=3).data, payload.data)
    assert torch.equal(kept, expected)
    assert not wide[:, 1::2].any()
    sums = torch.ones(30, 40)
    c.decode_add(payload, sums, 0.5)
    for out in (torch.ones(30, 80)[:, ::2], torch.ones(40, 30).t(), torch.ones(30, 40).double()):
        c.decode_add(payload, out, 0.5)
        torch.testing.assert_close(out.float(), sums, rtol=1e-6, atol=1e-6)


def test_half_precision_tensors_need_no_copy_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x, residual = gaussian(1000).to(dtype), torch.zeros(1000)
        twin = torch.zeros(1000)
        payload = codec("int4").encode_with_residual(x, residual, seed=3)
        assert torch.equal(payload.data, codec("int4").encode_with_residual(x.float(), twin, seed=3).data)
        assert torch.equal(residual, twin)
        assert payload.decode().dtype == dtype


def test_a_model_is_added_up_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.BatchNorm1d(40))
    layout = Layout.of(model, "int4")
    flat = gaussian(layout.numel)
    datas = [payload.data for payload in layout.encode(flat, seed=5)]
    expected = torch.ones(layout.numel)
    for span, payload in layout.payloads(datas, seed=5):
        expected[span.slice] += torch.tensor(0.3) * payload.decode().view(-1)
    weights: list[float | None] = []
    decode = kernels.decode

    def spy(*args: object, **kwargs: object) -> None:
        weights.append(kwargs.get("weight"))  # type: ignore[arg-type]
        decode(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "decode", spy)
    out = torch.ones(layout.numel)
    layout.decode_add(datas, out, seed=5, weight=0.3)
    assert weights == [0.3] * 3  # the coded weights, the exempt parameters together, the statistics together
    assert torch.equal(out, expected)


@pytest.mark.parametrize("spec", ["int4", "sign:rounding=stochastic", "ternary", "topk:density=0.1", "fp16"])
def test_the_sum_over_messages_is_that_of_decode_add(spec: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.BatchNorm1d(40))
    layout, weights, seeds_in = Layout.of(model, spec), [0.25, 0.5, 0.1], [3, 4 << 32, 5]
    messages = [
        [payload.data for payload in layout.encode(gaussian(layout.numel, seed=i), seed=seed)]
        for i, seed in enumerate(seeds_in)
    ]
    expected, out = torch.zeros(layout.numel), torch.full((layout.numel,), math.nan)
    for datas, seed, weight in zip(messages, seeds_in, weights, strict=True):
        layout.decode_add(datas, expected, seed=seed, weight=weight)
    layout.decode_sum(messages, out, seeds=seeds_in, weights=weights)
    assert same_floats(out, expected)
    layout.decode_sum([], out, seeds=[], weights=[])
    assert not out.any()
