"""Moves uint8 buffers between ranks and counts what it hands to the process group.

`Transport` gathers messages of any size to rank 0, broadcasts from it, exchanges buffers between all ranks and shares
small metrics; without a process group (one rank) it moves nothing. Gloo cannot take CUDA tensors here, so payloads are
staged through the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fedq.collectives.peers import Peers
from fedq.phases import PhaseTimer, clock_of


@dataclass(frozen=True)
class Moved:
    """Bytes that one operation moved between ranks: the payload, and the size tables in front of it."""

    payload: int = 0
    sizes: int = 0


P = ParamSpec("P")
R = TypeVar("R")


def _waiting(method: Callable[Concatenate[Transport, P], R]) -> Callable[Concatenate[Transport, P], R]:
    """Book a method's time as that of the exchange."""

    @functools.wraps(method)
    def timed(self: Transport, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.timer.phase("exchange"):
            return method(self, *args, **kwargs)

    return timed


class Transport:
    """The process group as the rounds use it.

    Args:
        device: Device of this rank's tensors.
        group: A process group; None: the default group if there is one, otherwise a single rank.
        timer: Timer that is told how long this rank waits for others and for the link; default: one of its own.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
        timer: PhaseTimer | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.timer = timer or PhaseTimer(clock_of(device))
        active = dist.is_available() and dist.is_initialized()
        self.group = group if group is not None or not active else dist.group.WORLD
        self.rank = dist.get_rank(self.group) if self.group is not None else 0
        self.world_size = dist.get_world_size(self.group) if self.group is not None else 1
        nccl = self.group is not None and dist.get_backend(self.group) == "nccl"
        self.wire_device = self.device if nccl else torch.device("cpu")
        self.received = 0
        """Number of bytes of the buffers that came from other ranks to this one."""

    @_waiting
    def gather(self, messages: Sequence[Tensor], counts: Sequence[int]) -> tuple[list[list[Tensor]], Moved]:
        """Send this rank's messages to rank 0.

        Args:
            messages: Messages of this rank, flat uint8 of any sizes.
            counts: Number of messages of each rank, known to all.

        Returns:
            On rank 0 the messages of every rank, in rank order, and the bytes that crossed; elsewhere an empty list and
            no bytes.
        """
        if self.world_size == 1:
            return [list(messages)], Moved()
        if self.rank == 0:
            return self._receive(messages, counts)
        if counts[self.rank]:
            sizes = torch.tensor([m.numel() for m in messages], dtype=torch.int64, device=self.wire_device)
            dist.send(sizes.view(torch.uint8), group=self.group, group_dst=0)
            works = [dist.isend(m.to(self.wire_device), group=self.group, group_dst=0) for m in messages]
            for work in works:
                _wait(work)
        return [], Moved()

    def _receive(self, own: Sequence[Tensor], counts: Sequence[int]) -> tuple[list[list[Tensor]], Moved]:
        """Receive on rank 0: every rank's size table, then all messages in flight together."""
        received: list[list[Tensor]] = [list(own)]
        works: list[dist.Work | None] = []
        for rank in range(1, self.world_size):
            sizes = self._empty(8 * counts[rank])
            if counts[rank]:
                dist.recv(sizes, group=self.group, group_src=rank)
            buffers = [self._empty(int(n)) for n in sizes.view(torch.int64).tolist()]
            works += [dist.irecv(buffer, group=self.group, group_src=rank) for buffer in buffers]
            received.append(buffers)
        for work in works:
            _wait(work)
        crossed = sum(m.numel() for messages in received[1:] for m in messages)
        self.received += crossed + 8 * sum(counts[1:])
        return [[m.to(self.device) for m in messages] for messages in received], Moved(crossed, 8 * sum(counts[1:]))

    @_waiting
    def broadcast(self, message: Tensor | None) -> tuple[Tensor, Moved]:
        """Send a uint8 message of any size from rank 0 to all; return it on every rank, and the bytes that crossed."""
        if self.world_size == 1:
            assert message is not None
            return message, Moved()
        others = self.world_size - 1
        size = torch.tensor([0 if message is None else message.numel()], device=self.wire_device).view(torch.uint8)
        dist.broadcast(size, group=self.group, group_src=0)
        nbytes = int(size.view(torch.int64))
        buffer = self._empty(nbytes) if message is None else message.to(self.wire_device)
        dist.broadcast(buffer, group=self.group, group_src=0)
        self.received += (8 + nbytes) * (self.rank != 0)
        return buffer.to(self.device), Moved(nbytes * others, 8 * others)

    @_waiting
    def exchange(self, sends: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send a uint8 buffer to each rank and return what each sent, by rank; this rank's own moves nowhere.

        Args:
            sends: Buffers, one for each rank, on this rank's device.
            sizes: Number of bytes that come from each rank.
        """
        received = Peers(self.group).exchange(sends, sizes)
        self.received += sum(buffer.numel() for rank, buffer in enumerate(received) if rank != self.rank)
        return received

    def share(self, values: Tensor) -> Moved:
        """Replace every rank's flat contiguous tensor by rank 0's; return the bytes that crossed."""
        message, moved = self.broadcast(values.view(torch.uint8) if self.rank == 0 else None)
        values.copy_(message.view(values.dtype))
        return moved

    @_waiting
    def all_gather(self, values: Tensor) -> tuple[Tensor, Moved]:
        """Share one small tensor of equal size from each rank; return (world_size, ...) and the bytes that crossed."""
        if self.world_size == 1:
            return values.unsqueeze(0), Moved()
        flat = values.contiguous().to(self.wire_device).view(-1).view(torch.uint8)
        out = self._empty(self.world_size * flat.numel())
        _all_gather(out, flat, self.group)
        crossed = flat.numel() * self.world_size * (self.world_size - 1)
        self.received += out.numel() - flat.numel()
        shaped = out.view(values.dtype).view(self.world_size, *values.shape)
        return shaped.to(values.device), Moved(crossed)

    @_waiting
    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def _empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.wire_device)


def _all_gather(out: Tensor, own: Tensor, group: dist.ProcessGroup | None) -> None:
    """Gather every rank's flat buffer; newer torch has another name for it and warns of the old one."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, own, group=group)


def _wait(work: dist.Work | None) -> None:
    """Wait for a point-to-point operation (None on a rank outside the group)."""
    assert work is not None
    work.wait()
