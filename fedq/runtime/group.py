"""The process group and the device of this rank, and who goes first on a machine.

What travels over the group lives in `fedq.collectives`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from fedq.errors import FieldError, RendezvousError
from fedq.runtime.generation import generation, is_served
from fedq.runtime.launcher import Ranks, detect, misleading, rendezvous
from fedq.runtime.meeting import Meeting, count_ranks, failures_told, open_store
from fedq.waiting import Wait, speaking

T = TypeVar("T")

_MEETING_S = 1800.0
"""Longest wait in seconds for ranks to come, however long they may be silent later."""


@dataclass(frozen=True)
class Runtime(Ranks):
    """This process's ranks, with the device and the back end they use."""

    device: torch.device
    backend: str | None
    """Name of the back end: gloo or nccl; None for one rank."""
    note: str
    """One line for the user, for example "2 ranks on 1 GPU: Gloo, payloads staged through the host"."""

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, which is also the server."""
        return self.rank == 0


@contextmanager
def distributed(
    device: str = "auto",
    threads: int | None = None,
    timeout_s: float = 600,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Runtime]:
    """Start the process group for the body and destroy it after, whatever happens in the body.

    NCCL is used only when every rank of this machine has a GPU to itself, otherwise Gloo; one rank has no group. A
    group that is already there is used as it is and left alone.

    Args:
        device: Kind of device: auto, cpu or cuda; auto is cuda where there is a GPU.
        threads: CPU threads of this process; default 1 when ranks share the machine, otherwise torch's choice.
        timeout_s: Seconds that a rank waits for the others before it fails.
        environ: The launcher's environment; default `os.environ`.

    Yields:
        This rank's runtime.

    Raises:
        FieldError: The launcher's variables are wrong, or there is no GPU for `device="cuda"`.
        RendezvousError: The real number of ranks is not WORLD_SIZE, or they cannot reach each other.
    """
    environ = os.environ if environ is None else environ
    is_ours = not dist.is_initialized()
    runtime = _runtime(detect(environ), device, None if is_ours else dist.get_backend())
    if threads is not None or runtime.local_world_size > 1:
        torch.set_num_threads(threads or 1)
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
    if is_ours and runtime.backend is not None:
        _start_group(runtime, environ, timedelta(seconds=min(timeout_s, _MEETING_S)), timedelta(seconds=timeout_s))
    try:
        _check_world_size(runtime)
        yield runtime
    finally:
        if is_ours and dist.is_initialized():
            dist.destroy_process_group()


def existing_group(device: torch.device) -> Runtime:
    """Return this process's place in the default process group, which somebody else has opened.

    Args:
        device: Device that this process's tensors are on.
    """
    ranks, rank, world_size = detect(os.environ), dist.get_rank(), dist.get_world_size()
    if (ranks.rank, ranks.world_size) != (rank, world_size):  # opened without a launcher
        ranks = Ranks(rank, world_size, rank, world_size, "python")
    backend = dist.get_backend()
    return Runtime(**asdict(ranks), device=device, backend=backend, note=f"{world_size} ranks, {backend}")


@contextmanager
def local_root_first(runtime: Runtime) -> Iterator[None]:
    """Run the body on the first rank of every machine, then on the others, so that a cache is written once.

    The others go on even when the first one fails: what stopped it stops them too, with the same message.
    """
    is_first = runtime.local_rank == 0
    if runtime.world_size > 1 and not is_first:
        _meet_for(runtime, "the first rank of each machine, which reads or fetches the data")
    try:
        yield
    finally:
        if runtime.world_size > 1 and is_first:
            _meet_for(runtime, "the first ranks of other machines, which read or fetch the data")


def _meet_for(runtime: Runtime, whom: str) -> None:
    """Enter a barrier, and say for whom if it lasts; of a machine's ranks at most two do, as they share a terminal."""
    with speaking(Wait(lambda: whom, heading=f"rank {runtime.rank}: ")) if runtime.local_rank < 2 else nullcontext():
        dist.barrier()


def from_root(runtime: Runtime, value: T) -> T:
    """Return rank 0's value on every rank: anything that pickles, of trusted ranks of this job."""
    told = [value]
    if runtime.world_size > 1:
        dist.broadcast_object_list(told, src=0)
    return told[0]


def on_root(runtime: Runtime, action: Callable[[], T]) -> T | None:
    """Call `action` on rank 0 while the others wait, and refuse its FieldError on every rank.

    Returns:
        The action's result on rank 0, None on the others.

    Raises:
        FieldError: The action raised it on rank 0; every rank raises it.
    """
    result: T | None = None
    refusal: FieldError | None = None
    if runtime.is_root:
        try:
            result = action()
        except FieldError as error:
            refusal = error
    if runtime.world_size > 1:
        told = [refusal and _plain(refusal)]
        dist.broadcast_object_list(told, src=0)
        if told[0] and not runtime.is_root:
            refusal = FieldError(*told[0])
    if refusal is not None:
        raise refusal
    return result


def on_every_rank(runtime: Runtime, action: Callable[[], T]) -> T:
    """Call `action` on every rank, and refuse the first rank's FieldError on all of them.

    Raises:
        FieldError: The action raised it on some rank; every rank raises the first one's.
    """
    result: T | None = None
    refusal: FieldError | None = None
    try:
        result = action()
    except FieldError as error:
        refusal = error
    if runtime.world_size > 1:
        told: list[Any] = [None] * runtime.world_size
        dist.all_gather_object(told, refusal and _plain(refusal))
        refusal = next((FieldError(*one) for one in told if one), None)
    if refusal is not None:
        raise refusal
    return cast("T", result)


def _plain(refusal: FieldError) -> tuple[str, object, str]:
    """Return what makes the same error on another rank; a value that is no plain one, as text."""
    value = refusal.value
    return refusal.field, value if isinstance(value, int | float | None) else str(value), refusal.allowed


def _runtime(ranks: Ranks, device: str, existing_backend: str | None) -> Runtime:
    if device not in ("auto", "cpu", "cuda"):
        raise FieldError("device", device, "auto, cpu, cuda")
    num_gpus = torch.cuda.device_count()
    if device == "cuda" and num_gpus == 0:
        raise FieldError("device", device, "auto or cpu, because torch sees no GPU here")
    num_gpus = 0 if device == "cpu" else num_gpus
    where = torch.device("cuda", ranks.local_rank % num_gpus) if num_gpus else torch.device("cpu")
    backend = existing_backend
    if backend is None and ranks.world_size > 1:
        backend = "nccl" if 0 < ranks.local_world_size <= num_gpus else "gloo"
    return Runtime(**asdict(ranks), device=where, backend=backend, note=_note(ranks, backend, num_gpus))


def _note(ranks: Ranks, backend: str | None, num_gpus: int) -> str:
    who = f"{ranks.world_size} rank{'s' if ranks.world_size > 1 else ''}"
    if backend == "nccl":
        return f"{who}, each on its own GPU: NCCL"
    if num_gpus == 0 or backend is None:
        place = f"{who} on the CPU" if num_gpus == 0 else f"{who} on a GPU"
        return f"{place}: Gloo" if backend else place
    several = "" if ranks.local_world_size == ranks.world_size else f", {ranks.local_world_size} on this machine's"
    gpus = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}"
    return f"{who}{several or ' on'} {gpus}: Gloo, payloads staged through the host"


def _start_group(runtime: Runtime, environ: Mapping[str, str], patience: timedelta, timeout: timedelta) -> None:
    # A store of our own, as torch's env:// would make, because that one reads os.environ and cannot count the ranks.
    meeting = Meeting(runtime, *rendezvous(runtime, environ), patience, misleading(runtime, environ))
    is_server = runtime.is_root and not is_served(environ)  # torchrun's agent listens there already
    with failures_told(meeting):
        with generation(open_store(meeting, is_server=is_server), meeting) as store:
            count_ranks(store, meeting)
        with speaking(meeting.wait(lambda: f"connections to the other ranks, by {runtime.backend}")):
            dist.init_process_group(
                runtime.backend,
                store=store,
                rank=runtime.rank,
                world_size=runtime.world_size,
                timeout=timeout,
                device_id=runtime.device if runtime.backend == "nccl" else None,
            )


def _check_world_size(runtime: Runtime) -> None:
    """Compare the environment's world size with the number of ranks that really answer."""
    if not dist.is_initialized():
        return
    ones = torch.ones(1, device=runtime.device if runtime.backend == "nccl" else "cpu")
    dist.all_reduce(ones)
    if int(ones) != runtime.world_size:
        raise RendezvousError(
            f"WORLD_SIZE={runtime.world_size}, but the real number of ranks in the process group is {int(ones)}"
        )
