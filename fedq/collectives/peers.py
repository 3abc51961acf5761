"""Ranks that exchange buffers directly, in pieces of about a megabyte, each counted by who sends it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_PIECE = 1 << 20
"""Bytes in flight at a time and direction on Gloo: larger ones run half duplex."""


class Peers:
    """A process group, or some ranks of one, as equal partners.

    Args:
        group: Default: all ranks, or this process alone if there is no process group.
        members: Ranks of the group that take part, in order; default: all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, members: Sequence[int] | None = None) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.group = group if group is not None or not active else dist.group.WORLD
        me = dist.get_rank(self.group) if self.group is not None else 0
        everyone = range(dist.get_world_size(self.group)) if self.group is not None else range(1)
        self.members = list(everyone if members is None else members)
        self.rank = self.members.index(me)
        self.size = len(self.members)
        self.is_nccl = self.group is not None and dist.get_backend(self.group) == "nccl"

    def split(self, ranks_per_node: int) -> tuple[Peers, Peers]:
        """Return this rank's node, and the ranks of the other nodes in the same place as this one."""
        node, place = divmod(self.rank, ranks_per_node)
        inside = self.members[node * ranks_per_node : (node + 1) * ranks_per_node]
        return Peers(self.group, inside), Peers(self.group, self.members[place::ranks_per_node])

    def exchange(self, sends: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send a uint8 buffer to each member and return what each sent, this rank's own without a copy.

        Args:
            sends: One for each member.
            sizes: Bytes that come from each member.
        """
        device = sends[self.rank].device
        wire = device if self.is_nccl else torch.device("cpu")
        received = [torch.empty(size, dtype=torch.uint8, device=wire) for size in sizes]
        received[self.rank] = sends[self.rank]
        others = [r for r in range(self.size) if r != self.rank]
        going = [(r, sends[r].to(wire)) for r in others]
        operations = [
            dist.P2POp(dist.irecv, part, group=self.group, group_peer=self.members[r])
            for r in others
            for part in self._parts(received[r])
        ] + [
            dist.P2POp(dist.isend, part, group=self.group, group_peer=self.members[r])
            for r, buffer in going
            for part in self._parts(buffer)
        ]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return [buffer.to(device) for buffer in received]

    def all_reduce(self, values: Tensor) -> int:
        """Sum values over the group in place; return the bytes that a ring sends from each rank."""
        on_wire = values if self.is_nccl else values.cpu()
        dist.all_reduce(on_wire, group=self.group)
        if on_wire is not values:
            values.copy_(on_wire)
        return 2 * (self.size - 1) * values.numel() * values.element_size() // self.size

    def _parts(self, buffer: Tensor) -> Sequence[Tensor]:
        if not buffer.numel():
            return []
        return [buffer] if self.is_nccl else buffer.split(_PIECE)
