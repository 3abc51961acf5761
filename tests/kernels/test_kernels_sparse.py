"""Sparse codecs: the reference against numpy, and the C++ kernels against the reference, bit for bit."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from hypothesis import given
from hypothesis import strategies as st
from properties import few, tried
from torch import Tensor

from fedq.errors import FieldError
from fedq.kernels import SparsePlan, cpu, reference
from fedq.kernels.cpu.library import usable_isas

SEED = 0xFEDCBA9876543210
BITS = [1, 2, 3, 5, 8, 16, 32]
PLANS = [
    *(SparsePlan("topk", bits, density=density) for bits in BITS for density in (0.01, 0.3)),
    *(SparsePlan("blocktopk", bits, k=1, block=64) for bits in BITS),
    *(
        SparsePlan("blocktopk", bits, k=k, block=block)
        for bits in (2, 16)
        for k, block in ((1, 2), (1, 16), (1, 32), (1, 128), (1, 8192), (3, 4), (5, 8), (7, 16), (64, 64), (300, 8192))
    ),
    *(SparsePlan("randk", bits, density=0.02, unbias=unbias) for bits in BITS for unbias in (False, True)),
    *(SparsePlan("threshold", bits, value=value) for bits in BITS for value in (1.5, 1e-39)),
    SparsePlan("topk", 4, density=1.0),
    SparsePlan("randk", 4, density=1.0),
    SparsePlan("threshold", 16, value=1e39),
]
needs_library = pytest.mark.skipif(bool(cpu.why_missing()), reason="needs the C++ kernels")


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    threads, isa = torch.get_num_threads(), None if cpu.why_missing() else cpu.isa()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if isa is not None:
        cpu.select_isa(isa)


def gaussian(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed))


def values(kind: str, num: int) -> Tensor:
    """Return values that try one trait: ties, zeros, denormals, NaN and infinity, sums that overflow."""
    x, at = gaussian(num, num), torch.randperm(num, generator=torch.Generator().manual_seed(num))
    if kind == "ties":
        return (2 * x).round() / 2
    if kind == "zeros":
        return x.masked_fill(at % 4 > 0, 0.0) * torch.where(at % 3 == 0, -1.0, 1.0)
    if kind == "denormal":
        return x * 1e-39
    if kind == "huge":
        return x * 1e38
    if kind == "largest":
        return torch.where(at % 3 == 0, torch.finfo(torch.float32).max * x.sign(), x * 1e-20)
    if kind == "broken":
        x[at[: num // 50 + 1]] = math.nan
        x[at[-1]], x[at[num // 2]] = math.inf, -math.inf
    return x


KINDS = ("gauss", "ties", "zeros", "denormal", "huge", "largest", "broken")


# ---- the reference against numpy -------------------------------------------------------------------------------------

F = np.float32


def twin_positions(plan: SparsePlan, x: np.ndarray) -> list[int]:
    """Return the kept positions by sorting, in the order of the payload."""
    size = np.abs(x)
    if plan.kind == "threshold":
        with np.errstate(over="ignore"):
            value = F(plan.value)
        return [i for i in range(x.size) if size[i] >= value]
    count = plan.num_kept(x.size)
    if plan.kind == "topk":
        return sorted(sorted(range(x.size), key=lambda i: (-size[i], i))[:count])
    if plan.kind == "blocktopk":
        padded, kept = np.pad(size, (0, -x.size % plan.block)), []
        for start in range(0, padded.size, plan.block):
            block = range(start, start + plan.block)
            kept += sorted(sorted(block, key=lambda i: (-padded[i], i))[: plan.k])
        return kept
    kept = []
    for i in range(count):
        first, last = i * x.size // count, (i + 1) * x.size // count
        hashed = reference.hash_int(reference.hash_int(i ^ reference.shared_key(SEED)) + 0x9E3779B9)
        kept.append(first + hashed % (last - first))
    return kept


def little_endian(fields: list[tuple[int, int]]) -> bytes:
    """Return (value, bits) fields one after another, least significant bit first."""
    text = "".join(f"{value:0{bits}b}"[::-1] for value, bits in fields if bits)
    return int(text[::-1] or "0", 2).to_bytes(math.ceil(len(text) / 8), "little")


def twin_position_bytes(plan: SparsePlan, kept: list[int], num: int) -> bytes:
    if plan.kind == "randk":
        return b""
    if plan.kind == "blocktopk":
        return little_endian([(i % plan.block, int(math.log2(plan.block))) for i in kept])
    count = len(kept).to_bytes(8, "little") if plan.kind == "threshold" else b""
    if not kept:
        return count
    low = int(math.log2(num // len(kept)))
    upper = [0] * (len(kept) + (num - 1 >> low))
    for i, index in enumerate(kept):
        upper[(index >> low) + i] = 1
    return count + little_endian([(i & (1 << low) - 1, low) for i in kept]) + little_endian([(b, 1) for b in upper])


def twin_tree(group: np.ndarray) -> np.float32:
    while group.size > 1:
        group = group[: group.size // 2] + group[group.size // 2 :]
    return F(group[0])


def twin_value_bytes(plan: SparsePlan, sent: np.ndarray, kept: list[int], num: int) -> bytes:
    if plan.bits == 32:
        return sent.tobytes()
    if plan.bits == 16:
        return torch.from_numpy(sent).bfloat16().view(torch.int16).numpy().tobytes()
    top, codes, scales = 2 ** (plan.bits - 1), [], []
    for group in range(math.ceil(num / 4096)):
        dense, there = np.zeros(4096, F), np.zeros(4096, bool)
        for value, i in zip(sent, kept, strict=True):
            if i // 4096 == group and i < num:
                dense[i % 4096], there[i % 4096] = value, True
        size = np.abs(dense)
        mean = twin_tree(size) / F(max(1, there.sum()))
        step = F(size.max() / F(top)) if plan.bits > 2 else F(mean * F(5 / 3))
        cell = np.clip(np.floor(size * (F(1) / step if step >= 2**-126 else F(0))), 0, top - 1)
        level = np.where(there, cell + F(0.5), F(0)).astype(F)
        total = twin_tree(level * level)
        scale = torch.tensor(twin_tree(size * level) * (F(1) / total if total else F(0))).bfloat16()
        scales.append(torch.where(scale.float() < 2.0**-126, torch.zeros_like(scale), scale))
        for value, i in zip(sent, kept, strict=True):
            if i // 4096 == group:
                code = int(cell[i % 4096]) + (top if value < 0 else 0) if i < num else 0
                codes.append((code, plan.bits))
    return little_endian(codes) + torch.stack(scales).view(torch.uint8).numpy().tobytes()


def twin_payload(plan: SparsePlan, x: np.ndarray) -> bytes:
    kept = twin_positions(plan, x)
    sent = np.array([x[i] if i < x.size else 0 for i in kept], F)
    if plan.unbias:
        edges = [i * x.size // len(kept) for i in range(len(kept) + 1)]
        sent *= np.diff(edges).astype(F)
    return twin_position_bytes(plan, kept, x.size) + twin_value_bytes(plan, sent, kept, x.size)


@pytest.mark.parametrize("plan", few(PLANS, 14), ids=str)
def test_the_reference_gives_numpys_bytes(plan: SparsePlan) -> None:
    for kind, num in (("gauss", 300), ("ties", 5000), ("denormal", 70)):
        x = values(kind, num)
        data = reference.encode(plan, x, seed=SEED)
        assert data.numpy().tobytes() == twin_payload(plan, x.numpy()), (kind, num)


# ---- C++ against the reference ---------------------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def misplaced(x: Tensor, offset: int) -> Tensor:
    """Return a copy that begins ``offset`` elements into its memory, so vectors are not aligned."""
    return torch.cat((x.new_zeros(offset), x))[offset:]


def check(plan: SparsePlan, x: Tensor, residual: Tensor | None = None, threads: int = 1) -> None:
    """Payload, new residual and decoded values, set and added, are the reference's."""
    num, expected_residual = x.numel(), None if residual is None else residual.clone()
    expected = reference.encode(plan, x, seed=SEED, residual=expected_residual)
    start, weight = gaussian(num, 9), 0.3
    decoded, added = torch.empty(num), start.clone()
    reference.decode(plan, expected, num, seed=SEED, out=decoded)
    reference.decode(plan, expected, num, seed=SEED, out=added, weight=weight)
    torch.set_num_threads(threads)
    for i, isa in enumerate(usable_isas()):
        cpu.select_isa(isa)
        what = (isa, plan, num, x.dtype)
        kept = None if residual is None else misplaced(residual, i)
        out = None if plan.kind == "threshold" else misplaced(torch.full_like(expected, 255), i)
        data = cpu.encode(plan, misplaced(x, i), seed=SEED, out=out, residual=kept)
        assert torch.equal(data, expected), what
        if kept is not None and expected_residual is not None:
            assert same_bits(kept, expected_residual), what
        got = misplaced(torch.full((num,), 7.0), i)
        cpu.decode(plan, misplaced(data, i), num, seed=SEED, out=got)
        assert same_bits(got, decoded), what
        got = misplaced(start, i)
        cpu.decode(plan, data, num, seed=SEED, out=got, weight=weight)
        assert same_bits(got, added), what
    torch.set_num_threads(1)


@needs_library
@pytest.mark.parametrize("plan", few(PLANS, 10), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_give_the_references_bits(plan: SparsePlan, kind: str) -> None:
    for num in (1, 15, 300, 5000):
        x = values(kind, num)
        scale = 1e-39 if kind == "denormal" else 0.3
        check(plan, x, gaussian(num, 1) * scale)
        check(plan, x)
        if kind in ("largest", "broken"):  # sums of finite numbers that leave float32's range, or cancel
            check(plan, x, torch.where(torch.arange(num) % 2 == 0, x, -x))


@needs_library
@pytest.mark.parametrize("plan", few(PLANS[::3], 4), ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(plan: SparsePlan, dtype: torch.dtype) -> None:
    for num in (1, 33, 5000):
        for kind in ("gauss", "denormal", "broken"):
            check(plan, values(kind, num).to(dtype), gaussian(num, 1))


LARGE = [
    SparsePlan("topk", 4, density=0.01),
    SparsePlan("topk", 16, density=0.2),
    SparsePlan("blocktopk", 2, k=1, block=64),
    SparsePlan("blocktopk", 16, k=3, block=256),
    SparsePlan("blocktopk", 8, k=100, block=1 << 17),
    SparsePlan("randk", 3, density=0.01, unbias=True),
    SparsePlan("threshold", 2, value=1.0),
]


@needs_library
@pytest.mark.parametrize("plan", LARGE, ids=str)
def test_the_number_of_threads_never_shows(plan: SparsePlan) -> None:
    num = 300_007
    for threads in (1, 2, 5):
        check(plan, values("ties", num), gaussian(num, 1), threads)


# ---- global top-k, whose threshold is guessed from a sample ----------------------------------------------------------

GUESSED = 1 << 20


@needs_library
@pytest.mark.parametrize("density", [1e-5, 1e-3, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("kind", ["gauss", "ties", "zeros", "broken"])
def test_topk_of_a_large_tensor(kind: str, density: float) -> None:
    check(SparsePlan("topk", 16, density=density), values(kind, GUESSED + 5), gaussian(GUESSED + 5, 1) * 0.1)


def sampled_lines(num: int) -> Tensor:
    """Return the lines of 16 elements that the kernel samples."""
    stride = num // 16 // 8192
    line = torch.arange(8192)
    return line * stride + reference.hash32(line, 0) % stride


@needs_library
@pytest.mark.parametrize("sample", [10.0, 0.0], ids=["too large", "too small"])
def test_topk_when_the_sample_misleads(sample: float) -> None:
    # Everything sampled is larger (or smaller) than the rest: too few (or all others) reach the guess.
    x = values("gauss", GUESSED)
    x.view(-1, 16)[sampled_lines(GUESSED)] *= sample
    for density in (0.01, 0.1):
        check(SparsePlan("topk", 4, density=density), x, gaussian(GUESSED, 1) * 1e-3)


# ---- damaged payloads ------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(
    "plan",
    [
        SparsePlan("topk", 3, density=0.05),
        SparsePlan("threshold", 16, value=1.0),
        SparsePlan("blocktopk", 2, k=1, block=64),
        SparsePlan("randk", 8, density=0.1),
    ],
    ids=str,
)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
@tried(40)
def test_damage_is_refused_or_stays_inside(plan: SparsePlan, flips: list[tuple[int, int]]) -> None:
    num = 1000
    data = reference.encode(plan, gaussian(num), seed=SEED)
    for at, mask in flips:
        data[at % data.numel()] ^= mask
    guarded = torch.full((num + 64,), 7.0)
    try:
        cpu.decode(plan, data, num, seed=SEED, out=guarded[32:-32])
    except FieldError:
        with pytest.raises(FieldError):
            decode_checked(plan, data, num)
    else:
        assert (guarded[:32] == 7).all()
        assert (guarded[-32:] == 7).all()
        decode_checked(plan, data, num)


def decode_checked(plan: SparsePlan, data: Tensor, num: int) -> Tensor:
    """Decode by the reference, whose caller checks the size."""
    out = torch.empty(num)
    if data.numel() != plan.nbytes(num, reference.sparse.num_kept(plan, num, data)):
        raise FieldError("payload bytes", data.numel(), "another size")
    reference.decode(plan, data, num, seed=SEED, out=out)
    return out


@needs_library
def test_a_cut_payload_is_refused() -> None:
    plan = SparsePlan("topk", 16, density=0.05)
    data = reference.encode(plan, gaussian(1000), seed=SEED)
    with pytest.raises(FieldError, match="payload bytes"):
        cpu.decode(plan, data[:-1], 1000, seed=SEED, out=torch.empty(1000))


# ---- the pool of threads ---------------------------------------------------------------------------------------------

FORK = """
import os, torch
from fedq.kernels import SparsePlan, cpu

torch.set_num_threads(3)
plan, x = SparsePlan("blocktopk", 2, k=1, block=64), torch.sin(torch.arange(1 << 19).float())
expected = cpu.encode(plan, x, seed=0)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(cpu.encode(plan, x, seed=0), expected) else 1)
assert torch.equal(cpu.encode(plan, x, seed=0), expected)
assert os.waitpid(child, 0)[1] == 0
print("both work")
"""


@needs_library
def test_a_forked_child_has_threads_of_its_own() -> None:
    done = warm.run(["-c", FORK], env=dict(os.environ), cwd=Path.cwd(), limit_s=120)
    assert done.stdout == "both work\n", done.stderr


@needs_library
def test_callers_from_several_threads_do_not_disturb_each_other() -> None:
    plan, x = SparsePlan("topk", 3, density=0.01), gaussian(200_000)
    expected, wrong = reference.encode(plan, x, seed=SEED), []
    torch.set_num_threads(3)

    def work() -> None:
        torch.set_num_threads(3)  # a setting of each thread
        wrong.extend(i for i in range(20) if not torch.equal(cpu.encode(plan, x, seed=SEED), expected))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
