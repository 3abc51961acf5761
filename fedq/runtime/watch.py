"""Leaves in time: a thread that answers SIGTERM, SIGINT and SIGHUP at once, and ends a rank that makes no progress.

Whatever is finished is on disk after every round, so leaving means: wait for a write in progress, say how to go on, and
exit. The thread works while the job waits inside a collective, where Python's own handlers would not run. A job that
runs off the main thread (a notebook's, a worker's) leaves signals to the program that it is part of.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import TextIO

_WRITE_GRACE_S = 8.0
_ROOT_FIRST_S = 0.5
"""Seconds that other ranks stay, so that rank 0 can speak before it misses them."""
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 0}
STALLED = 1
"""Exit code of a rank that made no progress."""


class Watch:
    """Watches one rank. Use as a context manager in the thread that does the job; only the main one hears signals.

    Args:
        rank: Number of this rank, which is named in what is printed.
        timeout_s: Seconds without `beat` after which the rank ends; None: never.
        farewell: Returns what rank 0 says when a signal of that name ends the job; called in the watching thread.
        let_go: Function that is called last, before the process ends.
    """

    def __init__(
        self,
        rank: int,
        timeout_s: float | None,
        farewell: Callable[[str], str],
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank = rank
        self.timeout_s = timeout_s
        self.farewell = farewell
        self.let_go = let_go
        self._writing = threading.Lock()
        self._beaten = time.monotonic()
        self._doing = "starting"
        self._wake, self._told = socket.socketpair()
        self._worker = 0
        self._thread = threading.Thread(target=self._run, name="fedq-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._worker = threading.get_ident()
        self._told.setblocking(False)
        self._signals = ExitStack()
        if threading.current_thread() is threading.main_thread():
            self._signals.enter_context(_signals_to(self._told))
        self.beat("starting")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.close()
        self._told.setblocking(True)
        self._told.sendall(b"\0")
        self._thread.join()
        self._wake.close()
        self._told.close()

    def beat(self, doing: str | None = None) -> None:
        """Note progress and what comes next; None: more of the same."""
        self._doing = doing or self._doing
        self._beaten = time.monotonic()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold a signal back while files are written."""
        with self._writing:
            yield

    def _run(self) -> None:
        while True:
            wait_s = None if self.timeout_s is None else max(0.0, self._beaten + self.timeout_s - time.monotonic())
            ready, _, _ = select.select([self._wake], [], [], wait_s)
            if ready:
                number = self._wake.recv(1)[0]
                if number == 0:
                    return
                if number in EXIT_CODES:
                    self._leave(signal.Signals(number))
            elif self.timeout_s is not None and time.monotonic() - self._beaten >= self.timeout_s:
                self._give_up()

    def _leave(self, number: signal.Signals) -> None:
        self._writing.acquire(timeout=_WRITE_GRACE_S)
        if self.rank == 0:
            _say(sys.stdout, self.farewell(number.name))
        else:
            time.sleep(_ROOT_FIRST_S)
        self._end(_exit_code(number))

    def _give_up(self) -> None:
        frame = sys._current_frames().get(self._worker)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        _say(sys.stderr, f"rank {self.rank} made no progress for {self.timeout_s:g} s while {self._doing}:\n{stack}")
        self._end(STALLED)

    def _end(self, code: int) -> None:
        with suppress(OSError):
            self.let_go()
        os._exit(code)


@contextmanager
def _signals_to(told: socket.socket) -> Iterator[None]:
    """Send the numbers of signals to a socket during the body; only the main thread may ask for that."""
    handlers = {number: signal.signal(number, _ignore) for number in EXIT_CODES if not _is_nohup(number)}
    wakeup = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's


def _exit_code(number: signal.Signals) -> int:
    """Return how a rank ends after a signal; torchrun that is to restart ranks would take 0 for the job's success."""
    is_restarted = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return 128 + number if is_restarted else EXIT_CODES[number]


def _is_nohup(number: int) -> bool:
    """Whether whoever started this process wants it to outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def _ignore(number: int, frame: FrameType | None) -> None:
    """Let the wake-up descriptor tell the watching thread."""


def _say(stream: TextIO, text: str) -> None:
    """Print as the last words, if anybody is left to read them; a live progress bar may have hidden the cursor."""
    for each in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            each.flush()  # first: what another thread prints from now on comes too late
    with suppress(OSError, ValueError):
        cursor = "\x1b[?25h" if stream.isatty() else ""
        print(f"{cursor}\n{text}", file=stream, flush=True)
