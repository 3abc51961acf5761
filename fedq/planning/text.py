"""A cluster and predictions as plain text, at most 110 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from fedq.planning.cluster import Cluster, Level
from fedq.planning.rounds import RoundJob, RoundPrediction
from fedq.planning.step import Prediction
from fedq.planning.units import bandwidth_text, duration_text

WIDTH = 110


def describe(cluster: Cluster, *, in_detail: bool = False) -> list[str]:
    """Return what a cluster is; in detail also what each collective and codec costs."""
    hosts = f" on {', '.join(cluster.hosts)}" if cluster.hosts else ""
    lines = [
        f"{cluster.world_size:,} ranks, {cluster.ranks_per_node} a node{hosts}; {cluster.backend}, {cluster.device}"
    ]
    if cluster.world_size == 1:
        lines.append("one rank: no links, so memory and codecs are all that there is to measure")
    for name, level in (("inside a node", cluster.inside), ("across nodes", cluster.across)):
        if level is not None:
            lines += _level(name, level, cluster, in_detail)
    lines += wrapped(f"speed of the codecs {cluster.codecs_from}")
    if in_detail:
        lines.append(f"memory: {cluster.memory_bandwidth / 1e9:.1f} GB/s copied a rank, all ranks of a node at once")
        lines += _speeds(cluster)
    return lines


def _level(name: str, level: Level, cluster: Cluster, in_detail: bool) -> list[str]:
    of_node = ""
    if name.startswith("across") and cluster.ranks_per_node > 1:
        of_node = f" ({bandwidth_text(level.bandwidth * cluster.ranks_per_node)} a node)"
    burst = f", {level.burst_bytes / 1e3:.0f} kB pass at once after a rest" if level.burst_bytes else ""
    lines = [
        f"{name}: {bandwidth_text(level.bandwidth)} a rank{of_node}, latency {duration_text(level.latency_s)}{burst}"
    ]
    if in_detail and level.collectives:
        rows = [["collective", "latency", "bandwidth", "some points: message and time"]]
        for collective, cost in level.collectives.items():
            shown = [cost.points[i] for i in sorted({0, len(cost.points) // 2, len(cost.points) - 1})]
            points = ", ".join(f"{_size(size)} {duration_text(s)}" for size, _, s in shown)
            rows.append([collective, duration_text(cost.latency_s), bandwidth_text(cost.bandwidth), points])
        lines += _table(rows, "lrrl")
    return lines


def _speeds(cluster: Cluster) -> list[str]:
    rows = [["codec", "encode", "with residual", "reduce a payload", "decode", "a call"]]
    for spec, speed in cluster.codecs.items():
        passes = (
            speed.encode_s_per_byte,
            speed.encode_residual_s_per_byte,
            speed.reduce_s_per_byte,
            speed.decode_s_per_byte,
        )
        rates = [f"{1e-9 / s:.2f} GB/s" if s else "-" for s in passes]
        rows.append([spec, *rates, duration_text(speed.encode_call_s)])
    return _table(rows, "lrrrrr")


def step_table(rows: Sequence[Prediction], cluster: Cluster) -> list[str]:
    """Return the predictions of steps, the fastest first."""
    times = ["step", "exposed", "coding"]
    head = ["codec", "schedule", "MB/rank", "MB/link", *times, "gain", "beats fp32", "beats bf16"]
    table = [head]
    for row in rows:
        table.append(
            [
                row.codec,
                row.schedule,
                _mb(row.bytes_per_rank),
                _mb(row.link_bytes),
                *(_brief(s) for s in (row.seconds, row.exposed_s, row.coding_s)),
                f"{row.speedup:.2f}x",
                *(_pays(row.break_even.get(name), cluster) for name in ("fp32", "bf16")),
            ]
        )
    notes = (
        "MB/rank: sent in a step, mean over ranks; MB/link: over the busiest of the links that decide. Exposed: what "
        "the exchange adds to computation, coding included. Gain: over the faster of fp32 and bf16. Beats: below which "
        "bandwidth " + _which_link(cluster)
    )
    return [*_table(table, "llrrrrrrrr"), *wrapped(notes)]


def round_table(rows: Sequence[RoundPrediction], cluster: Cluster, job: RoundJob) -> list[str]:
    """Return the predictions of rounds, the fastest first."""
    head = [
        "codec",
        "server",
        "MB up",
        "MB down",
        "rank 0",
        "most",
        "round",
        "wire",
        "coding",
        "gain",
        "beats",
    ]
    table = [head]
    for row in rows:
        table.append(
            [
                row.codec,
                row.aggregate,
                _mb(row.uplink_bytes),
                _mb(row.download_bytes),
                _mb(row.root_bytes),
                _mb(row.most_bytes_received),
                *(_brief(s) for s in (row.seconds, row.exchange_s, row.coding_s)),
                f"{row.speedup:.2f}x",
                _pays(min(row.break_even.values()) if row.codec not in ("fp32", "bf16") else None, cluster),
            ]
        )
    notes = (
        f"{job.num_clients:,} clients, {job.cohort:,} a round, {job.local_steps} steps each. MB up: of one client's "
        f"message; down: that a sampled client fetches ({job.downlink}; every change since its last round, about every "
        f"{job.num_clients / job.cohort:,.0f} rounds, or the whole model; not part of the round's time between ranks). "
        "Rank 0, most: MB received in a round by rank 0, and by the rank that receives most. Wire: "
        "messages both ways. Gain: over the faster of fp32 and bf16 both ways. Beats both: below which bandwidth "
        + _which_link(cluster)
    )
    return [*_table(table, "llrrrrrrrrr"), *wrapped(notes)]


def wrapped(text: str) -> list[str]:
    """Return a paragraph's lines."""
    return textwrap.wrap(text, WIDTH)


def _which_link(cluster: Cluster) -> str:
    if cluster.bottleneck == "across":
        return "of a node's link."
    return "of a rank's links inside the node."


def _pays(bandwidth: float | None, cluster: Cluster) -> str:
    if bandwidth is None:
        return "-"
    if bandwidth == 0:
        return "never"
    if math.isinf(bandwidth):
        return "always"
    return bandwidth_text(bandwidth * cluster.ranks_per_link).removesuffix("/s")


def _mb(nbytes: float) -> str:
    megabytes = nbytes / 1e6
    return f"{megabytes:,.0f}" if megabytes >= 99.95 else f"{megabytes:.3g}"


def _brief(seconds: float) -> str:
    return duration_text(seconds) if seconds >= 1e-6 else "0"


def _size(nbytes: float) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.0f} B"


def _table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if side == "l" else text.rjust(width)
            for text, width, side in zip(row, widths, align, strict=True)
        ]
        lines.append((cells[0] + " " + "  ".join(cells[1:])).rstrip())
    return lines
