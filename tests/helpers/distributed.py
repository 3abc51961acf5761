"""Runs bodies on real ranks for tests: a hard limit, no fixed ports, and failures that end the test.

The ranks of a group stay between the cases of a test process, and what a case may change in them is put back: the
environment, folder and arguments, generators of random numbers, torch's settings, handlers of signals, filters of
warnings. They are replaced after a case that failed, left threads behind or ended the group. What else a case may leave
(a module patched without a context that undoes it, a library's state of the whole process) needs ranks of its own:
``fresh=True``.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import warm

LIMIT_S = 90  # hard limit of one case; a rank that hangs is killed then
_END_S, _TERM_S = 10, 0.5  # for ranks to end by themselves, and when they are told
_MAX_GROUPS = 2  # that stay: of the sizes that were used last


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(body: Callable, *arguments: tuple) -> list:
    """Call body(*arguments) in one new process each; return its result, or the text of what it raised."""
    ranks = _Ranks(len(arguments), has_group=False)
    try:
        ranks.start(body, arguments)
        answers = {rank: value for rank, value, _ in ranks.answers(LIMIT_S)}
        return [answers[rank] for rank in range(len(arguments))]
    finally:
        ranks.end()


def run_group(world_size: int, body: Callable, *given: Any, limit_s: float = LIMIT_S, fresh: bool = False) -> list:
    """Call body(rank, *given) on the ranks of a Gloo group (of no group for one rank); return the results by rank.

    Args:
        world_size: How many ranks.
        body: A function of a module.
        given: What all ranks are given.
        limit_s: Seconds after which ranks that have not answered are killed.
        fresh: New ranks, for this case alone.

    Raises:
        RankFailed: A rank raised: at once, whatever the others do, with that rank's traceback; or the limit is over.
    """
    ranks = (None if fresh else _waiting.pop(world_size, None)) or _Ranks(world_size, has_group=world_size > 1)
    try:
        ranks.start(body, [(rank, *given) for rank in range(world_size)])
        results = {}
        for rank, value, trace in ranks.answers(limit_s):
            if trace:
                raise RankFailed(f"rank {rank} raised\n{trace}")
            results[rank] = value
    except BaseException:
        ranks.kill()
        raise
    if fresh or not ranks.as_before:
        ranks.end()
    else:
        _waiting[world_size] = ranks
        end_ranks(_MAX_GROUPS)
    return [results[rank] for rank in range(world_size)]


def end_ranks(keep: int = 0) -> None:
    """End the ranks that wait for a next case, but for the groups that were used last."""
    while len(_waiting) > keep:
        _waiting.pop(next(iter(_waiting))).end()


class _Ranks:
    """Processes that call one body after another."""

    def __init__(self, num: int, *, has_group: bool) -> None:
        context = warm.context()
        self.as_before = True
        self._folder = tempfile.TemporaryDirectory()  # of the store where the ranks meet
        pipes = [context.Pipe() for _ in range(num)]
        self._pipes = [ours for ours, _ in pipes]
        meeting = (num, f"{self._folder.name}/store") if has_group else None
        self._processes = [
            context.Process(target=_serve, args=(theirs, rank, meeting), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that a rank that dies gives EOFError here and no endless wait

    def start(self, body: Callable, arguments: Sequence[tuple]) -> None:
        for pipe, given in zip(self._pipes, arguments, strict=True):
            with suppress(BrokenPipeError):  # of a rank that has died, which is told when its answer is awaited
                pipe.send((body, given))

    def answers(self, limit_s: float) -> Iterator[tuple[int, Any, str | None]]:
        """Yield rank, result and no traceback, or what was raised and its traceback, in the order of their coming."""
        waiting = dict(zip(self._pipes, range(len(self._pipes)), strict=True))
        end = time.monotonic() + limit_s
        while waiting:
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                raise RankFailed(f"ranks {[*waiting.values()]} hang after {limit_s:g} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    value, trace, as_before = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise RankFailed(f"rank {rank} died") from None
                self.as_before &= as_before
                yield rank, value, trace

    def end(self) -> None:
        """Let the ranks end, for a while."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):
                pipe.send(None)
        end = time.monotonic() + _END_S
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            process.terminate()  # which lets a rank write what was measured in it, unless it hangs
        end = time.monotonic() + _TERM_S
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
            pipe.close()
        self._folder.cleanup()


_waiting: dict[int, _Ranks] = {}  # by world size, the one used last at the end


def _serve(pipe: Connection, rank: int, meeting: tuple[int, str] | None) -> None:
    """Call what comes through the pipe, and answer: result, no traceback, whether the rank is as it was before."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through again, and so stays shared with the process it came from
    if meeting:
        world_size, store = meeting
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=LIMIT_S),
        )
    state = _State()
    while True:
        try:
            message = pipe.recv()
            if message is None:
                break
            body, given = message
            with warnings.catch_warnings():
                value = body(*given)
            if meeting:
                dist.barrier()  # a rank that ends early would cut off the others
            pipe.send((value, None, state.put_back()))
        except (EOFError, KeyboardInterrupt):
            return
        except Exception as error:
            pipe.send((f"{type(error).__name__}: {error}", traceback.format_exc(), False))
    if dist.is_initialized():
        dist.destroy_process_group()


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)


class _State:
    """What a case may change in a rank, as it is now."""

    def __init__(self) -> None:
        self.environ, self.folder, self.path, self.argv = dict(os.environ), os.getcwd(), [*sys.path], [*sys.argv]
        self.random, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.dtype, self.deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
        self.handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self.has_group = dist.is_initialized()

    def put_back(self) -> bool:
        """Put it back; return whether nothing else is seen to be left of the case."""
        os.environ.clear()
        os.environ.update(self.environ)
        os.chdir(self.folder)
        sys.path[:], sys.argv[:] = self.path, self.argv
        random.setstate(self.random)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        torch.set_default_dtype(self.dtype)
        torch.use_deterministic_algorithms(self.deterministic)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        # A hook's thread stays with its process and waits for work that will not come.
        threads = [thread for thread in threading.enumerate() if thread.name not in ("MainThread", "fedq-exchange")]
        return dist.is_initialized() == self.has_group and not threads


def own_state(state: Any) -> dict[str, Any]:
    """What a rank's `StepExchange` keeps, without the key that names the rank."""
    (kept,) = state.state_dict().values()
    return kept


_NOT_COUNTED = (
    "allreduce_coalesced",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "gather",
    "scatter",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "alltoall",
    "alltoall_base",
    "all_to_all_single",
    "all_gather_single_coalesced",
    "gather_into_tensor",
    "gather_single",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "recv_anysource",
)


class Spy:
    """Counts the bytes that this rank hands to process groups: a stand-in for the class's own methods.

    ``sent`` counts a buffer once for each rank it goes to, ``received`` what comes from others. An operation that it
    does not know is refused, so none escapes the count.
    """

    def __init__(self, monkeypatch: Any) -> None:
        self.sent = self.received = 0
        group = dist.ProcessGroup
        for name, count in (
            ("send", self._send),
            ("recv", self._recv),
            ("broadcast", self._broadcast),
            ("allreduce", self._all_reduce),
            ("_allgather_base", self._all_gather),
            ("all_gather_single", self._all_gather),  # the same in newer torch
        ):
            if hasattr(group, name):
                monkeypatch.setattr(group, name, _counted(getattr(group, name), count))
        for name in filter(lambda name: hasattr(group, name), _NOT_COUNTED):
            monkeypatch.setattr(group, name, _refused(name))

    def _send(self, group: dist.ProcessGroup, tensors: list[torch.Tensor], *_: Any) -> None:
        self.sent += _nbytes(tensors)

    def _recv(self, group: dist.ProcessGroup, tensors: list[torch.Tensor], *_: Any) -> None:
        self.received += _nbytes(tensors)

    def _broadcast(self, group: dist.ProcessGroup, tensors: list[torch.Tensor], options: Any) -> None:
        if options.rootRank == group.rank():
            self.sent += _nbytes(tensors) * (group.size() - 1)
        else:
            self.received += _nbytes(tensors)

    def _all_reduce(self, group: dist.ProcessGroup, tensors: list[torch.Tensor], *_: Any) -> None:
        ring = 2 * (group.size() - 1) * _nbytes(tensors) // group.size()
        self.sent += ring
        self.received += ring

    def _all_gather(self, group: dist.ProcessGroup, out: torch.Tensor, own: torch.Tensor, *_: Any) -> None:
        self.sent += _nbytes([own]) * (group.size() - 1)
        self.received += _nbytes([out]) - _nbytes([own])


def _nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _counted(method: Callable, count: Callable) -> Callable:
    def call(group: dist.ProcessGroup, *args: Any, **options: Any) -> Any:
        count(group, *args)
        return method(group, *args, **options)

    return call


def _refused(name: str) -> Callable:
    def call(*_: Any, **__: Any) -> None:
        raise AssertionError(f"ProcessGroup.{name} moved bytes that the spy does not count")

    return call
