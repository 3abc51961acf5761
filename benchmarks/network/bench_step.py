"""Time data-parallel training steps whose gradients travel in few bits, on links of a chosen rate, beside rivals.

    sudo python benchmarks/network/bench_step.py --out step.json --table docs/results.md  # all links, 2 and 4 ranks
    python benchmarks/network/bench_step.py --links none --ranks 2 --arms none int4       # no root: plain loopback
    sudo python benchmarks/network/bench_step.py --links 1gbit --ranks 2 --trace DIR --arms no_sync none int4

Every arm is a DDP model of its own on the same Gloo group: as it is (``none``), with PyTorch's hooks (16-bit casts,
PowerSGD, quantization), or with `fedq.hooks.register` and error feedback as by default. All arms of a link run in one
job, in turns that begin with another arm each time; the first step of a turn is not timed. ``no_sync`` is the same step
without any exchange, so ``ms - no_sync`` is the communication that the backward pass does not hide (and what it costs
in arithmetic). PyTorch's PowerSGD and quantization hooks start collectives in callbacks, which hangs or crashes Gloo
when there are several buckets, so they get one.

``--trace DIR`` makes another table: it also runs each arm with one bucket as large as the model, whose exchange can
only begin when the backward pass is over, and profiles three steps of each on rank 0 (the files go to DIR). The table
says how long the backward pass waits after its last gradient with overlap and without. Take a few arms: each has a
model of its own, about 200 MB a rank for ResNet-18.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of what the benchmarks share

from links import (
    SentBytes,
    about_run,
    agreed,
    as_rank,
    common_arguments,
    mean_over_ranks,
    median_and_spread,
    report,
    run_jobs,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from torch.nn.parallel import DistributedDataParallel

from fedq import hooks
from fedq.models import build_model
from fedq.report.encoding import make_readable

TITLE = "Training steps on limited links"
OVERLAP_TITLE = "Communication that the backward pass does not hide"
COMMAND = "python benchmarks/network/bench_step.py"
WARM_UP = 3
"""Steps before anything is timed: DDP rebuilds its buckets after the first, PowerSGD begins in the third."""
TRACED = 3
LR = 1e-6
"""So small that gradients stay those of a fresh network, whatever the number of steps."""
WHOLE_MODEL_MB = 1000
BACKWARD, LAST_GRADIENT = "backward", "AccumulateGrad"
"""Names in a trace: the range that a step marks, and (part of) the operation that stores a gradient."""
Register = Callable[[DistributedDataParallel], Any]


# ---- arms ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to average gradients.

    Args:
        register: Puts the hook on a DDP model.
        one_bucket: Whether the model is one bucket.
        sync: Whether there is an exchange at all.
        ours: Whether it is fedq's.
    """

    register: Register = lambda ddp: None
    one_bucket: bool = False
    sync: bool = True
    ours: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether an exchange can begin during the backward pass."""
        return self.sync and not self.one_bucket


def rival(hook: Callable, state: Callable[[], Any] = lambda: None, *, one_bucket: bool = False) -> Arm:
    return Arm(lambda ddp: ddp.register_comm_hook(state(), hook), one_bucket)


def powersgd(rank: int) -> Arm:
    state = partial(powerSGD_hook.PowerSGDState, None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    return rival(powerSGD_hook.powerSGD_hook, state, one_bucket=True)


def ours(spec: str, second: str | None = None, schedule: str = "auto") -> Arm:
    return Arm(lambda ddp: hooks.register(ddp, spec, second=second, schedule=schedule), ours=True)


NO_SYNC, NONE = "no_sync", "none"
ONCE = "@once"
"""Ends the name of an arm's variant with one bucket."""
ARMS = {
    NO_SYNC: Arm(sync=False),
    NONE: Arm(),
    "fp16": rival(default_hooks.fp16_compress_hook),
    "bf16": rival(default_hooks.bf16_compress_hook),
    "powersgd-1": powersgd(1),
    "powersgd-2": powersgd(2),
    "powersgd-4": powersgd(4),
    "quantize-tensor": rival(quantization_hooks.quantization_pertensor_hook, one_bucket=True),
    "quantize-channel": rival(quantization_hooks.quantization_perchannel_hook, one_bucket=True),
    "int8": ours("int8"),
    "int4": ours("int4"),
    "int4-int6": ours("int4", "int6", "two_phase"),
    "int2": ours("int2"),
    "sign": ours("sign"),
    "sparse": ours("blocktopk:k=1,block=64,bits=2"),
}
"""``int4-int6``: two legs at any number of ranks (by default two ranks need only one); ``sparse``: 1 value of 64."""
BARS = {"1gbit": 1 / 1.4, "100mbit": 1 / 4.5, "unlimited": 1.2}
"""Two ranks: the best of ours may take this share of the time of ``none`` (100 Mbit/s: of the best plain cast)."""


@dataclass
class Row:
    """What one arm measured on one link."""

    link: str
    ranks: int
    arm: str
    overlap: bool
    """Whether DDP cut the gradients into buckets, so that an exchange can begin during the backward pass."""
    ms_per_step: float
    spread: float
    """Half the distance of the quartiles, relative to the median."""
    interface_bytes_per_step: int
    """Put on the interface by a rank, headers included; mean over ranks."""
    payload_bytes_per_step: int | None
    """Handed to the process group by a rank, where it is counted; mean over ranks."""
    images_per_s: float
    cpu_ms_per_step: float
    """Processor time of a rank's threads, in the kernel too; mean over ranks. Waiting costs none."""
    num_steps: int
    """Timed."""
    trace_exposed_ms: float | None
    """Waiting for the exchange inside the backward pass, a step, in the trace."""
    ratio_to_none: float | None = None
    """Time to that of ``none`` in the same run."""
    exposed_ms: float | None = None
    """Time above that of ``no_sync`` in the same run."""

    @property
    def variant(self) -> bool:
        """Whether this is an arm with one bucket that has several by itself: for the table of overlap alone."""
        return ARMS[self.arm].overlaps and not self.overlap


# ---- a rank --------------------------------------------------------------------------------------------------------


class Contender:
    """One arm's model, and what it measured so far."""

    def __init__(self, name: str, arm: Arm, model: str, batch_size: int) -> None:
        torch.manual_seed(0)  # the same weights on every rank, so that DDP need not send them
        cap = WHOLE_MODEL_MB if arm.one_bucket else None
        network = build_model(model)
        self.name, self.arm = name, arm
        self.ddp = DistributedDataParallel(network, broadcast_buffers=False, init_sync=False, bucket_cap_mb=cap)
        self.state = arm.register(self.ddp)
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=LR)
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        self.images = torch.randn(batch_size, 3, 32, 32, generator=generator)
        self.labels = torch.randint(10, (batch_size,), generator=generator)
        self.seconds: list[float] = []
        self.steps = self.interface_bytes = self.payload_bytes = 0
        self.cpu_s = 0.0

    def step(self) -> float:
        """Train one step; return its seconds."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        with contextlib.nullcontext() if self.arm.sync else self.ddp.no_sync():
            loss = nn.functional.cross_entropy(self.ddp(self.images), self.labels)
            with torch.profiler.record_function(BACKWARD):
                loss.backward()
        self.optimizer.step()
        return time.perf_counter() - begin

    def trace(self, folder: Path, link: str) -> float:
        """Profile some steps on rank 0 into a file; return the milliseconds of `waited` a step there, 0 elsewhere."""
        if dist.get_rank():
            for _ in range(TRACED):
                self.step()
            return 0.0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(TRACED):
                self.step()
        file = folder / f"{link}-{dist.get_world_size()}ranks-{self.name}.json"
        profile.export_chrome_trace(str(file))
        return waited(json.loads(file.read_text())["traceEvents"]) / TRACED

    def turn(self, num: int, interface: SentBytes) -> None:
        """Train so many timed steps and one before them, and count the bytes of all."""
        payload, on_interface, cpu = self._payload_bytes(), interface.read(), time.process_time()
        self.seconds += [self.step() for _ in range(num + 1)][1:]
        self.cpu_s += time.process_time() - cpu
        self.interface_bytes += interface.read() - on_interface
        self.payload_bytes += self._payload_bytes() - payload
        self.steps += num + 1

    def _payload_bytes(self) -> int:
        return self.state.sent.first + self.state.sent.second if self.state else 0

    def row(self, link: str, trace_exposed_ms: float | None) -> Row:
        median, spread = median_and_spread(self.seconds)
        payload = mean_over_ranks(self.payload_bytes / self.steps)
        return Row(
            link=link,
            ranks=dist.get_world_size(),
            arm=self.name.removesuffix(ONCE),
            overlap=self.arm.overlaps,
            ms_per_step=1e3 * median,
            spread=spread,
            interface_bytes_per_step=round(mean_over_ranks(self.interface_bytes / self.steps)),
            payload_bytes_per_step=round(payload) if self.state else None,
            images_per_s=dist.get_world_size() * len(self.images) / median,
            cpu_ms_per_step=1e3 * mean_over_ranks(self.cpu_s / self.steps),
            num_steps=len(self.seconds),
            trace_exposed_ms=trace_exposed_ms,
        )


def waited(events: Sequence[dict[str, Any]]) -> float:
    """Return the milliseconds in which the thread of the backward pass waited for the exchange.

    That is the part of each backward range, after its last gradient is there, in which the thread does nothing (copies
    out of buckets are not waiting).
    """
    spans = [e for e in events if e.get("ph") == "X"]
    total = 0.0
    for span in [e for e in spans if e["name"] == BACKWARD]:
        begin, end = span["ts"], span["ts"] + span["dur"]
        inside = [e for e in spans if e["tid"] == span["tid"] and begin <= e["ts"] < end and e is not span]
        reached = max(e["ts"] + e["dur"] for e in inside if LAST_GRADIENT in e["name"])
        for event in sorted((e for e in inside if e["ts"] >= reached), key=lambda e: e["ts"]):
            total += max(0.0, event["ts"] - reached)
            reached = max(reached, event["ts"] + event["dur"])
        total += end - reached
    return total / 1e3


def contenders(settings: dict[str, Any]) -> list[Contender]:
    arms = {name: ARMS[name] for name in settings["arms"]}
    if settings["trace"]:
        arms |= {name + ONCE: replace(arm, one_bucket=True) for name, arm in arms.items() if arm.overlaps}
    return [Contender(name, arm, settings["model"], settings["batch_size"]) for name, arm in arms.items()]


def measure(settings: dict[str, Any]) -> Iterator[Row]:
    """Train all arms in turns; every rank yields the same rows but for the times, which are its own."""
    arms, interface, link = contenders(settings), SentBytes(), settings["link"]
    share_s, turns = settings["seconds_per_arm"] / settings["repetitions"], settings["repetitions"]
    num_steps = {}
    for arm in arms:
        took = [arm.step() for _ in range(WARM_UP)][-1]
        num_steps[arm.name] = agreed(min(settings["steps"], max(1, int(share_s / took))))
    for turn in range(turns):
        shift = turn * len(arms) // turns
        for arm in arms[shift:] + arms[:shift]:
            arm.turn(num_steps[arm.name], interface)
    for arm in arms:
        exposed = arm.trace(Path(settings["trace"]), link) if settings["trace"] else None
        yield arm.row(link, exposed)


# ---- the parent ----------------------------------------------------------------------------------------------------


def with_ratios(rows: list[Row]) -> list[Row]:
    """Fill in what compares the arms of one job."""
    plain = {row.arm: row.ms_per_step for row in rows if not row.variant}
    for row in rows:
        row.ratio_to_none = row.ms_per_step / plain[NONE] if NONE in plain else None
        row.exposed_ms = row.ms_per_step - plain[NO_SYNC] if NO_SYNC in plain else None
    return rows


def bar(rows: list[Row]) -> str:
    """Return in words whether the best of ours on two ranks is as much faster as it is meant to be."""
    ms = {row.arm: row.ms_per_step for row in rows if not row.variant}
    mine = {arm: value for arm, value in ms.items() if ARMS[arm].ours}
    link = rows[0].link
    if not (rows[0].ranks == 2 and link in BARS and mine and {NONE, "fp16", "bf16"} <= ms.keys()):
        return ""
    best, cast = min(mine, key=lambda arm: mine[arm]), min(ms["fp16"], ms["bf16"])
    limit = BARS[link] * (min(ms[NONE], cast) if link == "100mbit" else ms[NONE])
    if link == "1gbit":
        limit = min(limit, cast)
    kept = [arm for arm, value in mine.items() if value <= limit]
    return (
        f"- {link}: at most {limit:.0f} ms a step; fastest of fedq's arms: {best}, {mine[best]:.0f} ms; "
        f"{'met by ' + ', '.join(kept) if kept else 'MISSED'}."
    )


def table(rows: list[Row], about: dict[str, Any]) -> str:
    jobs = list(dict.fromkeys((row.link, row.ranks) for row in rows))
    lines = [
        *heading(TITLE, about),
        "ms: of a step, median on rank 0, arms in turns, ± half the distance of the quartiles. Exposed: above "
        "`no_sync`, the same step without an exchange. CPU: of all threads of a rank. MB: on a rank's interface "
        "(headers included) and handed to the process group, a step. `quantize-*` and `powersgd-*` are PyTorch's hooks "
        "with one bucket, `int4-int6` sends 4 bits to the owners and 6 back, `sparse` is 1 value of 64; all of fedq's "
        "but `int8` with error feedback.",
        "",
        "| link | ranks | arm | ms | ± | to `none` | exposed ms | CPU ms | interface MB | payload MB | images/s |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        payload = "" if row.payload_bytes_per_step is None else f"{row.payload_bytes_per_step / 1e6:.3f}"
        lines.append(
            f"| {row.link} | {row.ranks} | {row.arm} | {row.ms_per_step:.0f} | {100 * row.spread:.0f} % "
            f"| {number(row.ratio_to_none, 2)} | {number(row.exposed_ms)} | {row.cpu_ms_per_step:.0f} "
            f"| {row.interface_bytes_per_step / 1e6:.3f} | {payload} | {row.images_per_s:.1f} |"
        )
    bars = [bar([row for row in rows if (row.link, row.ranks) == job]) for job in jobs]
    if any(bars):
        lines += ["", "Bars for two ranks:", "", *filter(None, bars)]
    return "\n".join([*lines, "", f"Re-made by `{COMMAND} --table docs/results.md`.", ""])


def overlap_table(rows: list[Row], about: dict[str, Any]) -> str:
    lines = [
        *heading(OVERLAP_TITLE, about),
        "With overlap (DDP's buckets) and without (one bucket: the exchange begins when the backward pass is over). "
        f"Waiting: in a profile of {TRACED} steps of rank 0, the time in which the backward pass does nothing after "
        "its last gradient.",
        "",
        "| link | ranks | arm | overlap | ms a step | above `no_sync`, ms | waiting in the trace, ms |",
        "|---" * 7 + "|",
    ]
    order = {arm: place for place, arm in enumerate(ARMS)}
    for row in sorted(rows, key=lambda row: (row.link, row.ranks, order[row.arm])):
        lines.append(
            f"| {row.link} | {row.ranks} | {row.arm} | {'on' if row.overlap else 'off'} | {row.ms_per_step:.0f} "
            f"| {number(row.exposed_ms)} | {number(row.trace_exposed_ms)} |"
        )
    flags: dict[str, list[Any]] = {
        "links": [row.link for row in rows],
        "ranks": [row.ranks for row in rows],
        "arms": [row.arm for row in rows],
    }
    given = " ".join(f"--{flag} {' '.join(map(str, dict.fromkeys(values)))}" for flag, values in flags.items())
    return "\n".join([*lines, "", f"Re-made by `{COMMAND} {given} --trace DIR --table docs/results.md`.", ""])


def heading(title: str, about: dict[str, Any]) -> list[str]:
    return [
        f"## {title}",
        "",
        f"{about['model']} in float32, batch {about['batch_size']} a rank, one thread a rank, Gloo; "
        f"{about['hardware']}, torch {about['torch']}, {about['date']}.",
        "",
    ]


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def parse_args() -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=4, help="images a rank and step")
    parser.add_argument("--steps", type=int, default=20, help="timed in one turn of an arm, at most")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each arm")
    parser.add_argument("--seconds-per-arm", type=float, default=8, help="of each job: slow arms take fewer steps")
    parser.add_argument("--trace", type=Path, help="folder for profiles; the table of overlap instead")
    return parser.parse_args()


def main() -> None:
    make_readable()
    args = parse_args()
    if args.rank_of:
        with as_rank(args.rank_of) as (settings, result):
            result += [asdict(row) for row in measure(settings)]
        return
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
    names = ("arms", "model", "batch_size", "steps", "repetitions", "seconds_per_arm")
    settings = {name: getattr(args, name) for name in names} | {"trace": args.trace and str(args.trace.resolve())}
    rows: list[Row] = []
    for found in run_jobs(Path(__file__), args, settings):
        rows += with_ratios([Row(**row) for row in found])
    about = about_run() | {"model": args.model, "batch_size": args.batch_size}
    title, section = (OVERLAP_TITLE, overlap_table) if args.trace else (TITLE, table)
    report([asdict(row) | about for row in rows], title, section(rows, about), args)


if __name__ == "__main__":
    main()
