"""The Triton kernels give the reference's payloads, floats and residuals, bit for bit.

With a GPU they run compiled. Without one this file runs itself once more under ``TRITON_INTERPRET=1`` in a process of
its own: Triton reads the variable when it is imported, which another test may have done already.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from properties import few
from torch import Tensor

from fedq.kernels import BlockPlan, CastPlan, Plan, SparsePlan, reference

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language")
from fedq.kernels import triton as fast  # noqa: E402
from fedq.kernels.triton.primitives import uniform  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SEED = 0xFEDCBA9876543210

runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)


@pytest.mark.skipif(INTERPRETED, reason="this is the run under TRITON_INTERPRET=1")
def test_kernels_interpreted(request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--all"] if request.config.option.all else []
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Iterator[None]:
    """The interpreter computes in numpy, which warns of what a kernel does with infinities."""
    with np.errstate(all="ignore"):
        yield


# ---- plans and values ------------------------------------------------------------------------------------------------

CASTS = [CastPlan("fp32"), CastPlan("fp16"), CastPlan("bf16")]
BLOCKS = [
    *(BlockPlan("integer", bits, 256) for bits in range(1, 9)),
    *(BlockPlan("integer", bits, 256, rotate=True) for bits in (3, 4)),
    *(BlockPlan("integer", bits, 256, stochastic=True) for bits in (1, 4, 8)),
    BlockPlan("integer", 4, 256, rotate=True, stochastic=True),
    BlockPlan("integer", 4, 8),
    BlockPlan("integer", 4, 1024, rotate=True),
    BlockPlan("integer", 8, 2048),
    BlockPlan("ternary", 0, 256),
    BlockPlan("ternary", 0, 256, rotate=True),
    BlockPlan("ternary", 0, 8, stochastic=True),
    BlockPlan("ternary", 0, 512),
    BlockPlan("sign", 1, 1024),
    BlockPlan("sign", 1, 8),
    BlockPlan("sign", 1, 256, rotate=True, unbiased=True),
    BlockPlan("sign", 1, 256, stochastic=True),
]
SPARSE = [
    *(SparsePlan("blocktopk", bits, k=1, block=64) for bits in (1, 2, 3, 8, 16, 32)),
    SparsePlan("blocktopk", 2, k=3, block=64),
    SparsePlan("blocktopk", 4, k=2, block=2),
    SparsePlan("blocktopk", 2, k=3, block=4096),
    *(SparsePlan("topk", bits, density=0.01) for bits in (2, 16)),
    SparsePlan("topk", 4, density=1.0),
    *(SparsePlan("randk", bits, density=0.01) for bits in (4, 16)),
    *(SparsePlan("randk", bits, density=0.03, unbias=True) for bits in (4, 32)),
    *(SparsePlan("threshold", bits, value=2.0) for bits in (5, 32)),
    SparsePlan("threshold", 4, value=1e9),
]


def _branch(plan: CastPlan | BlockPlan) -> tuple[object, ...]:
    """Return what decides which lines of the kernels a plan runs."""
    return (plan,) if isinstance(plan, CastPlan) else (plan.kind, plan.rotate, plan.stochastic, plan.unbiased)


_FIRST = {_branch(plan): plan for plan in reversed(CASTS + BLOCKS)}
KINDS = [plan if plan in _FIRST.values() else pytest.param(plan, marks=pytest.mark.slow) for plan in CASTS + BLOCKS]
PLANS: list[Plan] = [*CASTS, *BLOCKS, *SPARSE]
PAIRS: list[tuple[Plan, Plan]] = [
    (BlockPlan("sign", 1, 1024), BlockPlan("sign", 1, 1024)),
    (BlockPlan("integer", 4, 256, rotate=True), BlockPlan("integer", 5, 256, rotate=True)),
    (BlockPlan("integer", 4, 256), BlockPlan("ternary", 0, 256)),
    (BlockPlan("ternary", 0, 8), BlockPlan("sign", 1, 1024)),
    (CastPlan("bf16"), BlockPlan("integer", 8, 256)),
    (BlockPlan("integer", 8, 256), CastPlan("fp16")),
    (SparsePlan("blocktopk", 2, k=1, block=64), SparsePlan("blocktopk", 2, k=1, block=64)),
    (SparsePlan("blocktopk", 2, k=1, block=64), BlockPlan("integer", 4, 256)),
]
NUM = 2600
"""Elements: several tiles of almost every plan and a cut last one."""
SPARSE_NUM = 5000
"""Two groups."""


LARGEST = np.finfo(np.float32).max


def values(num: int, dtype: torch.dtype = torch.float32, *, hard: bool = True) -> Tensor:
    """Return heavy-tailed values; if hard, with blocks of NaN, inf, zeros, denormals, ties, huge and tiny ones."""
    generator = np.random.default_rng(num)
    x = generator.standard_t(3, num).astype(np.float32)
    if hard and num >= 2304:
        x[5], x[261], x[300] = np.nan, np.inf, -np.inf
        x[512:768], x[768:1024] = 0.0, -0.0
        x[1024:1280] *= 1e-42
        x[1280:1536] = np.round(x[1280:1536])
        x[1536:1792] *= 1e37
        x[1792:2048] *= 1e-37
        x[2048:2304:2] = -1e-41  # the floor of a negative denormal is -1
        x[2304:] = np.copysign(LARGEST, x[2304:])
        x[2310:2330] *= np.float32(2.0**-100)
    return torch.from_numpy(x).to(dtype).to(DEVICE)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Assert equal bits; of NaNs, whose bits a processor chooses, that there are some in the same places."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    assert torch.equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def assert_same_payload(plan: Plan, actual: Tensor, expected: Tensor) -> None:
    """Assert equal bytes; float32 carries any NaN on."""
    if plan == CastPlan("fp32"):
        assert_same(actual.view(torch.float32), expected.view(torch.float32))
    else:
        assert torch.equal(actual, expected)


def check(plan: Plan, x: Tensor) -> None:
    """Assert that encoding, residual, decoding and adding equal the reference's."""
    num = x.numel()
    assert fast.supports(plan, num, x.dtype)
    residual = 0.25 * values(num, hard=False).flip(0)
    residual[2304:2500] = LARGEST.item()  # sums that leave float32's range, or cancel
    expected_residual = residual.clone()
    expected = reference.encode(plan, x, seed=SEED, residual=expected_residual)
    data = fast.encode(plan, x, seed=SEED, residual=residual)
    assert_same_payload(plan, data, expected)
    assert_same(residual, expected_residual)
    out, expected_out = torch.full_like(residual, 7.0), torch.zeros_like(residual)
    reference.decode(plan, data, num, seed=SEED, out=expected_out)
    fast.decode(plan, data, num, seed=SEED, out=out)
    assert_same(out, expected_out)
    reference.decode(plan, data, num, seed=SEED, out=expected_out, weight=-0.3)
    fast.decode(plan, data, num, seed=SEED, out=out, weight=-0.3)
    assert_same(out, expected_out)


# ---- equal to the reference ------------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("plan", few(BLOCKS, 3), ids=str)
def test_any_scale_of_a_message(plan: BlockPlan) -> None:
    num, odd = 3 * 1024, (-1e38, -3.3e38, 3.3e38, -(2.0**96), 2.0**96, -1.0, math.nan, math.inf, -math.inf, -0.0)
    data = reference.encode(plan, values(num, hard=False), seed=SEED)
    scales = torch.tensor(odd).repeat(num)[: plan.num_blocks(num)].to(torch.bfloat16).to(DEVICE)
    data = torch.cat((data[: plan.codes_nbytes(num)], scales.view(torch.uint8)))
    out, expected = torch.zeros(num, device=DEVICE), torch.zeros(num, device=DEVICE)
    reference.decode(plan, data, num, seed=SEED, out=expected)
    fast.decode(plan, data, num, seed=SEED, out=out)
    assert_same(out, expected)


@runs_kernels
@pytest.mark.parametrize("num", [1, NUM])
@pytest.mark.parametrize("plan", KINDS, ids=str)
def test_casts_and_blocks(plan: Plan, num: int) -> None:
    check(plan, values(num))


@runs_kernels
@pytest.mark.parametrize("num", [1, SPARSE_NUM])
@pytest.mark.parametrize("plan", few(SPARSE, 6), ids=str)
def test_sparse(plan: Plan, num: int) -> None:
    check(plan, values(num))


@runs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_many_tiles(plan: Plan) -> None:
    if INTERPRETED:
        pytest.skip("too long for the interpreter")
    check(plan, values((1 << 20) + 77))


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "plan", [CastPlan("fp32"), BlockPlan("integer", 4, 256), SparsePlan("topk", 16, density=0.01)], ids=str
)
def test_input_dtypes(plan: Plan, dtype: torch.dtype) -> None:
    check(plan, values(NUM, dtype))


@runs_kernels
@pytest.mark.parametrize("plan", [CastPlan("fp32"), CastPlan("bf16"), BLOCKS[2], SPARSE[0], SPARSE[-1]], ids=str)
def test_without_feedback_at_any_address(plan: Plan) -> None:
    x = values(NUM + 1)[1:]
    expected = reference.encode(plan, x, seed=SEED)
    message = torch.zeros(expected.numel() + 3, dtype=torch.uint8, device=DEVICE)
    fast.encode(plan, x, seed=SEED, out=message[3:])
    assert torch.equal(message[3:], expected)
    out = torch.zeros(x.numel() + 1, device=DEVICE)
    fast.decode(plan, message[3:], x.numel(), seed=SEED, out=out[1:])
    decoded = torch.zeros_like(x)
    reference.decode(plan, expected, x.numel(), seed=SEED, out=decoded)
    assert_same(out[1:], decoded)
    assert message[:3].sum() == 0
    assert out[0] == 0


@runs_kernels
@pytest.mark.parametrize(("plan_in", "plan_out"), few(PAIRS, 3), ids=str)
def test_reduce(plan_in: Plan, plan_out: Plan) -> None:
    num, seeds, weights = NUM, [SEED, SEED + 1, SEED - (1 << 40)], [0.5, 0.3, -0.2]
    datas = [reference.encode(plan_in, (w + 1) * values(num), seed=seed) for w, seed in enumerate(seeds)]
    residual = 0.25 * values(num, hard=False).flip(0)
    residual[2304:2500] = LARGEST.item()  # sums that leave float32's range, or cancel
    expected_residual = residual.clone()
    expected = reference.reduce(plan_in, datas, weights, seeds, plan_out, num, seed=5, residual=expected_residual)
    actual = fast.reduce(plan_in, datas, weights, seeds, plan_out, num, seed=5, residual=residual)
    assert_same_payload(plan_out, actual, expected)
    assert_same(residual, expected_residual)


@runs_kernels
def test_trit_bytes_beyond_242() -> None:
    plan, data = BlockPlan("ternary", 0, 8), torch.arange(256, dtype=torch.uint8, device=DEVICE)
    ones = torch.full((160,), 0x3F80, dtype=torch.int16, device=DEVICE).view(torch.uint8)
    out, expected = torch.zeros(1280, device=DEVICE), torch.zeros(1280, device=DEVICE)
    payload = torch.cat((data, ones))
    fast.decode(plan, payload, 1280, seed=0, out=out)
    reference.decode(plan, payload, 1280, seed=0, out=expected)
    assert torch.equal(out, expected)


@triton.jit(do_not_specialize=["start", "key"])
def uniform_kernel(out_ptr, start, key):  # type: ignore[no-untyped-def]
    local = tl.arange(0, 1024)
    tl.store(out_ptr + local, uniform(start + local, key))


@runs_kernels
def test_noise_of_counters_beyond_2_to_32() -> None:
    start, key = (1 << 37) - 512, reference.noise_key(SEED)
    out = torch.zeros(1024, device=DEVICE)
    uniform_kernel[(1,)](out, start, key - (1 << 32) if key >> 31 else key, enable_fp_fusion=False)
    assert torch.equal(out, reference.uniform(1024, SEED, start=start, device=torch.device(DEVICE)))


# ---- what is served --------------------------------------------------------------------------------------------------


def test_supports_says_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "why_missing", lambda: "")
    assert all(fast.supports(plan, 1, torch.float16) for plan in PLANS)
    assert not fast.supports(PLANS[0], 1, torch.float64)
    assert not fast.supports(PLANS[0], 0, torch.float32)
    for plan in (
        BlockPlan("integer", 4, 300),
        BlockPlan("integer", 4, 4),
        BlockPlan("integer", 4, 1 << 15),
        BlockPlan("ternary", 0, 4096),
        SparsePlan("blocktopk", 2, k=1, block=8192),
        SparsePlan("blocktopk", 2, k=33, block=64),
    ):
        assert not fast.supports(plan, 1 << 20, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="the kernels are available here")
def test_missing_gpu_is_said() -> None:
    assert fast.why_missing() == "there is no CUDA device"
    assert not fast.supports(PLANS[0], 1, torch.float32)
