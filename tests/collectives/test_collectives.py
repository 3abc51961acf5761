"""The transport at one, two and three ranks, its byte counts against a spy, and the ranks' own starter."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import torch.distributed as dist
from distributed import RankFailed, Spy, run_group
from torch import Tensor

from fedq.collectives import Moved, Transport

COUNTS = [(1, 1, 1), (2, 0, 3), (0, 2, 0), (3, 4, 0), (0, 0, 0)]
SIZES = (0, 1, 52, 70_001)


def message(rank: int, number: int) -> Tensor:
    """The number-th message of a rank; any rank can tell what it must be."""
    generator = torch.Generator().manual_seed(100 * rank + number)
    return torch.randint(256, (SIZES[(rank + number) % 4],), dtype=torch.uint8, generator=generator)


def _all_operations(rank: int, world_size: int) -> tuple[list[Moved], int, int]:
    """Check what arrives; return what rank 0 was told has moved, and the spy's sent and received bytes."""
    with pytest.MonkeyPatch.context() as patch:
        spy, transport, told = Spy(patch), Transport(), []
        assert (transport.rank, transport.world_size) == (rank, world_size)
        for counts in COUNTS:
            own = [message(rank, i) for i in range(counts[rank])]
            gathered, moved = transport.gather(own, counts[:world_size])
            told.append(moved)
            expected = [[message(r, i) for i in range(counts[r])] for r in range(world_size)] if rank == 0 else []
            assert [len(m) for m in gathered] == [len(m) for m in expected]
            pairs = zip(itertools.chain(*gathered), itertools.chain(*expected), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        for number in range(4):
            received, moved = transport.broadcast(message(0, number) if rank == 0 else None)
            told.append(moved)
            assert torch.equal(received, message(0, number))
        for make in (
            lambda r: torch.arange(6, dtype=torch.float64).view(3, 2) / 3 + r,
            lambda r: torch.tensor(r),
            lambda r: torch.ones(2, 3).t() * r,  # not contiguous
            lambda r: torch.empty(0, 2),
        ):
            values, moved = transport.all_gather(make(rank))
            told.append(moved)
            assert torch.equal(values, torch.stack([make(r) for r in range(world_size)]))
        transport.barrier()
        return told, spy.sent, spy.received


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_everything_arrives_and_is_counted(world_size: int) -> None:
    results = run_group(world_size, _all_operations, world_size)
    told = results[0][0]
    crossed = sum(moved.payload + moved.sizes for moved in told)
    assert crossed == sum(sent for _, sent, _ in results) == sum(received for _, _, received in results)
    assert (crossed == 0) == (world_size == 1)
    for counts, moved in zip(COUNTS, told, strict=False):
        sizes = [message(r, i).numel() for r in range(1, world_size) for i in range(counts[r])]
        assert moved == Moved(sum(sizes), 8 * len(sizes))


def _in_subgroup(rank: int) -> list[float]:
    group = dist.new_group([1, 2])
    if rank == 0:
        return []
    transport = Transport(group=group)
    gathered, _ = transport.gather([message(rank, 0)] * (rank == 2), [0, 1])
    received, _ = transport.broadcast(message(7, 3) if transport.rank == 0 else None)
    assert torch.equal(received, message(7, 3))
    return [m.sum().item() for m in itertools.chain(*gathered)]


def test_a_group_of_some_ranks_has_its_own_rank_0() -> None:
    assert run_group(3, _in_subgroup) == [[], [message(2, 0).sum().item()], []]


def _one_fails(rank: int) -> None:
    if rank == 1:
        raise KeyError("from rank 1")
    dist.barrier()


def test_a_rank_that_raises_ends_the_test_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match=r"rank 1 raised\n(.|\n)*in _one_fails\n(.|\n)*KeyError: 'from rank 1'"):
        run_group(2, _one_fails)


def _wait_for_ever(rank: int) -> None:
    if rank == 1:
        threading.Event().wait()


def test_a_rank_that_hangs_is_killed() -> None:
    with pytest.raises(RankFailed, match=r"ranks \[.*1\] hang"):
        run_group(2, _wait_for_ever, limit_s=2)
