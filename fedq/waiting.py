"""Waiting that is never silent: after some seconds one line says for whom, how long still and what may be in the way.

Every wait for somebody else (a server, another rank, a mirror) goes through here. What is waited for, and how, lives
with those who wait.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pace:
    """When a wait speaks.

    Args:
        first_s: Seconds of silence before the first line.
        again_s: Seconds from one line to the next.
    """

    first_s: float = 5.0
    again_s: float = 60.0


PACE = Pace()
"""The pace of every wait that is given none of its own."""


def to_stderr(line: str) -> None:
    """Print a line on standard error; a wait goes on where nobody hears it."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class Wait:
    """One wait, begun when this is made. Whoever polls calls `look` each time; others are in `speaking`.

    Args:
        whom: Returns the words for who is awaited, and where; called when a line is due.
        timeout_s: Seconds after which the wait is given up; infinity: never.
        hints: Possible causes in the environment, in words, each said at the end of a line.
        heading: Words with which each line begins.
        say: Function that is given each line.
        first_s: Seconds before the first line. Default: those of the pace.
        pace: Times at which lines are due. Default: `PACE`.
        clock: Returns seconds that only grow.
    """

    def __init__(
        self,
        whom: Callable[[], str],
        timeout_s: float = math.inf,
        *,
        hints: Sequence[str] = (),
        heading: str = "",
        say: Say = to_stderr,
        first_s: float | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timeout_s = timeout_s
        self._whom, self._hints, self._heading, self._say, self._clock = whom, hints, heading, say, clock
        self._pace = PACE if pace is None else pace
        self._speaking = threading.Lock()  # one may poll while a thread speaks for it
        self._began = clock()
        self._due = self._began + (self._pace.first_s if first_s is None else first_s)

    @property
    def left_s(self) -> float:
        """Seconds until the wait is given up; 0 when it should have been."""
        return max(0.0, self._began + self.timeout_s - self._clock())

    @property
    def quiet_s(self) -> float:
        """Seconds until the next line is due."""
        return max(0.0, self._due - self._clock())

    def look(self) -> None:
        """Say the line, if it is due."""
        with self._speaking:
            if self._clock() >= self._due:
                self._say(self.line())
                self._due = self._clock() + self._pace.again_s

    def line(self) -> str:
        """Return what there is to say now."""
        waited = f"{self._heading}waiting for {self._whom()}: {self._clock() - self._began:.0f} s so far"
        still = "" if math.isinf(self.timeout_s) else f", for {self.left_s:.0f} s more"
        return "; ".join([waited + still, *self._hints])

    def pause(self, most_s: float) -> None:
        """Sleep at most so long: a tenth of the time waited so far, and no longer than there is."""
        waited = self._clock() - self._began
        time.sleep(min(most_s, self.left_s, 0.005 + waited / 10))


@contextmanager
def speaking(wait: Wait) -> Iterator[Wait]:
    """Speak for the body, which waits and cannot be asked meanwhile: a thread looks at the clock."""
    over = threading.Event()
    thread = threading.Thread(target=_speak, args=(wait, over), name="fedq-waiting", daemon=True)
    thread.start()
    try:
        yield wait
    finally:
        over.set()
        thread.join()


def _speak(wait: Wait, over: threading.Event) -> None:
    while not over.wait(wait.quiet_s):
        wait.look()


def named(noun: str, numbers: Sequence[int], most: int = 8) -> str:
    """Return "rank 3", "ranks 1 and 2", "ranks 1, 2 and 5", and of more numbers than a line should have the first."""
    names = [str(number) for number in numbers[:most]]
    names += [f"{len(numbers) - most} more"] if len(numbers) > most else []
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{noun}{'' if len(numbers) == 1 else 's'} {listed}"
