"""How many connections a server takes: never so many that its own files and sockets find no descriptor."""

from __future__ import annotations

import os
import socket

from fedq.errors import FieldError

_FOR_STRANGERS = 1024
_FOR_ITSELF = 48  # tables, checkpoints and events of the run; sockets and timers of gRPC


def connection_limit(num_clients: int, host: str = "127.0.0.1") -> int:
    """Return how many connections to take: two a client (one may be left over from before a reconnect), and strangers.

    Where the process may have too few files open for that, its soft limit rises as far as the hard one allows.

    Args:
        num_clients: Number of clients in the federation.
        host: Host name or address where they arrive; gRPC counts the connections to each of its addresses for itself.

    Raises:
        FieldError: There would not be one for each client.
    """
    num_addresses, wanted = _num_addresses(host), 2 * num_clients + _FOR_STRANGERS
    used, limit = _descriptors(wanted * num_addresses)
    room = min(wanted, (limit - used - _FOR_ITSELF) // num_addresses)
    if room < num_clients:
        words = f"at most {max(0, room)}: this process may have {limit} files open (ulimit -n)"
        raise FieldError("num_clients", num_clients, words)
    return room


def _num_addresses(host: str) -> int:
    """Return how many addresses a host has; a name has one of either family for gRPC, whatever is found here."""
    try:
        found = {one[4][0] for one in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:  # binding will say so
        return 2
    return 1 if found == {host} else max(2, len(found))


def _descriptors(wanted: int) -> tuple[int, int]:
    """Return how many are open, and how many may be, after as many as are wanted were asked for."""
    used = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else _FOR_ITSELF
    most = used + _FOR_ITSELF + wanted
    try:
        import resource
    except ImportError:  # not POSIX: no such limit
        return used, most
    soft, hard = (most if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < min(most, hard):
        soft = min(most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return used, soft
