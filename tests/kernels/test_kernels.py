"""The reference kernels against plain Python and numpy: formulas written down a second time, with other means."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from fedq import kernels
from fedq.errors import FieldError
from fedq.kernels import cpu

MASK = 2**32 - 1
words = st.integers(0, MASK)
seeds = st.integers(0, 2**64 - 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- hashing ---------------------------------------------------------------------------------------------------------


def lowbias32(x: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x


def hash_of(counter: int, key: int) -> int:
    return lowbias32((lowbias32((counter % 2**32) ^ key) + counter // 2**32 + 0x9E3779B9) % 2**32)


def shared_key(seed: int) -> int:
    return lowbias32((seed % 2**32 + 0x9E3779B9) % 2**32)


def noise_key(seed: int) -> int:
    return lowbias32(shared_key(seed) ^ lowbias32((seed // 2**32 + 0x85EBCA6B) % 2**32))


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=20), words)
def test_hash32_is_its_formula(counters: list[int], key: int) -> None:
    assert kernels.hash32(torch.tensor(counters), key).tolist() == [hash_of(c, key) for c in counters]
    assert kernels.hash_int(key) == lowbias32(key) == int(kernels.mix32(torch.tensor(key)))


def test_hash_known_words() -> None:
    # Known values, so that both formulas cannot drift together.
    assert [lowbias32(x) for x in (0, 1, 2**32 - 1)] == [0, 1753845952, 1734902346]


@given(seeds, st.integers(0, 2**40))
def test_uniform_is_24_hash_bits(seed: int, start: int) -> None:
    expected = [(hash_of(start + i, noise_key(seed)) >> 8) / 2**24 for i in range(5)]
    assert kernels.uniform(5, seed, start=start).tolist() == expected


def test_uniform_is_uniform() -> None:
    num = 1 << 18
    u = kernels.uniform(num, 12345).numpy().astype(np.float64)
    assert u.min() >= 0.0
    assert u.max() < 1.0
    # Five standard errors of the mean of U(0, 1), whose variance is 1/12.
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / num)
    counts = np.bincount((u * 64).astype(int), minlength=64)
    # chi-square with 63 degrees of freedom: 63 + 5·sqrt(126) is beyond its 1 - 1e-5 quantile.
    assert ((counts - num / 64) ** 2 / (num / 64)).sum() < 63 + 5 * math.sqrt(126)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / math.sqrt(num)


@given(seeds, st.integers(0, 5))
def test_signs_are_hash_bits(seed: int, block: int) -> None:
    start = 32 * block
    expected = [1 - 2 * (hash_of(i // 32, shared_key(seed)) >> (i % 32) & 1) for i in range(start, start + 64)]
    assert kernels.signs(64, seed, start=start).tolist() == expected


@given(words, words, words)
def test_shared_randomness_ignores_the_high_word(low: int, high: int, other: int) -> None:
    one, two = low | high << 32, low | other << 32
    assert torch.equal(kernels.signs(64, one), kernels.signs(64, two))
    assert kernels.span_seed(one, 3) % 2**32 == kernels.span_seed(two, 3) % 2**32
    if high != other:
        assert not torch.equal(kernels.uniform(64, one), kernels.uniform(64, two))
        assert kernels.span_seed(one, 3) != kernels.span_seed(two, 3)


@given(seeds, st.integers(0, 1000))
def test_span_seed_is_its_formula(seed: int, index: int) -> None:
    low = lowbias32((seed % 2**32 + (index + 1) * 0x9E3779B9) % 2**32)
    high = lowbias32((seed // 2**32 + (index + 1) * 0x85EBCA6B) % 2**32)
    assert kernels.span_seed(seed, index) == low + 2**32 * high


def test_derive_seed_depends_on_every_part() -> None:
    parts = [(0, "round", 1), (0, "round", 2), (1, "round", 1), (0, "rounds", 1), ("0", "round", 1), (0, "round")]
    assert len({kernels.derive_seed(*p) for p in parts}) == len(parts)
    assert all(0 <= kernels.derive_seed(*p) < 2**32 for p in parts)


# ---- groups, sums, rotation ------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 20))
def test_groups_round_trip_and_pad_with_zeros(numel: int, width: int) -> None:
    x = torch.arange(1.0, numel + 1)
    groups = kernels.to_groups(x, width)
    rows, full = -(-numel // width), 2 ** math.ceil(math.log2(width))
    expected = np.zeros((rows, full), np.float32)
    for i in range(numel):
        expected[i // width, i % width] = i + 1
    assert groups.numpy().tolist() == expected.tolist()
    assert torch.equal(kernels.from_groups(groups, width, numel), x)


def test_tree_sum_halves() -> None:
    def halving(row: list[np.float32]) -> np.float32:
        half = len(row) // 2
        return row[0] if not half else halving([a + b for a, b in zip(row[:half], row[half:], strict=True)])

    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32) * 1e3
    expected = [halving(list(row)) for row in rows]
    assert kernels.tree_sum(torch.from_numpy(rows)).tolist() == expected


def sylvester(n: int) -> np.ndarray:
    return np.array([[(-1) ** bin(i & j).count("1") for j in range(n)] for i in range(n)], np.float64)


def test_rotation_is_an_orthogonal_matrix() -> None:
    num, seed, start = 300, 77, 512
    x = torch.randn(num, generator=torch.Generator().manual_seed(0))
    flips = [1 - 2 * (hash_of(i // 32, shared_key(seed)) >> (i % 32) & 1) for i in range(start, start + 512)]
    padded = np.zeros(512)
    padded[:num] = x.numpy()
    expected = (padded * flips).reshape(2, 256) @ sylvester(256).T / 16
    rotated = kernels.rotate(x, seed, start=start)
    # Eight float32 additions of values of norm about 16: 8·2^-24·16 with room.
    np.testing.assert_allclose(rotated.numpy(), expected.reshape(-1), atol=2e-5)
    np.testing.assert_allclose(kernels.unrotate(rotated, seed, num, start=start).numpy(), x.numpy(), atol=2e-5)
    assert rotated.norm().item() == pytest.approx(x.norm().item(), rel=1e-6)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def packbits(codes: list[int], bits: int) -> bytes:
    wide = [(code >> bit) & 1 for code in codes for bit in range(bits)]
    return np.packbits(np.array(wide, np.uint8), bitorder="little").tobytes()


@given(st.data(), st.integers(1, 40))
@tried(150)
def test_pack_bits_is_numpy_packbits(data: st.DataObject, bits: int) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    tensor = torch.tensor(codes, dtype=torch.uint8 if bits <= 8 else torch.int64)
    packed = kernels.pack_bits(tensor, bits)
    assert packed.numpy().tobytes() == packbits(codes, bits)
    assert packed.numel() == kernels.packed_nbytes(len(codes), bits)
    assert kernels.unpack_bits(packed, bits, len(codes)).tolist() == codes


def test_zero_bits_are_nothing() -> None:
    assert kernels.pack_bits(torch.zeros(9, dtype=torch.int64), 0).numel() == 0
    assert kernels.unpack_bits(torch.empty(0, dtype=torch.uint8), 0, 9).tolist() == [0] * 9


@given(st.lists(st.integers(0, 2), max_size=33))
def test_trits_are_base_three(trits: list[int]) -> None:
    expected = [sum(t * 3**j for j, t in enumerate(trits[i : i + 5])) for i in range(0, len(trits), 5)]
    packed = kernels.pack_trits(torch.tensor(trits, dtype=torch.uint8))
    assert packed.tolist() == expected
    assert kernels.unpack_trits(packed, len(trits)).tolist() == trits


def test_every_byte_unpacks_to_trits() -> None:
    assert kernels.unpack_trits(torch.arange(256).to(torch.uint8), 1280).max() == 2


# The largest float32 magnitudes round to infinity in bfloat16, and every NaN becomes one; both are bit patterns here.
@given(st.lists(st.integers(0, MASK), min_size=1, max_size=20))
def test_bf16_bytes_round_to_nearest_even(patterns: list[int]) -> None:
    values = np.array(patterns, np.uint32).view(np.float32)
    wide = np.array(patterns, np.uint64)
    rounded = ((wide + 0x7FFF + (wide >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    expected = np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    data = kernels.bf16_bytes(torch.from_numpy(values.copy()))
    assert data.numpy().tobytes() == expected.astype("<u2").tobytes()
    back = kernels.bf16_from_bytes(data).numpy().view(np.uint32)
    assert back.tolist() == (expected.astype(np.uint32) << 16).tolist()


# ---- Elias-Fano ------------------------------------------------------------------------------------------------------


def naive_elias_fano(indices: list[int], universe: int) -> bytes:
    low = int(math.log2(universe // len(indices)))
    unary = [0] * (len(indices) + (universe - 1 >> low))
    for i, index in enumerate(indices):
        unary[(index >> low) + i] = 1
    return packbits([index % 2**low for index in indices], low) + packbits(unary, 1)


@given(st.sets(st.integers(0, 5000), min_size=1, max_size=60), st.integers(1, 3000))
def test_elias_fano_is_the_naive_code(chosen: set[int], extra: int) -> None:
    indices, universe = sorted(chosen), max(chosen) + extra
    data = kernels.elias_fano_encode(torch.tensor(indices), universe)
    assert data.numpy().tobytes() == naive_elias_fano(indices, universe)
    assert data.numel() == kernels.elias_fano_nbytes(len(indices), universe)
    assert kernels.elias_fano_decode(data, len(indices), universe).tolist() == indices


@pytest.mark.parametrize(("num", "universe"), [(1, 1), (10, 10), (64, 4096), (1000, 100_000), (300, 999), (1, 10**9)])
def test_elias_fano_is_within_one_bit_of_the_floor(num: int, universe: int) -> None:
    floor = (math.lgamma(universe + 1) - math.lgamma(num + 1) - math.lgamma(universe - num + 1)) / math.log(2)
    bits = 8 * kernels.elias_fano_nbytes(num, universe)
    # log2 C(n,k) >= k·log2(n/k); the code spends at most k·(log2(n/k) + 2) bits, and two byte ends.
    assert floor <= bits <= num * (math.log2(universe / num) + 2) + 16


def test_elias_fano_of_nothing() -> None:
    assert kernels.elias_fano_nbytes(0, 100) == 0
    empty = kernels.elias_fano_encode(torch.empty(0, dtype=torch.int64), 100)
    assert kernels.elias_fano_decode(empty, 0, 100).tolist() == []


def test_elias_fano_of_damaged_bytes() -> None:
    data = kernels.elias_fano_encode(torch.arange(0, 1000, 100), 1000)
    data[-1] ^= 1
    with pytest.raises(FieldError, match="allowed: 10"):
        kernels.elias_fano_decode(data, 10, 1000)


def test_join_bytes_into_a_buffer() -> None:
    sections = [torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3], dtype=torch.uint8)]
    out = torch.empty(3, dtype=torch.uint8)
    assert kernels.join_bytes(sections, out) is out
    assert out.tolist() == kernels.join_bytes(sections).tolist() == [1, 2, 3]


# ---- which implementation serves -------------------------------------------------------------------------------------


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_missing", lambda: "it was not built")


def test_the_device_chooses_and_the_reference_fills_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDQ_KERNELS", raising=False)
    assert kernels.implementation("cpu") == ("reference" if cpu.why_missing() else "cpp")
    assert kernels.implementation("meta") == "reference"
    monkeypatch.setattr(cpu, "why_missing", lambda: "it was not built")
    assert kernels.implementation("cpu") == "reference"


def test_the_environment_forces_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQ_KERNELS", "reference")
    assert kernels.implementation("cpu") == "reference"
    monkeypatch.setattr(cpu, "why_missing", lambda: "")
    monkeypatch.setenv("FEDQ_KERNELS", "cpp")
    assert kernels.implementation("cpu") == "cpp"


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize(
    ("wanted", "device", "reason"),
    [
        ("cpp", "cpu", "it was not built"),
        ("cuda", "cpu", "cpp, reference, triton"),
        ("tritn", "cpu", "did you mean 'triton'"),
    ],
)
def test_what_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, reason: str) -> None:
    monkeypatch.setenv("FEDQ_KERNELS", wanted)
    with pytest.raises(FieldError, match=f"FEDQ_KERNELS='{wanted}'.*{reason}"):
        kernels.implementation(device)
    with pytest.raises(FieldError, match="FEDQ_KERNELS"):
        kernels.encode(kernels.CastPlan("bf16"), torch.zeros(3), seed=0)


def test_an_implementation_serves_its_own_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_missing", lambda: "")
    monkeypatch.setenv("FEDQ_KERNELS", "cpp")
    with pytest.raises(FieldError, match="its tensors are not on 'cuda'"):
        kernels.implementation("cuda")


def test_a_plan_that_the_fast_kernels_do_not_serve_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDQ_KERNELS", raising=False)
    monkeypatch.setattr(cpu, "why_missing", lambda: "")
    monkeypatch.setattr(cpu, "supports", lambda plan, num, dtype: isinstance(plan, kernels.CastPlan))
    monkeypatch.setattr(cpu, "encode", lambda plan, x, **options: torch.tensor([1]))
    odd = kernels.BlockPlan("integer", 4, block=300)
    assert kernels.encode(odd, torch.ones(300), seed=0).numel() == odd.nbytes(300) == 152
    assert kernels.encode(kernels.CastPlan("bf16"), torch.ones(3), seed=0).tolist() == [1]


@given(st.sampled_from(["integer", "ternary", "sign"]), st.integers(1, 2000), st.integers(3, 10), st.booleans())
def test_a_plan_knows_its_sizes(kind: str, num: int, log_block: int, rotate: bool) -> None:
    bits = {"integer": 3, "ternary": 0, "sign": 1}[kind]
    plan = kernels.BlockPlan(kind, bits, 1 << (8 if rotate else log_block), rotate)  # type: ignore[arg-type]
    data = kernels.reference.encode(plan, torch.ones(num), seed=1)
    codes = math.ceil(num / 256) * 256 if rotate else num
    bytes_of_codes = math.ceil(codes / 5) if kind == "ternary" else math.ceil(codes * bits / 8)
    assert data.numel() == plan.nbytes(num) == bytes_of_codes + 2 * math.ceil(codes / plan.block)
