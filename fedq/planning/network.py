"""Seconds of messages on a cluster: the alpha-beta model over one or two levels of links.

Where as many ranks take part as did when the level was measured, times are read off the measured points; otherwise
they are ``steps · latency + bytes / bandwidth`` of the busiest rank in its busier direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedq.planning.cluster import Cluster, Cost, Level, moved_nbytes
from fedq.planning.traffic import Fan


@dataclass(frozen=True)
class Work:
    """Something that takes time, alone: ``seconds``, and its share of the processors of its node.

    Args:
        seconds: Seconds of the work where every rank does it and nothing else.
        demand: Share of the node's processors (of the device's, on a GPU) that it keeps busy, 0 to 1.
        wire_bytes: Bytes that a rank moves meanwhile over the links that decide, in its busier direction.
        burst: Level whose burst these bytes may use; None: no burst.
        in_and_out: Bytes that the busiest rank receives, and bytes that it sends, meanwhile.
        is_coding: Whether the work is coding, in which nothing travels.
    """

    seconds: float
    demand: float
    wire_bytes: float = 0.0
    burst: Level | None = None
    in_and_out: tuple[float, float] = (0.0, 0.0)
    is_coding: bool = False


@dataclass(frozen=True)
class Network:
    """The links of a cluster.

    Args:
        cluster: The cluster that has the links.
    """

    cluster: Cluster

    def all_reduce(self, nbytes: float, value_type: str) -> Work:
        """Sum a buffer over all ranks, along a ring that leaves each node once.

        Args:
            nbytes: Bytes of the buffer.
            value_type: ``float32`` or ``bfloat16``.
        """
        cluster, name = self.cluster, f"all_reduce_{value_type}"
        ring = moved_nbytes(name, nbytes, cluster.world_size)
        steps = num_steps(name, cluster.world_size, cluster.backend)
        # A ring through several nodes is as long as the world; inside, only its bytes count then.
        inside_steps = 0 if cluster.num_nodes > 1 else steps
        return self._slower(
            self._work(cluster.inside, name, ring, cluster.ranks_per_node, inside_steps),
            self._work(cluster.across, name, ring / cluster.ranks_per_node, cluster.world_size, steps),
        )

    def exchange(self, fan: Fan) -> Work:
        """Send messages from ranks to ranks, all at once."""
        inside, across = self.cluster.inside, self.cluster.across
        work = self._slower(
            self._work(inside, "exchange", fan.inside, fan.num_inside + 1, 1, fan.num_inside),
            self._work(across, "exchange", fan.across, fan.num_across + 1, 1, fan.num_across),
        )
        back = work.wire_bytes * fan.other_way
        return replace(work, in_and_out=(work.wire_bytes, back) if fan.is_inward else (back, work.wire_bytes))

    def gather(self, nbytes: float, from_inside: float, num: int) -> Work:
        """Send messages to rank 0, which receives ``nbytes`` from other nodes and ``from_inside`` from its own."""
        cluster = self.cluster
        share = nbytes / cluster.ranks_per_node  # rank 0 has its node's whole link to itself
        return self._slower(
            self._work(cluster.inside, "gather", from_inside, cluster.ranks_per_node, 1, num * (from_inside > 0)),
            self._work(cluster.across, "gather", share, cluster.world_size, 1, num * (share > 0)),
        )

    def broadcast(self, nbytes: float) -> Work:
        """Send a buffer from rank 0 to all: down a binary tree, whose root is the slowest."""
        cluster = self.cluster
        return self._slower(
            self._sent_down(cluster.inside, nbytes, cluster.ranks_per_node),
            self._sent_down(cluster.across, nbytes / cluster.ranks_per_node, cluster.num_nodes),
        )

    def _sent_down(self, level: Level | None, nbytes: float, ranks: int) -> Work | None:
        if level is None:
            return None
        depth = num_steps("broadcast", ranks, self.cluster.backend)
        hops = depth if self.cluster.backend == "gloo" and ranks != level.cost("broadcast").ranks else 1
        return self._work(level, "broadcast", hops * nbytes, ranks, depth)

    def _work(
        self, level: Level | None, name: str, moved: float, ranks: int, steps: int, num_messages: int | None = None
    ) -> Work | None:
        """Return a collective on one level; None where there is no such level, or nobody to talk to."""
        if level is None or num_messages == 0:
            return None
        cost = level.cost(name)
        latency = steps * cost.latency_s + (num_messages or 0) * level.message_s
        seconds = latency + moved / cost.bandwidth
        if cost.points and ranks == cost.ranks:
            seconds = _interpolated(cost, moved)
        seconds = max(latency, seconds + moved * level.slower_s_per_byte)
        return Work(
            seconds, self._demand(cost.cpu_s_per_byte * moved, seconds), moved, level if level.burst_bytes else None
        )

    def _demand(self, cpu_s: float, seconds: float) -> float:
        """Return the share of a node's processors that its ranks' traffic keeps busy."""
        cluster = self.cluster
        if not seconds or not cluster.cores:
            return 0.0
        return min(1.0, cluster.ranks_per_node * cpu_s / (cluster.cores * seconds))

    def _slower(self, inside: Work | None, across: Work | None) -> Work:
        """Return the slower of two levels that are busy at once, with the bytes of the one that decides."""
        deciding = across if self.cluster.bottleneck == "across" else inside
        slower = max((work for work in (inside, across) if work), key=lambda work: work.seconds, default=Work(0.0, 0.0))
        moved = deciding.wire_bytes if deciding else 0.0
        return replace(slower, wire_bytes=moved, in_and_out=(moved, moved))


def num_steps(collective: str, ranks: int, backend: str) -> int:
    """Return the latencies that a collective takes one after another.

    An all-reduce of Gloo goes around a ring twice, one of NCCL up a tree and down; a broadcast goes down a tree;
    messages of exchange and gather are on their way together.
    """
    depth = math.ceil(math.log2(ranks)) if ranks > 1 else 1
    if collective.startswith("all_reduce"):
        return 2 * (ranks - 1) if backend == "gloo" else 2 * depth
    return depth if collective == "broadcast" else 1


def _interpolated(cost: Cost, moved: float) -> float:
    """Return seconds between measured points; below the first its own, beyond the last by the bandwidth."""
    xs = [x for _, x, _ in cost.points]
    ys: list[float] = []
    for *_, seconds in cost.points:
        ys.append(max(seconds, ys[-1]) if ys else seconds)  # more bytes never take less time
    if moved >= xs[-1]:
        return ys[-1] + (moved - xs[-1]) / cost.bandwidth
    if moved <= xs[0]:
        return ys[0]
    right = next(i for i, x in enumerate(xs) if x >= moved)
    share = (moved - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])
