"""How the ranks of a job find each other: a store at rank 0's address, in which they are counted.

Every wait here has an end and a voice: which ranks are missing, at which address, and what may have misled this one.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from fedq.errors import RendezvousError
from fedq.runtime.launcher import Ranks
from fedq.text import clean
from fedq.waiting import Wait, named, speaking

POLL_S = 0.2
_CONNECT_S = 5.0
"""Longest single try to connect, in seconds."""


@dataclass(frozen=True)
class Meeting:
    """Who meets, where and for how long they wait for each other.

    Args:
        ranks: This process's place among the ranks.
        address: Address of the machine that runs rank 0.
        port: Port at that address.
        timeout: Longest wait for anybody.
        hints: Sentences on what may have misled this process.
    """

    ranks: Ranks
    address: str
    port: int
    timeout: timedelta
    hints: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Address and port."""
        return f"{self.address}:{self.port}"

    def wait(self, whom: Callable[[], str]) -> Wait:
        """Return a wait of this rank that begins now."""
        here = f"rank {self.ranks.rank}: "
        return Wait(whom, self.timeout.total_seconds(), hints=self.hints, heading=here)

    def missed(self, what: str) -> RendezvousError:
        """Return the error of a rank that has waited in vain."""
        waited = f"WORLD_SIZE={self.ranks.world_size}, but after {self.timeout.total_seconds():g} s {what}"
        return RendezvousError("; ".join([waited, *self.hints]))


def open_store(meeting: Meeting, *, is_server: bool) -> dist.TCPStore:
    """Return the store at which the ranks meet; one of them serves it, the others wait until it does.

    Raises:
        RendezvousError: The store cannot be served, or nobody serves it in time.
    """
    last = "no answer"
    wait = meeting.wait(lambda: f"rank 0 at {meeting.where} ({last})")
    with speaking(wait):
        # Torch's own tries say nothing that a person could use, and never end at a port that takes calls in silence.
        while not is_server and (refusal := _refusal(meeting, wait.left_s)) is not None:
            last = refusal
            if not wait.left_s:
                raise meeting.missed(f"rank 0 has not answered at {meeting.where} ({last})")
            wait.pause(POLL_S)
        try:
            return _within(wait.left_s, lambda: _store(meeting, is_server))
        except TimeoutError:
            raise meeting.missed(f"there is no store of a rank 0 at {meeting.where}") from None


def count_ranks(store: dist.Store, meeting: Meeting) -> None:
    """Wait until WORLD_SIZE ranks have come, each once and all of one mind about how many they are.

    Raises:
        RendezvousError: A rank did not come, came twice, or has another WORLD_SIZE.
    """
    rank, world_size = meeting.ranks.rank, meeting.ranks.world_size
    first = int(store.compare_set("world_size", "", str(world_size)))
    if first != world_size:
        raise RendezvousError(f"WORLD_SIZE={world_size} on rank {rank}, but {first} on another rank")
    if store.add(f"rank{rank}", 1) > 1:
        raise RendezvousError(f"RANK={rank} came twice to a job of WORLD_SIZE={world_size}")
    if store.add("num_ranks", 1) == world_size:
        store.set("complete", "")
    wait = meeting.wait(lambda: f"{_missing(store, world_size)} of {world_size} at {meeting.where}")
    while not store.check(["complete"]):
        if not wait.left_s:
            came = f"the real number of ranks is {store.add('num_ranks', 0)}"
            raise meeting.missed(f"{came}: {_missing(store, world_size)} did not come to {meeting.where}")
        wait.look()
        wait.pause(POLL_S)


@contextmanager
def failures_told(meeting: Meeting) -> Iterator[None]:
    """Tell what torch raises in the body, where ranks only meet, as a failure to meet.

    Raises:
        RendezvousError: The body raised this, or another RuntimeError, which is then its cause.
    """
    try:
        yield
    except RendezvousError:
        raise
    except RuntimeError as error:  # torch's own classes are of this kind, and Gloo has none
        words = f"rank {meeting.ranks.rank} of {meeting.ranks.world_size} could not meet the others at {meeting.where}"
        reason = clean(str(error).partition("\n")[0])  # what follows is a stack of C++
        raise RendezvousError("; ".join([f"{words}: {reason}", *meeting.hints])) from error


def _missing(store: dist.Store, world_size: int) -> str:
    return named("rank", [rank for rank in range(world_size) if not store.check([f"rank{rank}"])])


def _refusal(meeting: Meeting, left_s: float) -> str | None:
    """Return why nobody takes a call at the address; None if somebody does."""
    try:
        socket.create_connection((meeting.address, meeting.port), min(_CONNECT_S, max(0.1, left_s))).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def _store(meeting: Meeting, is_server: bool) -> dist.TCPStore:
    return dist.TCPStore(
        meeting.address, meeting.port, is_master=is_server, timeout=meeting.timeout, wait_for_workers=False
    )


def _within(seconds: float, make: Callable[[], dist.TCPStore]) -> dist.TCPStore:
    """Return what a call returns that may never do so.

    Raises:
        TimeoutError: The call has not returned in time; its thread is left behind.
    """
    made: Future[dist.TCPStore] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, name="fedq-store", daemon=True).start()
    try:
        return made.result(seconds)
    except FutureTimeout:
        raise TimeoutError from None
