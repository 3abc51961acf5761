"""What the machines' network interfaces sent while a job ran, beside what the ledger counted."""

from __future__ import annotations

import json
from typing import Any

import torch

from fedq.collectives import Transport
from fedq.runtime.interfaces import interface_bytes, interfaces_used, network_identity

_RECORD = 512  # what a rank tells is padded to this, so that a run's bytes do not depend on how long its numbers are


class InterfaceCount:
    """Counts from the moment it is made; every rank makes one.

    Everything that crosses an interface is in it: other processes' traffic, TCP's headers, the launcher's own messages.

    Args:
        transport: Transport between the ranks.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        transport.barrier()
        self._before = interface_bytes()

    def total(self, counted: int) -> tuple[dict[str, Any] | None, int]:
        """Compare with the bytes that were counted; every rank calls it.

        Args:
            counted: Bytes that crossed ranks since this was made, as rank 0's ledger has them.

        Returns:
            First, on rank 0, the hosts with the bytes of their interfaces, and in all the bytes sent, those counted
            and their ratio; None on other ranks, with one rank alone, or without a counter. Second, the bytes that
            telling rank 0 took.
        """
        if self._transport.world_size == 1:
            return None, 0
        self._transport.barrier()  # what is in a socket's buffer has not been sent yet
        used = interfaces_used(self._before, interface_bytes())
        own = json.dumps({"host": network_identity(), "rank": self._transport.rank, "interfaces": used})
        padded = own.encode().ljust(-(-len(own.encode()) // _RECORD) * _RECORD)
        message = torch.frombuffer(bytearray(padded), dtype=torch.uint8)
        gathered, moved = self._transport.gather([message], [1] * self._transport.world_size)
        told = [json.loads(bytes(m.cpu().tolist())) for messages in gathered for m in messages]
        return _compared(told, counted) if told else None, moved.payload + moved.sizes


def _compared(told: list[dict[str, Any]], counted: int) -> dict[str, Any] | None:
    """Return each host once, the last that one of its ranks has seen of it."""
    hosts: dict[str, dict[str, Any]] = {}
    for one in told:
        host = hosts.setdefault(one["host"], {"host": one["host"].split()[0], "ranks": []})
        host["ranks"].append(one["rank"])
        host["interfaces"] = one["interfaces"]
    sent = sum(used["sent"] for host in hosts.values() for used in host["interfaces"].values())
    if not sent:
        return None
    ratio = sent / counted if counted else None
    return {"hosts": list(hosts.values()), "sent": sent, "counted": counted, "ratio": ratio}
