"""Where the seconds go: phases of a job's work, timed at the cost of about a microsecond each.

`PhaseTimer` times what one thread does, phases within phases. `BesideTimer` times an exchange that runs beside the
backward pass, and says how much of it was waited for (exposed) and how much was not (hidden). On a GPU moments are CUDA
events on the current stream, read when the totals are taken, so that nothing waits for them.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch

PHASES = ("compute", "encode", "exchange", "decode", "server", "evaluation")
"""Phases of a job: train, encode, wait for other ranks and the link, decode and sum, step the server, evaluate."""

_FOLD_AT = 4096  # moments kept before they are summed: bounds the memory of a long epoch


@dataclass
class Spent:
    """Time in a phase.

    Args:
        seconds: Exposed seconds: spent in the phase, or waiting for it.
        hidden: Seconds of the phase beside computation, for which nobody waited.
        calls: Number of times that the phase was entered.
    """

    seconds: float = 0.0
    hidden: float = 0.0
    calls: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.hidden + other.hidden, self.calls + other.calls)


class Clock(Protocol):
    """Marks moments now, and tells the seconds between them later."""

    def mark(self) -> Any:
        """Return this moment."""

    def between(self, begin: Any, end: Any) -> float:
        """Return the seconds from one moment to another, waiting until both have passed."""


class HostClock:
    """Moments of this process."""

    @staticmethod
    def mark() -> float:
        """Return this moment."""
        return time.perf_counter()

    @staticmethod
    def between(begin: float, end: float) -> float:
        """Return the seconds from one moment to another."""
        return end - begin


class StreamClock:
    """Moments of the current CUDA stream, as events in it."""

    @staticmethod
    def mark() -> torch.cuda.Event:
        """Enqueue an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # type: ignore[no-untyped-call]
        return event

    @staticmethod
    def between(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the seconds from one event to another, waiting until both have passed."""
        begin.synchronize()  # type: ignore[no-untyped-call]
        end.synchronize()  # type: ignore[no-untyped-call]
        return begin.elapsed_time(end) / 1000  # type: ignore[no-untyped-call, no-any-return]


def clock_of(device: torch.device | str) -> Clock:
    """Return the clock of a device's work."""
    return StreamClock() if torch.device(device).type == "cuda" else HostClock()


class Phase:
    """A phase of one timer, as a context manager."""

    __slots__ = ("_name", "_timer")

    def __init__(self, timer: Timer, name: str) -> None:
        self._timer = timer
        self._name = name

    def __enter__(self) -> None:
        self._timer.enter(self._name)

    def __exit__(self, *_: object) -> None:
        self._timer.leave()


class Timer:
    """What both timers share: phases by name, which the profiler sees too if it is told to.

    Args:
        clock: Clock that marks the moments. Default: this process's own.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or HostClock()
        self.annotates = False
        """Whether phases are ranges in a profiler's trace."""
        self._phases = {name: Phase(self, name) for name in PHASES}
        self._ranges: list[Any] = []

    def phase(self, name: str) -> Phase:
        """Return a context manager; the body's time belongs to the phase, but for phases within it."""
        return self._phases[name]

    def enter(self, name: str) -> None:
        """Begin a phase."""
        if self.annotates:
            self._ranges.append(torch.profiler.record_function(f"fedq::{name}"))
            self._ranges[-1].__enter__()

    def leave(self) -> None:
        """End the phase that was entered last."""
        if self._ranges:
            self._ranges.pop().__exit__(None, None, None)


class PhaseTimer(Timer):
    """Times the phases of one thread; time within an inner phase is not the outer one's.

    Args:
        clock: Clock that marks the moments. Default: this process's own.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__(clock)
        self._totals = {name: Spent() for name in PHASES}
        self._stack: list[str] = []
        self._since: Any = None
        self._pieces: list[tuple[str, Any, Any]] = []
        self._beside: list[BesideTimer] = []

    def enter(self, name: str) -> None:
        """Begin a phase; the outer one's time stops."""
        super().enter(name)
        self._cut()
        self._stack.append(name)
        self._totals[name].calls += 1

    def leave(self) -> None:
        """End the phase that was entered last; the outer one's time goes on."""
        self._cut()
        self._stack.pop()
        super().leave()

    def beside(self) -> BesideTimer:
        """Return a timer for what runs beside this thread's computation; its exposed seconds are taken off those."""
        timer = BesideTimer(self.clock)
        timer.annotates = self.annotates
        self._beside.append(timer)
        return timer

    def annotate(self, on: bool) -> None:
        """Show phases in a profiler's trace, or stop that."""
        for timer in (self, *self._beside):
            timer.annotates = on

    def take(self) -> dict[str, Spent]:
        """Return the time in each phase since it was last taken; phases that are open go on from here.

        To be called while nothing runs beside.
        """
        self._cut()
        self._fold()
        totals, self._totals = self._totals, {name: Spent() for name in PHASES}
        for timer in self._beside:
            for name, spent in timer.take().items():
                totals[name] += spent
                totals["compute"].seconds -= spent.seconds  # while it was waited for, this thread stood in computation
        return totals

    def _cut(self) -> None:
        """Book the time since the last cut to the phase that is open."""
        now = self.clock.mark()
        if self._stack:
            self._pieces.append((self._stack[-1], self._since, now))
            if len(self._pieces) >= _FOLD_AT:
                self._fold()
        self._since = now

    def _fold(self) -> None:
        for name, begin, end in self._pieces:
            self._totals[name].seconds += self.clock.between(begin, end)
        self._pieces.clear()


@dataclass
class _Step:
    """Moments of one step: its first bucket's and its last bucket's submission, pieces of work, the end of the last."""

    first: Any
    last: Any = None
    end: Any = None
    pieces: list[tuple[str, Any, Any]] | None = None


class BesideTimer(Timer):
    """Times work that another thread or stream does while gradients are still computed.

    Computation waits from the moment when the last bucket was submitted until the work on it is done: what the work
    did in between is exposed, what it did before is hidden.

    Args:
        clock: Clock that marks the moments. Default: this process's own.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__(clock)
        self._totals = {name: Spent() for name in PHASES}
        self._step: _Step | None = None
        self._pieces: list[tuple[str, Any, Any]] = []
        self._open: list[tuple[str, Any]] = []
        self._done: deque[_Step] = deque()

    def submitted(self, *, is_first: bool, is_last: bool) -> None:
        """Note that a bucket of a step was submitted, in the thread that computes, before the work on it begins."""
        now = self.clock.mark()
        if is_first or self._step is None:  # what a step that failed has left is forgotten
            self._step, self._pieces = _Step(now), []
        if is_last:
            self._step.last = now

    def enter(self, name: str) -> None:
        """Begin a phase of the work; there are none within it."""
        super().enter(name)
        self._open.append((name, self.clock.mark()))

    def leave(self) -> None:
        """End it."""
        name, begin = self._open.pop()
        self._pieces.append((name, begin, self.clock.mark()))
        super().leave()

    def finished(self) -> None:
        """Note that the work on a step's last bucket is done, before whoever waits for it goes on."""
        step, self._step = self._step, None
        if step is None:
            return
        step.pieces, self._pieces, step.end = self._pieces, [], self.clock.mark()
        self._done.append(step)
        while len(self._done) > 2:  # a step ago, so that a stream is not waited for
            self._fold(self._done.popleft())

    def take(self) -> dict[str, Spent]:
        """Return the time in each phase since it was last taken."""
        while self._done:
            self._fold(self._done.popleft())
        totals, self._totals = self._totals, {name: Spent() for name in PHASES}
        return totals

    def _fold(self, step: _Step) -> None:
        waited_from, waited_to = (self.clock.between(step.first, moment) for moment in (step.last, step.end))
        for name, begin, end in step.pieces or ():
            at, until = (self.clock.between(step.first, moment) for moment in (begin, end))
            exposed = max(0.0, min(until, waited_to) - max(at, waited_from))
            self._totals[name] += Spent(exposed, until - at - exposed, 1)
