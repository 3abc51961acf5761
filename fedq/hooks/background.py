"""Where an exchange runs while the backward pass goes on: a thread on Gloo, a stream on NCCL."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

Work = Callable[[], Sequence[Tensor]]
"""Returns one result for each promise."""
_IDLE_S, _ABORTED_S = 0.2, 5.0


class Promise:
    """A result to come, or the error instead.

    Args:
        device: Device of the result.
    """

    def __init__(self, device: torch.device) -> None:
        self._error: Exception | None = None
        self._done: Future[Tensor] = Future(devices=[device]) if device.type == "cuda" else Future()
        # An error raised here reaches DDP with its text and place; of `Future.set_exception` it can make nothing.
        self.future: Future[Tensor] = self._done.then(self._open)

    def keep(self, result: Tensor) -> None:
        """Complete the future with a result."""
        self._done.set_result(result)

    def fail(self, error: Exception) -> None:
        """Complete the future with an error."""
        self._error = error
        self._done.set_result(torch.empty(0))

    def _open(self, done: Future[Tensor]) -> Tensor:
        if self._error is not None:
            raise self._error
        return done.value()


class BackgroundThread:
    """One thread that does what it is given, in order; a failure reaches whoever waits for a result.

    After a failure nothing more is done and everything fails with the same error: the ranks no longer agree on which
    message is which.

    Args:
        group: Process group that the work waits for; it is aborted if the process ends before the work has, so that no
            thread is left in it while the interpreter is taken down.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._queue: queue.SimpleQueue[tuple[Work, Sequence[Promise]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def submit(self, work: Work, promises: Sequence[Promise]) -> None:
        """Do some work after all that was submitted before, and keep its promises."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._serve, name="fedq-exchange", daemon=True)
            self._thread.start()
            atexit.register(self._leave)
        self._queue.put((work, promises))

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            work, promises = item
            try:
                if self._failure is not None:
                    raise self._failure
                with torch.no_grad():
                    keep(promises, work())
            except Exception as error:
                self._failure = error
                for promise in promises:
                    promise.fail(error)

    def _leave(self) -> None:
        """End the thread, and what it waits for if there is such: only a process that fails ends in mid-step."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(_IDLE_S)
        if self._thread.is_alive() and self._group is not None:
            with contextlib.suppress(AttributeError, RuntimeError):  # an older torch may not know how
                self._group.abort()
            self._thread.join(_ABORTED_S)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def on_stream(work: Work, promises: Sequence[Promise], device: torch.device) -> None:
    """Enqueue some work on a CUDA stream of its own, which waits for the current one, and keep its promises."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    stream = _streams[device]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        keep(promises, work())


def keep(promises: Sequence[Promise], results: Sequence[Tensor]) -> None:
    """Give each promise its result."""
    for promise, result in zip(promises, results, strict=True):
        promise.keep(result)
