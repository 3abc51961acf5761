"""The compressed mean against one process that decodes every payload; bytes against the formulas; all ranks alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributed import Spy, run_group
from properties import few
from torch import Tensor

from fedq.codecs import codec
from fedq.collectives import MeanExchange, Residuals, Segment, assign_owners, choose_schedule, compressed_mean, cut
from fedq.collectives import segments as segments_module
from fedq.collectives.mean import rank_seed
from fedq.collectives.peers import Peers
from fedq.errors import FieldError

SHAPES = [(70, 33), (1,), (0,), (257,), (64, 3, 3, 3), (5000,)]
"""Odd sizes, a scalar, an empty tensor; the first is cut into segments below."""
SPECS = ["fp32", "bf16", "int8", "int4", "int2", "sign", "ternary", "blocktopk:k=2,block=64,bits=2", "topk:density=0.1"]
SEED = 77


def values(rank: int, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(sum(torch.Size(s).numel() for s in SHAPES), generator=generator)


def segments_of(first: str, second: str, world_size: int = 1, *, feedback: bool = True) -> list[Segment]:
    pair = codec(first).resolved(feedback=feedback), codec(second).resolved(feedback=feedback)
    numels = [torch.Size(shape).numel() for shape in SHAPES]
    return assign_owners(cut(numels, [pair] * len(SHAPES), range(len(SHAPES))), world_size)


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "SEGMENT", 1024)


# ---- one process ------------------------------------------------------------------------------------------------


class OneProcess:
    """What the schedules compute, with every rank's tensors and residuals at hand and nothing sent."""

    def __init__(self, segments: list[Segment], world_size: int, schedule: str) -> None:
        self.segments, self.world_size, self.schedule = segments, world_size, schedule
        numel = sum(s.numel for s in segments)
        self.first = torch.zeros(world_size, numel)
        self.second = torch.zeros(numel)

    def step(self, xs: list[Tensor], seed: int, *, feedback: bool) -> Tensor:
        out = torch.empty_like(xs[0])
        for s in self.segments:
            mean = torch.zeros(s.numel)
            for rank, x in enumerate(xs):
                residual = self.first[rank, s.slice] if feedback and s.first.wants_feedback else torch.zeros(s.numel)
                payload = s.first.encode(x[s.slice] + residual, seed=s.seed(rank_seed(seed, "first", rank)))
                decoded = payload.decode()
                residual.copy_(x[s.slice] + residual - decoded)
                mean += decoded * (1.0 / self.world_size)
            if self.schedule == "two_phase":
                residual = self.second[s.slice] if feedback and s.second.wants_feedback else torch.zeros(s.numel)
                total = mean + residual
                mean = s.second.encode(total, seed=s.seed(rank_seed(seed, "second", s.owner))).decode()
                residual.copy_(total - mean)
            out[s.slice] = mean
        return out


COMBINATIONS = [(s, s, True) for s in SPECS] + [("int4", "int6", False), ("sign", "int8", True)]


def _steps(rank: int, schedule: str) -> list[tuple[list[np.ndarray], int, int]]:
    """Average three times with every combination; return the results and the bytes as told and as spied."""
    segments_module.SEGMENT = 1024
    results = []
    for first, second, feedback in COMBINATIONS:
        with pytest.MonkeyPatch.context() as patch:
            spy = Spy(patch)
            exchange = MeanExchange(
                segments_of(first, second, Peers().size, feedback=feedback), Peers(), schedule=schedule
            )
            residuals, flats = Residuals() if feedback else None, []
            for step in range(3):
                flat = values(rank, step)
                exchange.run(flat, seed=SEED + step, residuals=residuals)
                flats.append(flat.numpy())
        results.append((flats, exchange.sent.first + exchange.sent.second, spy.sent))
    return results


@pytest.mark.parametrize("world_size", few([3, 1, 2, 4], 1))
@pytest.mark.parametrize("schedule", ["one_phase", "two_phase"])
def test_ranks_equal_one_process(world_size: int, schedule: str) -> None:
    results = run_group(world_size, _steps, schedule)
    for number, (first, second, feedback) in enumerate(COMBINATIONS):
        alone = OneProcess(segments_of(first, second, world_size, feedback=feedback), world_size, schedule)
        for step in range(3):
            xs = [values(rank, step) for rank in range(world_size)]
            expected = alone.step(xs, SEED + step, feedback=feedback) if world_size > 1 else xs[0]
            for rank, by_combination in enumerate(results):
                assert np.array_equal(by_combination[number][0][step], expected.numpy()), (first, second, rank, step)
    assert all(told == spied for by_combination in results for _, told, spied in by_combination)


# ---- reduce and hierarchical ------------------------------------------------------------------------------------


def _reduced(rank: int) -> list[np.ndarray]:
    segments_module.SEGMENT = 1024
    flats = []
    for spec in ("fp32", "bf16", "fp16", "randk:density=0.1,bits=32", "randk:density=0.1"):
        exchange = MeanExchange(segments_of(spec, spec, Peers().size, feedback=False), Peers(), schedule="reduce")
        flat = values(rank)
        exchange.run(flat, seed=SEED)
        flats.append(flat.numpy())
    return flats


@pytest.mark.parametrize("world_size", few([3, 2], 1))
def test_values_that_may_be_summed_are(world_size: int) -> None:
    results = run_group(world_size, _reduced)
    assert all(np.array_equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    fp32, bf16, fp16, randk, randk16 = map(torch.from_numpy, results[0])
    mean = torch.stack([values(rank) for rank in range(world_size)]).double().mean(0)
    torch.testing.assert_close(fp32.double(), mean, rtol=0, atol=2e-7 * 4)  # a rounding each, of values below 4
    torch.testing.assert_close(bf16.double(), mean, rtol=0, atol=world_size * 2.0**-7)  # values below 4
    torch.testing.assert_close(fp16.double(), mean, rtol=0, atol=world_size * 2.0**-10)
    kept = randk != 0
    assert kept.float().mean() == pytest.approx(0.1, abs=0.02)
    ratio = randk[kept] / mean[kept].float()  # unbiased: each kept value times the length of its run
    assert ratio.min() > 0.9
    assert ratio.max() < 12
    assert not (randk16[~kept] != 0).any()
    assert (randk16[kept] != 0).float().mean() > 0.97  # bfloat16 sums cancel exactly now and then


def _by_node(rank: int, inside: str) -> tuple[np.ndarray, int, int]:
    segments_module.SEGMENT = 1024
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        segments = segments_of("int4", "int6", 4)
        exchange = MeanExchange(segments, Peers(), schedule="hierarchical", ranks_per_node=2, inside=inside)
        residuals = Residuals()
        for step in range(2):
            flat = values(rank, step)
            exchange.run(flat, seed=SEED + step, residuals=residuals)
    return flat.numpy(), exchange.sent.first + exchange.sent.second, spy.sent


@pytest.mark.parametrize("inside", few(["int8", "fp32"], 1))
def test_a_hierarchy_is_two_phase_over_the_means_of_nodes(inside: str) -> None:
    results = run_group(4, _by_node, inside)
    assert all(np.array_equal(flat, results[0][0]) for flat, _, _ in results)
    assert all(told == spied for _, told, spied in results)
    mean = torch.stack([values(rank, 1) for rank in range(4)]).mean(0)
    error = (torch.from_numpy(results[0][0]) - mean).square().sum() / mean.square().sum()
    assert 1e-4 < error < 0.08  # int4 .011 and int6 .001, and the first step's residual


# ---- bytes, schedules, errors -----------------------------------------------------------------------------------

BITS = {
    "int4": 4 + 16 / 256,
    "int8": 8 + 16 / 256,
    "sign": 1 + 16 / 1024,
    "blocktopk:k=1,block=64,bits=2": 8 / 64 + 16 / 4096,
}


def _egress(rank: int) -> dict[tuple[str, str], int]:
    segments_module.SEGMENT = 1 << 12
    sent = {}
    for spec in BITS:
        for schedule in ("one_phase", "two_phase"):
            segments = assign_owners(cut([1 << 17], [(codec(spec),) * 2], [0]), Peers().size)
            exchange = MeanExchange(segments, Peers(), schedule=schedule)
            exchange.run(torch.ones(1 << 17), seed=1)
            sent[spec, schedule] = exchange.sent.first + exchange.sent.second
    return sent


@pytest.mark.parametrize("world_size", few([3, 2, 4, 8], 1))
def test_bytes_follow_the_formulas(world_size: int) -> None:
    results = run_group(world_size, _egress)
    for (spec, schedule), _ in results[0].items():
        payload = (1 << 17) * BITS[spec] / 8
        factor = world_size - 1 if schedule == "one_phase" else 2 * (world_size - 1) / world_size
        total = sum(sent[spec, schedule] for sent in results)
        assert total == pytest.approx(world_size * factor * payload, rel=0.01)


def test_owners_share_the_bytes() -> None:
    for world_size in (1, 2, 3, 5, 64):
        owned = [0] * world_size
        for segment in segments_of("int4", "int4", world_size):
            owned[segment.owner] += segment.numel
        assert max(owned) <= sum(owned) / world_size + 1024


@pytest.mark.parametrize(
    ("spec", "world_size", "ranks_per_node", "expected"),
    [
        ("fp32", 8, 1, "reduce"),
        ("int4", 2, 1, "one_phase"),
        ("int4", 3, 1, "two_phase"),
        ("int4", 8, 8, "two_phase"),
        ("int4", 8, 4, "hierarchical"),
        ("int4", 6, 4, "two_phase"),
    ],
)
def test_the_schedule_that_is_chosen(spec: str, world_size: int, ranks_per_node: int, expected: str) -> None:
    segments = cut([100_000], [(codec(spec),) * 2], [0])
    assert choose_schedule("auto", segments, world_size, ranks_per_node) == expected
    tiny = cut([100], [(codec("int4"),) * 2], [0])
    assert choose_schedule("auto", tiny, 8, 1) == "one_phase"


@pytest.mark.parametrize(
    ("spec", "schedule", "ranks_per_node", "text"),
    [
        ("int4", "ring", 1, "schedule='ring' .*two_phase"),
        ("int4", "reduce", 1, "schedule='reduce'"),
        ("int4", "hierarchical", 1, "schedule='hierarchical' .*8 ranks, 1 a node"),
        ("int4", "hierarchical", 3, "8 ranks, 3 a node"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(spec: str, schedule: str, ranks_per_node: int, text: str) -> None:
    with pytest.raises(FieldError, match=text):
        choose_schedule(schedule, cut([100], [(codec(spec),) * 2], [0]), 8, ranks_per_node)


def test_a_payload_of_unknown_size_is_refused() -> None:
    with pytest.raises(FieldError, match="threshold"):
        compressed_mean(torch.ones(3), "threshold:value=0.1")


def _simple(rank: int) -> None:
    x = torch.full((3, 5), float(rank), dtype=torch.bfloat16)
    exact, coded = compressed_mean(x, "fp32"), compressed_mean(x, "int8", schedule="two_phase")
    assert exact.dtype == coded.dtype == torch.bfloat16
    assert torch.equal(exact, torch.ones(3, 5, dtype=torch.bfloat16))
    torch.testing.assert_close(coded, exact, rtol=0.02, atol=0)
    assert compressed_mean(torch.empty(0, 4)).shape == (0, 4)
    z = torch.full((2, 3), complex(rank, -2 * rank), dtype=torch.complex128)
    assert torch.equal(compressed_mean(z.conj(), "fp32"), torch.full((2, 3), 1 + 2j, dtype=torch.complex128))


def test_one_call_averages_one_tensor() -> None:
    run_group(3, _simple)
    x = torch.randn(7)
    assert torch.equal(compressed_mean(x, "sign"), x), "one rank's mean is its own"
