"""What this machine's network interfaces have moved, beside what was counted: a server's view of the wire."""

from __future__ import annotations

from typing import Any

from fedq.runtime.interfaces import interface_bytes, interfaces_used, network_identity

_LOOPBACK = "lo"


class InterfaceTraffic:
    """Counts from the moment it is made; everything that crosses an interface is in it, other programs' too."""

    def __init__(self) -> None:
        self._before = interface_bytes()

    def total(self, counted: int) -> dict[str, Any] | None:
        """Compare with the bytes that were counted, both ways, as a summary's ``interface`` has it.

        What arrives was sent by a client's interface; on loopback it is the server's own and counts once.

        Args:
            counted: Number of bytes of messages, sent and received, since this was made.
        """
        used = interfaces_used(self._before, interface_bytes())
        total = sum(one["sent"] + (name != _LOOPBACK) * one["received"] for name, one in used.items())
        if not total:
            return None
        host = {"host": network_identity().split()[0], "ranks": [0], "interfaces": used}
        return {"hosts": [host], "sent": total, "counted": counted, "ratio": total / counted if counted else None}
