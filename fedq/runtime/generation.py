"""Tells the starts of a job apart in a store that outlives them, as that of torchrun's agent does.

The agents' restart counts cannot: each agent counts its own, and one whose ranks were only stopped because another
agent's failed keeps its number.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from fedq.runtime.launcher import Ranks, rendezvous
from fedq.runtime.meeting import Meeting

_KEY = "fedq/generation"
_BEAT_S = 0.02
_TIMEOUT = timedelta(seconds=60)


def is_served(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's agent has a store at which the ranks meet."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agent_store(ranks: Ranks, environ: Mapping[str, str]) -> dist.Store | None:
    """Return a connection to the store of torchrun's agent, which outlives its workers; None without one."""
    if not is_served(environ):
        return None
    address, port = rendezvous(ranks, environ)
    return dist.TCPStore(address, port, is_master=False, timeout=_TIMEOUT, wait_for_workers=False)


@contextmanager
def generation(server: dist.TCPStore, meeting: Meeting) -> Iterator[dist.Store]:
    """Give the part of the store that belongs to this start of the job alone; rank 0 draws its name.

    The name that other ranks find may be that of an earlier start, so they take one only when they have seen that rank
    0 lives under it: there is a counter that it moves as long as the body lasts.

    Raises:
        RendezvousError: Rank 0 has not come in time.
    """
    if meeting.ranks.rank != 0:
        yield _joined(server, meeting)
        return
    token = secrets.token_hex(8)
    server.set(_KEY, token)
    is_over = threading.Event()
    beating = threading.Thread(target=_beat, args=(server, token, is_over), name="fedq-generation", daemon=True)
    beating.start()
    try:
        yield _part(server, token)
    finally:
        is_over.set()
        beating.join()


def _part(server: dist.Store, token: str) -> dist.Store:
    return dist.PrefixStore(f"fedq/{token}", server)


def _beat(server: dist.TCPStore, token: str, is_over: threading.Event) -> None:
    # A connection of its own: the other is busy while its thread waits.
    with suppress(dist.DistError):  # without the store nobody meets, which every rank says itself
        own = dist.TCPStore(server.host, server.port, is_master=False, timeout=_TIMEOUT, wait_for_workers=False)
        store = _part(own, token)
        while not is_over.is_set():
            store.add("beat", 1)
            is_over.wait(_BEAT_S)


def _joined(server: dist.Store, meeting: Meeting) -> dist.Store:
    """Return the part of the first name under which rank 0 is seen to live."""
    first_seen: dict[str, int] = {}
    wait = meeting.wait(lambda: f"rank 0 at {meeting.where}")
    while wait.left_s:
        if server.check([_KEY]):
            token = server.get(_KEY).decode()
            part = _part(server, token)
            beats = part.add("beat", 0)
            if first_seen.setdefault(token, beats) != beats:
                return part
        wait.look()
        time.sleep(_BEAT_S)
    raise meeting.missed(f"rank 0 has not come to rank {meeting.ranks.rank}")
