"""What the server knows of one client: where it is, what it holds, what it was asked, how it behaved."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from fedq.layout import LayoutSchedule
from fedq.ledger import MessageParts
from fedq.wire import Message

_BURST, _PER_S = 10.0, 1.0


class RateLimit:
    """A token bucket: so many at once, so many a second.

    Args:
        burst: Number of tokens in a full bucket.
        per_s: Number of tokens that come back each second.
    """

    def __init__(self, burst: float = _BURST, per_s: float = _PER_S) -> None:
        self.burst, self.per_s = burst, per_s
        self._tokens, self._seen = burst, time.monotonic()

    def take(self) -> bool:
        """Take a token; say whether there was one."""
        now = time.monotonic()
        self._tokens = min(self.burst, self._tokens + (now - self._seen) * self.per_s)
        self._seen = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass
class Task:
    """What a client was asked in a round, and what became of it.

    Args:
        round: Number of the round, from 0.
        sequence: Number that the answer repeats; no two tasks of a run have the same.
    """

    round: int
    sequence: int
    answer: Message | None = None
    reason: str | None = None
    """Reason why there is no answer, in words."""
    tries: int = 0
    """Number of times that the client has begun to send an answer."""

    @property
    def is_open(self) -> bool:
        """Whether an answer is still wanted."""
        return self.answer is None and self.reason is None


@dataclass
class ClientRecord:
    """What the server knows of one client of the federation.

    Args:
        number: The client's number, from 0.
    """

    number: int
    session: str = ""
    """Word that the client's messages repeat; a new one with each connection."""
    uplink: LayoutSchedule | None = None
    """Layouts of its updates."""
    num_examples: int = 0
    version: int | None = None
    """Number of rounds that the client's model has seen; None: it has none, or one that is not ours."""
    is_connected: bool = False
    lost_at: float = 0.0
    """Time at which its connection was lost, by `time.monotonic`."""
    task: Task | None = None
    is_silent: bool = False
    """Whether it was here and has let a whole round pass, and has not answered since."""
    offences: int = 0
    instance: str = ""
    """Word that the process which is this client says whenever it joins; nobody else knows it."""
    peer: str = ""
    """Address that the client came from."""
    joins: RateLimit = field(default_factory=RateLimit)
    returns: RateLimit = field(default_factory=RateLimit)
    """Limit on the joins of the process that is this client: no other that knocks in its name takes its calls."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there is something to tell it."""
    followers: set[asyncio.Task[None]] = field(default_factory=set)
    """Tasks that tell the client what it is asked; one, or two for a moment while it reconnects."""
    why_ended: dict[asyncio.Task[None], str] = field(default_factory=dict)
    """Reason that each follower which was ended tells its caller."""
    uploads: set[asyncio.Task[None]] = field(default_factory=set)
    moved: list[tuple[str, MessageParts]] = field(default_factory=list)
    """Direction and make-up of what crossed since it was last booked."""

    def told(self) -> None:
        """Wake whoever tells it."""
        self.news.set()

    def end_followers(self, reason: str) -> None:
        """End what is telling it, with words for its caller."""
        for follower in self.followers:
            self.why_ended[follower] = reason
            follower.cancel()

    def has_open_task(self, round: int) -> bool:
        """Whether its answer of a round is still wanted."""
        return self.task is not None and self.task.round == round and self.task.is_open
