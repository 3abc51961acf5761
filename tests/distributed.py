"""Starts real ranks for tests: one process each, a hard limit, no fixed ports, and failures that end the test."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 90  # hard limit of one spawned test; a rank that hangs is killed then

# Imported once, in the server that all ranks are forked from: a rank then starts in a tenth of a second.
_PRELOAD = [
    "torch._dynamo",  # every optimizer imports it when it is made
    "fedq.trainers.federated",
    "sklearn.datasets",
    "pyarrow.parquet",
    "tensorboard.summary.writer.record_writer",
    "safetensors.torch",
]


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(body: Callable, *arguments: tuple) -> list:
    """Call body(*arguments) in one process each; return its result, or the text of what it raised."""
    with _started(body, arguments) as pipes:
        end = time.monotonic() + LIMIT_S
        for pipe in pipes:
            assert pipe.poll(max(0.0, end - time.monotonic())), "a rank hangs"
        return [value for value, _ in (pipe.recv() for pipe in pipes)]


def run_group(world_size: int, body: Callable, *given: Any, limit_s: float = LIMIT_S) -> list:
    """Call body(rank, *given) on the ranks of a Gloo group (of no group for one rank); return the results by rank.

    Raises:
        RankFailed: A rank raised: at once, whatever the others do, with that rank's traceback; or the limit is over.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, world_size, f"{folder}/store", body, given) for rank in range(world_size)]
        with _started(_in_group, arguments) as pipes:
            return _results(pipes, limit_s)


def _results(pipes: list[Connection], limit_s: float) -> list:
    results: dict[int, Any] = {}
    end = time.monotonic() + limit_s
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, end - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {[pipes.index(pipe) for pipe in waiting]} hang after {limit_s:g} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                results[rank], trace = pipe.recv()
            except EOFError:
                raise RankFailed(f"rank {rank} died") from None
            if trace:
                raise RankFailed(f"rank {rank} raised\n{trace}")
    return [results[rank] for rank in range(len(pipes))]


def _in_group(rank: int, world_size: int, store: str, body: Callable, given: tuple) -> Any:
    torch.set_num_threads(1)
    if world_size == 1:
        return body(rank, *given)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=LIMIT_S),
    )
    result = body(rank, *given)
    dist.barrier()  # a rank that ends early would cut off the others
    dist.destroy_process_group()
    return result


@contextmanager
def _started(body: Callable, arguments: list[tuple] | tuple[tuple, ...]) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    pipes = [context.Pipe(duplex=False) for _ in arguments]
    ranks = [
        context.Process(target=_call, args=(pipe[1], body, given), daemon=True)
        for pipe, given in zip(pipes, arguments, strict=True)
    ]
    try:
        for rank in ranks:
            rank.start()
        for _, sender in pipes:
            sender.close()  # so that a rank that dies gives EOFError here and no endless wait
        yield [receiver for receiver, _ in pipes]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _call(sender: Connection, body: Callable, arguments: tuple) -> None:
    """Send the result and no traceback, or the error's text and its traceback."""
    try:
        message = (body(*arguments), None)
    except Exception as error:
        message = (f"{type(error).__name__}: {error}", traceback.format_exc())
    sender.send(message)


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
