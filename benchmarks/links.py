"""Ranks of a benchmark on links of a chosen rate: one network namespace each, on a bridge, behind token buckets.

A link is ``100mbit``, ``1gbit`` (any rate that `tc` reads), ``unlimited`` (namespaces without a token bucket) or
``none`` (no namespaces: all ranks on the loopback interface, which needs neither root nor iproute2, but whose byte
count has everybody's traffic in it). The namespaces carry this process's id in their names, and are taken down when
it ends, whether it fails or is interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from evidence import replace_section
from federated_task import hardware

from fedq.runtime.interfaces import interface_bytes

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK, UNLIMITED = "none", "unlimited"
_BUCKET = "burst 256kb latency 50ms"
"""Below a burst of about a frame's worth a rate is not reached; latency is what may queue."""
_COUNTED = "pfifo limit 100000"
"""A queue that never fills: it only counts frames."""


class LinksUnavailable(RuntimeError):
    """Namespaces cannot be made here; the text says why, and what works without them."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"cannot make network namespaces: {reason}. --links {LOOPBACK} measures on plain loopback.")


# ---- the parent ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that have crossed one end of a link, seen from there.

    Args:
        sent: As the interface counts them. What the kernel hands over in one piece has one header there.
        received: Likewise.
        sent_frames: As frames of at most 1,500 bytes with their headers, which is what a real wire carries; 0 on an
            unlimited link that does not count them.
        received_frames: Likewise.
    """

    sent: int
    received: int
    sent_frames: int
    received_frames: int

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))


@dataclass(frozen=True)
class End:
    """One end of a star of links, for one process or several.

    Args:
        address: By which the others reach it.
        namespace: Its network namespace; none on loopback.
        switch: The namespace of the bridge in the middle.
        port: Its port there.
    """

    address: str
    namespace: str = ""
    switch: str = ""
    port: str = ""

    @property
    def prefix(self) -> list[str]:
        """What goes before a command that is to run here."""
        return ["ip", "netns", "exec", self.namespace] if self.namespace else []

    def traffic(self) -> Traffic | None:
        """Return what has crossed; None on loopback, where everybody's bytes are in one count."""
        if not self.namespace:
            return None
        (found,) = _asked(f"ip -n {self.namespace} -s -j link show veth0")
        sent, received = (found["stats64"][way]["bytes"] for way in ("tx", "rx"))
        queues = [_asked(f"tc -n {ns} -s -j qdisc show dev {device}") for ns, device in _ends(self)]
        return Traffic(sent, received, *(queue[0]["bytes"] for queue in queues))


def _ends(end: End) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return namespace and device of the two interfaces of a link: where its end sends, and where the bridge does."""
    return (end.namespace, "veth0"), (end.switch, end.port)


def _asked(command: str) -> list[dict[str, Any]]:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@contextlib.contextmanager
def star(num: int, rate: str, *, counts_frames: bool = False) -> Iterator[list[End]]:
    """Make links from so many ends to one bridge.

    Args:
        num: Ends.
        rate: ``100mbit``, ``unlimited``, ``none`` and so on, in each direction of each link.
        counts_frames: Give unlimited links a queue too, as frames are counted in queues.

    Raises:
        LinksUnavailable: Not root, no iproute2, or a kernel that refuses.
    """
    if rate == LOOPBACK:
        yield [End("127.0.0.1")] * num
        return
    switch, *names = (f"fedq{os.getpid()}-{name}" for name in ("sw", *range(num)))
    ends = [End(f"10.77.0.{rank + 1}", name, switch, f"p{rank}") for rank, name in enumerate(names)]
    with _terminated_as_interrupted():
        try:
            _build(switch, ends, _queue(rate, counts_frames=counts_frames))
            yield ends
        finally:
            with _uninterrupted():
                for name in (*names, switch):
                    subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


@contextlib.contextmanager
def links(num: int, rate: str) -> Iterator[list[list[str]]]:
    """Make a link for each rank; yield the commands' prefixes that start a process on it.

    Raises:
        LinksUnavailable: See `star`, as for the arguments.
    """
    with star(num, rate) as ends:
        yield [end.prefix for end in ends]


def _queue(rate: str, *, counts_frames: bool) -> str | None:
    if rate == UNLIMITED:
        return _COUNTED if counts_frames else None
    return f"tbf rate {rate} {_BUCKET}"


def _build(switch: str, ends: Sequence[End], queue: str | None) -> None:
    if os.geteuid():
        raise LinksUnavailable("this needs root")
    if not (shutil.which("ip") and shutil.which("tc")):
        raise LinksUnavailable("`ip` and `tc` are missing (package iproute2)")
    commands = [f"ip netns add {switch}", f"ip -n {switch} link add br0 type bridge", f"ip -n {switch} link set br0 up"]
    for end in ends:
        name, port = end.namespace, end.port
        commands += [
            f"ip netns add {name}",
            f"ip link add veth0 netns {name} type veth peer name {port} netns {switch}",
            f"ip -n {name} addr add {end.address}/24 dev veth0",
            f"ip -n {switch} link set {port} master br0",
            f"ip -n {name} link set lo up",
            f"ip -n {name} link set veth0 up",
            f"ip -n {switch} link set {port} up",
        ]
        if queue is not None:
            commands += [f"tc -n {space} qdisc add dev {device} root {queue}" for space, device in _ends(end)]
    for command in commands:
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise LinksUnavailable(f"`{command}` says {done.stderr.strip()!r}")


def run_ranks(script: Path, num: int, rate: str, settings: dict[str, Any], limit_s: float = 3600) -> Any:
    """Run a script's ranks on links; return what rank 0 returned.

    The script is started with ``--rank-of FOLDER``, from which `as_rank` takes everything.

    Args:
        script: A benchmark whose main calls `as_rank`.
        num: Ranks, one thread each.
        rate: See `links`.
        settings: What the ranks are told, as JSON.
        limit_s: Ranks that take longer are killed.

    Raises:
        LinksUnavailable: See `links`.
        RuntimeError: A rank failed (its traceback is on stderr) or took too long.
    """
    device = "lo" if rate == LOOPBACK else "veth0"
    environ = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device, "WORLD_SIZE": str(num)}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder, links(num, rate) as prefixes:
        Path(folder, "settings.json").write_text(json.dumps(settings))
        command = [sys.executable, "-W", "ignore", str(script), "--rank-of", folder]
        run_together(
            [[*prefix, *command] for prefix in prefixes],
            [environ | {"RANK": str(rank)} for rank in range(num)],
            limit_s,
        )
        return json.loads(Path(folder, "result.json").read_text())


def run_together(
    commands: Sequence[Sequence[str]],
    environs: Sequence[Mapping[str, str]],
    limit_s: float,
    logs: Sequence[Path] = (),
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Run processes until all have ended; when one fails, or an interrupt comes, the others are killed.

    Args:
        commands: Their command lines.
        environs: Their environments.
        limit_s: Processes that take longer are killed.
        logs: Take their output; without, it goes where this process's goes.
        beat: Called ten times a second.

    Raises:
        RuntimeError: One failed or took too long.
    """
    processes: list[subprocess.Popen] = []
    with _terminated_as_interrupted(), contextlib.ExitStack() as files:
        outputs: list[Any] = [files.enter_context(path.open("wb")) for path in logs] or [None] * len(commands)
        try:
            for command, environ, output in zip(commands, environs, outputs, strict=True):
                processes.append(  # in sessions of their own: an interrupt is this process's to handle
                    subprocess.Popen(command, env=environ, start_new_session=True, stdout=output, stderr=output)
                )
            _wait(processes, limit_s, beat)
        finally:
            with _uninterrupted():
                for process in processes:
                    process.kill()
                    process.wait()


def _wait(processes: Sequence[subprocess.Popen], limit_s: float, beat: Callable[[], None]) -> None:
    end = time.monotonic() + limit_s
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > end:
            break
        beat()
        time.sleep(0.1)
    codes = [process.poll() for process in processes]
    if any(code != 0 for code in codes):
        raise RuntimeError(f"processes ended with {codes} (None: still ran and was killed)")


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM unwind like SIGINT, so that namespaces are taken down."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a second Ctrl-C wait until all is taken down."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- a rank --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_rank(folder: Path) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Join the other ranks on Gloo, one thread each; yield the settings and a list for rank 0's result."""
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    result: list[Any] = []
    yield json.loads((folder / "settings.json").read_text()), result
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


class SentBytes:
    """Bytes that a rank put on its interface, headers included, as the kernel counts them; the mean over ranks."""

    def __init__(self) -> None:
        self._device = os.environ["GLOO_SOCKET_IFNAME"]
        # On loopback one counter has the bytes of all ranks (and of everybody else on this machine).
        self._ranks = 1 if self._device != "lo" else dist.get_world_size()

    def read(self) -> int:
        """Return the count once everybody's buffers are empty; every rank must call it."""
        dist.barrier()
        time.sleep(0.01)  # what a barrier waits for has left the process, but may still be queued
        count, _ = interface_bytes()[self._device]
        dist.barrier()
        return count // self._ranks


def mean_over_ranks(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def agreed(value: int) -> int:
    """Return rank 0's number on every rank."""
    number = torch.tensor(value)
    dist.broadcast(number, 0)
    return int(number)


# ---- figures -------------------------------------------------------------------------------------------------------


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the median, and half the distance between the quartiles relative to it."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median, median, median)
    return median, (high - low) / 2 / median


def about_run() -> dict[str, str]:
    """Return what rows say of where and when they were measured."""
    return {"hardware": hardware(), "torch": torch.__version__, "date": datetime.date.today().isoformat()}


# ---- the command line ----------------------------------------------------------------------------------------------


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark on links."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    links_help = f"rates that `tc` reads, {UNLIMITED}, or {LOOPBACK} for plain loopback, which needs no root"
    parser.add_argument("--links", nargs="+", default=["100mbit", "1gbit", UNLIMITED], help=links_help)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--out", type=Path, help="takes the rows as JSON")
    parser.add_argument("--table", type=Path, help="Markdown file whose section is replaced; default: print")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    return parser


def run_jobs(script: Path, args: argparse.Namespace, settings: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Run a script's ranks for every number of ranks and link; yield each job's rows.

    Raises:
        SystemExit: In words, if links cannot be made here.
    """
    for ranks in args.ranks:
        for link in args.links:
            begin = time.monotonic()
            try:
                rows = run_ranks(script, ranks, link, settings | {"link": link})
            except LinksUnavailable as error:
                raise SystemExit(str(error)) from None
            print(f"{link}, {ranks} ranks: {len(rows)} rows in {time.monotonic() - begin:.0f} s", file=sys.stderr)
            yield rows


def report(rows: Sequence[dict[str, Any]], title: str, section: str, args: argparse.Namespace) -> None:
    """Write the rows and the section where the command line wants them; print the section otherwise."""
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    if args.table:
        replace_section(args.table, title, section)
    else:
        print(section)
