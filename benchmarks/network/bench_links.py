"""Check `fedq plan` on links of a chosen rate: steps as predicted from a probe of the link, beside the same, measured.

    sudo python benchmarks/network/bench_links.py --work DIR --table docs/results.md    # all links, 2 and 4 ranks
    sudo python benchmarks/network/bench_links.py --work DIR --links 100mbit --ranks 2  # one of them
    python benchmarks/network/bench_links.py --work DIR --links none --ranks 2          # no root: plain loopback

For each number of ranks, training without any exchange is timed once, on unlimited links. Then for each link the ranks
are probed by what `fedq probe` runs, all codecs train in turns with the DDP hook, and the step that `fedq plan`
computes from the probe and the first figure stands beside the median of the measured ones. Nothing of the measured
steps is used for a prediction. DIR keeps what was measured, and what is there already is not measured again; delete a
file to renew it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of what the benchmarks share

from links import UNLIMITED, LinksUnavailable, about_run, agreed, as_rank, common_arguments, median_and_spread, report
from links import run_ranks as run_script
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fedq import hooks
from fedq.models import build_model
from fedq.planning.cluster import Cluster
from fedq.planning.probe import Clock, measure
from fedq.planning.step import Job, StepModel
from fedq.planning.traffic import Shapes
from fedq.report.encoding import make_readable
from fedq.runtime import distributed

TITLE = "Predicted and measured steps on limited links"
COMMAND = "python benchmarks/network/bench_links.py"
CODECS = ("fp32", "bf16", "int8", "int4", "int2", "sign", "blocktopk:k=1,block=64,bits=2", "powersgd:rank=2,start=2")
LR = 1e-6
"""So small that gradients stay those of a fresh network, whatever the number of steps."""
WARM_UP = 3
"""Steps before anything is timed: DDP rebuilds its buckets after the first, PowerSGD begins in the third."""
TURNS, MOST, FEWEST = 3, 10, 1
"""Turns of an arm in each job; timed steps of a turn."""
COMPUTE_STEPS = 40
BAR = 0.15
"""Median error of the predicted step time that is allowed."""


@dataclass
class Row:
    """What one codec did on one link."""

    link: str
    ranks: int
    codec: str
    schedule: str
    compute_ms: float
    predicted_ms: float
    measured_ms: float
    spread: float
    """Half the distance of the quartiles, relative to the median."""
    predicted_bytes: float
    measured_bytes: float
    """Handed to the process group by a rank in a step; mean over ranks."""

    @property
    def error(self) -> float:
        """Of the predicted time, relative to the measured one."""
        return self.predicted_ms / self.measured_ms - 1


# ---- a rank --------------------------------------------------------------------------------------------------------


class Contender:
    """A model that is trained with one codec, or, without one, alone."""

    def __init__(self, spec: str | None, model: str, batch_size: int) -> None:
        torch.manual_seed(0)  # the same weights on every rank, so that DDP need not send them
        self.ddp = DistributedDataParallel(build_model(model), broadcast_buffers=False, init_sync=False)
        self.state = hooks.register(self.ddp, spec) if spec else None
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=LR)
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        self.images = torch.randn(batch_size, 3, 32, 32, generator=generator)
        self.labels = torch.randint(10, (batch_size,), generator=generator)
        self.seconds: list[float] = []
        self.sent = self.steps = 0

    def step(self) -> float:
        """Train one step; return its seconds."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        with contextlib.nullcontext() if self.state else self.ddp.no_sync():
            nn.functional.cross_entropy(self.ddp(self.images), self.labels).backward()
        self.optimizer.step()
        return time.perf_counter() - begin

    def turn(self, num: int) -> None:
        """Train so many timed steps and one before them, which may use what the link saved up."""
        before = self._sent()
        self.seconds += [self.step() for _ in range(num + 1)][1:]
        self.sent += self._sent() - before
        self.steps += num + 1

    def _sent(self) -> int:
        return self.state.sent.first + self.state.sent.second if self.state else 0


def compute_s(settings: dict[str, Any]) -> float:
    """Return the seconds of a step without exchange, when all ranks begin together, until the last one ends."""
    alone = Contender(None, settings["model"], settings["batch_size"])
    with distributed("cpu", 1) as runtime:
        clock = Clock(runtime)
        for _ in range(WARM_UP):
            alone.step()
        return statistics.median(clock.slowest([clock.once(alone.step)[0] for _ in range(COMPUTE_STEPS)]))


def measured_steps(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Train all codecs in turns; yield what each measured."""
    arms = {spec: Contender(spec, settings["model"], settings["batch_size"]) for spec in settings["codecs"]}
    num_steps = {}
    for spec, arm in arms.items():
        took = [arm.step() for _ in range(WARM_UP)][-1]
        num_steps[spec] = agreed(min(MOST, max(FEWEST, int(settings["seconds_per_arm"] / TURNS / took))))
    for turn in range(TURNS):
        order = list(arms)
        for spec in order[turn:] + order[:turn]:
            arms[spec].turn(num_steps[spec])
    for spec, arm in arms.items():
        median, spread = median_and_spread(arm.seconds)
        sent = torch.tensor(arm.sent / arm.steps, dtype=torch.float64)
        dist.all_reduce(sent)
        yield {"codec": spec, "seconds": median, "spread": spread, "bytes": float(sent) / dist.get_world_size()}


def as_one_rank(folder: Path) -> None:
    with as_rank(folder) as (settings, result):
        if settings["does"] == "compute":
            result.append(compute_s(settings))
        elif settings["does"] == "probe":
            with distributed("cpu", 1) as runtime:
                cluster = measure(runtime, settings["codecs"], budget_s=settings["probe_seconds"])
                if runtime.is_root:
                    cluster.save(Path(settings["file"]))
        else:
            result += measured_steps(settings)


# ---- the parent ----------------------------------------------------------------------------------------------------


def measured(does: str, ranks: int, link: str, settings: dict[str, Any], work: Path) -> Path:
    """Return the file with what some ranks measured on a link, measured now if it is not there."""
    path = (work / f"{does}-{ranks}ranks-{link}.json").resolve()
    if not path.exists():
        found = run_script(Path(__file__), ranks, link, settings | {"does": does, "file": str(path)}, limit_s=900)
        if does != "probe":
            path.write_text(json.dumps(found) + "\n")
    return path


def rows_of(ranks: int, link: str, settings: dict[str, Any], work: Path) -> list[Row]:
    """Return predictions beside measurements of one link."""
    free = link if link == "none" else UNLIMITED
    (alone_s,) = json.loads(measured("compute", ranks, free, settings, work).read_text())
    cluster = Cluster.load(measured("probe", ranks, link, settings, work))
    rows = []
    shapes = Shapes.of(settings["model"])
    for found in json.loads(measured("steps", ranks, link, settings, work).read_text()):
        model = StepModel(Job(shapes, alone_s), cluster, found["codec"])
        rows.append(
            Row(
                link=link,
                ranks=ranks,
                codec=found["codec"],
                schedule=model.traffic.schedule,
                compute_ms=1e3 * alone_s,
                predicted_ms=1e3 * model.play().seconds,
                measured_ms=1e3 * found["seconds"],
                spread=found["spread"],
                predicted_bytes=float(model.traffic.sent.sum(axis=1).mean()),
                measured_bytes=found["bytes"],
            )
        )
    return rows


def table(rows: Sequence[Row], about: dict[str, Any]) -> str:
    lines = [
        f"## {TITLE}",
        "",
        f"{about['model']} in float32, batch {about['batch_size']} a rank, one thread a rank, Gloo; "
        f"{about['hardware']}, torch {about['torch']}, {about['date']}.",
        "",
        "Predicted by `fedq plan` from a probe of the link (about "
        f"{about['probe_seconds']:.0f} s) and the time of a step without exchange, which is measured once for each "
        "number of ranks; no measured step is used. Measured: median on rank 0, codecs in turns, ± half the distance "
        "of the quartiles. KB: handed to the process group by a rank in a step; predicted and counted are "
        + ("the same" if all(abs(r.predicted_bytes - r.measured_bytes) < 1 for r in rows) else "NOT the same")
        + " in every row.",
        "",
        "| link | ranks | codec | schedule | KB | alone, ms | predicted, ms | measured, ms | ± | error |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row.link} | {row.ranks} | {row.codec} | {row.schedule} | {row.measured_bytes / 1e3:.1f} "
            f"| {row.compute_ms:.0f} | {row.predicted_ms:.0f} | {row.measured_ms:.0f} | {100 * row.spread:.0f} % "
            f"| {100 * row.error:+.0f} % |"
        )
    lines += ["", *verdict(rows), "", f"Re-made by `{COMMAND} --work DIR --table docs/results.md`.", ""]
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> list[str]:
    """Return the median error, of all rows and of each link, and whether the bar is met."""
    total = statistics.median(abs(row.error) for row in rows)
    met = "met" if total <= BAR else "MISSED"
    lines = [f"Median error of the predicted step time: {100 * total:.1f} % (bar: at most {100 * BAR:.0f} %, {met})."]
    for link, ranks in dict.fromkeys((row.link, row.ranks) for row in rows):
        errors = [abs(row.error) for row in rows if (row.link, row.ranks) == (link, ranks)]
        worst = max(errors)
        lines.append(
            f"- {link}, {ranks} ranks: median {100 * statistics.median(errors):.0f} %, at most {100 * worst:.0f} %"
        )
    return [lines[0], "", *lines[1:]]


def parse_args() -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.set_defaults(links=["10mbit", "100mbit", "1gbit", UNLIMITED])
    parser.add_argument("--work", type=Path, default=Path("links"), help="folder for what was measured")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), metavar="SPEC")
    parser.add_argument("--model", default="cnn1m")
    parser.add_argument("--batch-size", type=int, default=32, help="images a rank and step")
    parser.add_argument("--seconds-per-arm", type=float, default=4, help="of each job: slow codecs take fewer steps")
    parser.add_argument("--probe-seconds", type=float, default=15)
    return parser.parse_args()


def main() -> None:
    make_readable()
    args = parse_args()
    if args.rank_of:
        as_one_rank(args.rank_of)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    settings = {
        name: getattr(args, name) for name in ("codecs", "model", "batch_size", "seconds_per_arm", "probe_seconds")
    }
    rows: list[Row] = []
    for ranks in args.ranks:
        for link in args.links:
            begin = time.monotonic()
            try:
                rows += rows_of(ranks, link, settings, args.work)
            except LinksUnavailable as error:
                raise SystemExit(str(error)) from None
            print(f"{link}, {ranks} ranks: {time.monotonic() - begin:.0f} s", flush=True)
    about = about_run() | settings
    report([asdict(row) | about for row in rows], TITLE, table(rows, about), args)


if __name__ == "__main__":
    main()
