"""Ranks that exchange buffers directly, in pieces of about a megabyte, each counted by who sends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedq.errors import FieldError

_PIECE = 1 << 20
"""Most bytes in flight at a time and direction on Gloo: larger messages run half duplex."""


class Peers:
    """A process group, or some ranks of one, as equal partners.

    A copy (by `copy.deepcopy` or pickle) leaves the process group out: it knows who took part, and sends nothing.

    Args:
        group: The process group. Default: all ranks, or this process alone if there is no process group.
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
        self.is_copy = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"group": None, "is_copy": True}

    @property
    def wire_device(self) -> torch.device:
        """Where the process group takes buffers from."""
        return torch.device("cuda", torch.cuda.current_device()) if self.is_nccl else torch.device("cpu")

    def split(self, ranks_per_node: int) -> tuple[Peers, Peers]:
        """Return this rank's node, and the ranks of the other nodes in the same place as this one."""
        node, place = divmod(self.rank, ranks_per_node)
        inside = self.members[node * ranks_per_node : (node + 1) * ranks_per_node]
        return Peers(self.group, inside), Peers(self.group, self.members[place::ranks_per_node])

    def exchange(self, sends: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send a uint8 buffer to each member and return what each sent, this rank's own without a copy.

        Args:
            sends: Buffers, one for each member.
            sizes: Number of bytes that come from each member.

        Raises:
            FieldError: This object is a copy, which has no process group.
        """
        self.check_original()
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
        """Sum values over the group in place; return the bytes that a ring sends from each rank.

        Raises:
            FieldError: This object is a copy, which has no process group.
        """
        self.check_original()
        on_wire = values if self.is_nccl else values.cpu()
        dist.all_reduce(on_wire, group=self.group)
        if on_wire is not values:
            values.copy_(on_wire)
        return 2 * (self.size - 1) * values.numel() * values.element_size() // self.size

    def gather_texts(self, text: str) -> list[str]:
        """Return every member's text, in their order; every member must call it."""
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.wire_device)
        size = torch.tensor([own.numel()], device=self.wire_device).view(torch.uint8)
        sizes = [int(found.view(torch.int64)) for found in self.exchange([size] * self.size, [8] * self.size)]
        return [data.cpu().numpy().tobytes().decode() for data in self.exchange([own] * self.size, sizes)]

    def check_original(self) -> None:
        """Raise `FieldError` if this is a copy, which has no process group."""
        if self.is_copy:
            allowed = "what register or step_state returned; a copy leaves process group and thread out"
            raise FieldError("exchange", "a copy", allowed)

    def _parts(self, buffer: Tensor) -> Sequence[Tensor]:
        if not buffer.numel():
            return []
        return [buffer] if self.is_nccl else buffer.split(_PIECE)
