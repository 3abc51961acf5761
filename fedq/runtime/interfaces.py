"""Bytes that this machine's network interfaces have sent and received, as the kernel counts them. Only looks."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

Counts = Mapping[str, tuple[int, int]]
"""Bytes sent and bytes received, by interface."""
_NET = Path("/sys/class/net")
_INFINIBAND = Path("/sys/class/infiniband")
_WORD = 4  # InfiniBand's data counters count words


def interface_bytes(net: Path = _NET, infiniband: Path = _INFINIBAND) -> dict[str, tuple[int, int]]:
    """Return bytes sent and received since the machine was started, by interface; empty where nothing is counted.

    Ports of a bridge and parts of a bond are left out, because what passes them is counted there too. NVLink and shared
    memory have no counters here.

    Args:
        net: Folder in which the kernel shows network interfaces.
        infiniband: Folder in which the kernel shows InfiniBand devices.
    """
    found = {
        path.name: (_number(path / "statistics/tx_bytes"), _number(path / "statistics/rx_bytes"))
        for path in _entries(net)
        if not (path / "master").exists() and (path / "statistics/tx_bytes").exists()
    }
    for device in _entries(infiniband):
        for port in _entries(device / "ports"):
            sent, received = (port / f"counters/port_{way}_data" for way in ("xmit", "rcv"))
            if sent.exists():
                found[f"{device.name}/{port.name}"] = (_WORD * _number(sent), _WORD * _number(received))
    return found


def interfaces_used(before: Counts, now: Counts) -> dict[str, dict[str, int]]:
    """Return the bytes ``sent`` and ``received`` between two counts, of the interfaces that moved any."""
    used = {}
    for name, (sent, received) in now.items():
        sent_before, received_before = before.get(name, (0, 0))
        if (sent, received) != (sent_before, received_before):
            used[name] = {"sent": sent - sent_before, "received": received - received_before}
    return used


def network_identity() -> str:
    """Return what two processes have in common exactly if they see the same interfaces: host and network namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:  # not Linux
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # an interface that is going away
        return 0
