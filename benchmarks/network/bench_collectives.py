"""Time the compressed mean of one tensor beside torch's all-reduce, by schedule and codec, on links of a chosen rate.

    sudo python benchmarks/network/bench_collectives.py --out collectives.json --table docs/results.md
    python benchmarks/network/bench_collectives.py --links none --ranks 2 --sizes 65536  # no root: plain loopback

A size is that of the tensor in float32. Each call replaces a fresh copy of the tensor by its mean over all ranks, as
the DDP hook does: one `MeanExchange`, used again, with residuals where the codec wants them. All contenders of a size
take turns in one job; times are those of rank 0, ratios are to the float32 all-reduce of the same job.
``hierarchical`` takes pairs of ranks as nodes; all its ranks are as far apart as the links, so it shows bytes and
overhead, not the gain of a fast node.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
from torch import Tensor

from fedq.codecs import codec
from fedq.collectives import MeanExchange, Residuals, assign_owners, cut
from fedq.collectives.peers import Peers
from fedq.report.encoding import make_readable

TITLE = "Means of one tensor on limited links"
COMMAND = "python benchmarks/network/bench_collectives.py --table docs/results.md"
ALL_REDUCE = "all_reduce"
CODECS = ["fp32", "bf16", "int8", "int4", "sign"]
SCHEDULES = ["reduce", "one_phase", "two_phase", "hierarchical"]
RANKS_PER_NODE = 2
KIB = 1024
SIZES = [64 * KIB, KIB**2, 25 * KIB**2]


@dataclass
class Row:
    """What one way to average one size measured."""

    link: str
    ranks: int
    size_bytes: int
    """Of the tensor in float32."""
    schedule: str
    """``all_reduce`` is torch's own."""
    codec: str
    ms: float
    spread: float
    """Half the distance of the quartiles, relative to the median."""
    interface_bytes: int
    """Put on the interface by a rank in a call, headers included; mean over ranks."""
    payload_bytes: int
    """Handed to the process group by a rank in a call (for sums: what a ring sends); mean over ranks."""
    num_calls: int
    """Timed."""
    ratio_to_all_reduce: float | None = None
    """Time to that of the float32 all-reduce of the same job."""


# ---- a rank --------------------------------------------------------------------------------------------------------


class Contender:
    """One way to average a tensor over all ranks, and what it measured so far."""

    def __init__(self, schedule: str, spec: str, size_bytes: int) -> None:
        self.schedule, self.spec, self.size_bytes = schedule, spec, size_bytes
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.x = torch.randn(size_bytes // 4, generator=generator)
        self.flat = self.x.clone()
        self.average, self.sent_bytes = (torchs if schedule == ALL_REDUCE else ours)(schedule, spec, self.x.numel())
        self.seconds: list[float] = []
        self.calls = self.interface_bytes = 0

    def call(self) -> float:
        self.flat.copy_(self.x)
        begin = time.perf_counter()
        self.average(self.flat)
        return time.perf_counter() - begin

    def turn(self, num: int, interface: SentBytes) -> None:
        before = interface.read()
        self.seconds += [self.call() for _ in range(num)]
        self.interface_bytes += interface.read() - before
        self.calls += num

    def row(self, link: str) -> Row:
        median, spread = median_and_spread(self.seconds)
        return Row(
            link=link,
            ranks=dist.get_world_size(),
            size_bytes=self.size_bytes,
            schedule=self.schedule,
            codec=self.spec,
            ms=1e3 * median,
            spread=spread,
            interface_bytes=round(mean_over_ranks(self.interface_bytes / self.calls)),
            payload_bytes=round(mean_over_ranks(self.sent_bytes())),
            num_calls=len(self.seconds),
        )


Average = Callable[[Tensor], None]


def torchs(schedule: str, spec: str, numel: int) -> tuple[Average, Callable[[], float]]:
    """Return torch's all-reduce in one type, and the bytes that a ring sends in a call."""
    dtype, size = {"fp32": torch.float32, "bf16": torch.bfloat16}[spec], dist.get_world_size()

    def average(flat: Tensor) -> None:
        values = flat.div_(size).to(dtype)
        dist.all_reduce(values)
        if values is not flat:
            flat.copy_(values)

    return average, lambda: 2 * (size - 1) / size * numel * dtype.itemsize


def ours(schedule: str, spec: str, numel: int) -> tuple[Average, Callable[[], float]]:
    """Return fedq's mean by one schedule and codec, and what it counted as sent in a call."""
    wanted = codec(spec)
    residuals = Residuals() if wanted.wants_feedback else None
    chosen, peers = wanted.resolved(feedback=residuals is not None), Peers()
    segments = assign_owners(cut([numel], [(chosen, chosen)], [0]), peers.size)
    exchange = MeanExchange(segments, peers, schedule=schedule, ranks_per_node=RANKS_PER_NODE)
    calls = 0

    def average(flat: Tensor) -> None:
        nonlocal calls
        exchange.run(flat, seed=calls, residuals=residuals)
        calls += 1

    return average, lambda: (exchange.sent.first + exchange.sent.second) / calls


def fits(schedule: str, spec: str, ranks: int) -> bool:
    """Whether these ranks and this codec can have the schedule."""
    if schedule == "reduce":
        return codec(spec).reducible
    return schedule != "hierarchical" or (ranks % RANKS_PER_NODE == 0 and ranks > RANKS_PER_NODE)


def measure(settings: dict[str, Any]) -> Iterator[Row]:
    """Average every size in every way; every rank yields the same rows but for the times, which are its own."""
    interface, turns = SentBytes(), settings["repetitions"]
    ways = [(ALL_REDUCE, "fp32"), (ALL_REDUCE, "bf16")]
    ways += [(s, c) for s in settings["schedules"] for c in settings["codecs"] if fits(s, c, dist.get_world_size())]
    for size in settings["sizes"]:
        arms = [Contender(schedule, spec, size) for schedule, spec in ways]
        took = [[arm.call(), arm.call()][1] for arm in arms]  # the first connects
        share_s = settings["seconds_per_arm"] / turns
        num_calls = [agreed(min(settings["calls"], max(1, int(share_s / seconds)))) for seconds in took]
        for turn in range(turns):
            shift = turn * len(arms) // turns
            for place in [*range(shift, len(arms)), *range(shift)]:
                arms[place].turn(num_calls[place], interface)
        yield from (arm.row(settings["link"]) for arm in arms)


# ---- the parent ----------------------------------------------------------------------------------------------------


def with_ratios(rows: list[Row]) -> list[Row]:
    """Fill in the ratio to the float32 all-reduce of the same size and job."""
    plain = {row.size_bytes: row.ms for row in rows if (row.schedule, row.codec) == (ALL_REDUCE, "fp32")}
    for row in rows:
        row.ratio_to_all_reduce = row.ms / plain[row.size_bytes]
    return rows


def table(rows: list[Row], about: dict[str, Any]) -> str:
    lines = [
        f"## {TITLE}",
        "",
        f"One thread a rank, Gloo; {about['hardware']}, torch {about['torch']}, {about['date']}. A call in ms (median "
        "on rank 0, contenders in turns) and, in parentheses, as a multiple of the float32 all-reduce of the same job; "
        "MB on a rank's interface a call (headers included), in parentheses what it handed to the process group.",
    ]
    for link, ranks in dict.fromkeys((row.link, row.ranks) for row in rows):
        here = [row for row in rows if (row.link, row.ranks) == (link, ranks)]
        sizes = list(dict.fromkeys(row.size_bytes for row in here))
        heads = [f"{size / KIB:g} KiB: {what}" for size in sizes for what in ("ms", "MB")]
        lines += ["", f"{link}, {ranks} ranks:", "", "| schedule | codec | " + " | ".join(heads) + " |"]
        lines.append("|---" * (2 + len(heads)) + "|")
        for way in dict.fromkeys((row.schedule, row.codec) for row in here):
            cells = [cell for row in here if (row.schedule, row.codec) == way for cell in cells_of(row)]
            lines.append("| " + " | ".join([*way, *cells]) + " |")
    return "\n".join([*lines, "", f"Re-made by `{COMMAND}`.", ""])


def cells_of(row: Row) -> list[str]:
    return [
        f"{row.ms:.3g} ({row.ratio_to_all_reduce:.2f})",
        f"{row.interface_bytes / 1e6:.4f} ({row.payload_bytes / 1e6:.4f})",
    ]


def parse_args() -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="bytes of float32")
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, choices=SCHEDULES)
    parser.add_argument("--codecs", nargs="+", default=CODECS)
    parser.add_argument("--calls", type=int, default=50, help="in one turn, at most")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each contender")
    parser.add_argument("--seconds-per-arm", type=float, default=1.5, help="of each size: slow ones get fewer calls")
    return parser.parse_args()


def main() -> None:
    make_readable()
    args = parse_args()
    if args.rank_of:
        with as_rank(args.rank_of) as (settings, result):
            result += [asdict(row) for row in measure(settings)]
        return
    names = ("sizes", "schedules", "codecs", "calls", "repetitions", "seconds_per_arm")
    rows: list[Row] = []
    for found in run_jobs(Path(__file__), args, {name: getattr(args, name) for name in names}):
        rows += with_ratios([Row(**row) for row in found])
    about = about_run()
    report([asdict(row) | about for row in rows], TITLE, table(rows, about), args)


if __name__ == "__main__":
    main()
