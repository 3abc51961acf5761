"""What a federated round would cost: clients' messages, bytes at rank 0, seconds, break-even bandwidth.

Ranks train the cohort's clients one after another. Messages are those of `fedq.wire` over the model's `Layout`; who
owns what under ``two_phase`` is decided by `fedq.federated.two_phase.deal`, as in a real job.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedq.codecs import codec, codec_schedule
from fedq.errors import FieldError
from fedq.federated.two_phase import deal
from fedq.layout import Layout, LayoutSchedule
from fedq.planning.cluster import Cluster, Level
from fedq.planning.network import Network
from fedq.planning.step import BASELINES, break_even, speed_of
from fedq.planning.traffic import Fan, Shapes
from fedq.wire import HEADER_NBYTES

ROUND_CODECS = ("fp32", "bf16", "int8", "int4", "int2", "sign", "blocktopk:k=1,block=64,bits=2")
AGGREGATES = ("rooted", "two_phase")
_SIZE_NBYTES = 8
"""Bytes of the size that goes in front of a message that is gathered or broadcast."""


@dataclass(frozen=True)
class RoundJob:
    """What is trained in a round.

    Args:
        shapes: The model, without values.
        num_clients: Number of clients of the federation.
        cohort: Number of clients sampled in each round.
        local_steps: Optimizer steps of a client in a round.
        compute_s: Seconds of one such step.
        downlink: Codec of the server's change.
    """

    shapes: Shapes
    num_clients: int
    cohort: int
    local_steps: int
    compute_s: float
    downlink: str = "int8"


@dataclass(frozen=True)
class RoundPrediction:
    """A way to exchange, and what it would cost.

    Args:
        codec: Spec of the uplink's codec.
        aggregate: Place of the server: ``rooted`` (rank 0) or ``two_phase`` (spread over the ranks).
        uplink_bytes: Bytes of one client's message.
        downlink_bytes: Bytes of one change that the server sends.
        download_bytes: Bytes that a sampled client fetches, on average: the changes since its last round, or the model.
        root_bytes: Bytes that rank 0 receives in a round.
        most_bytes_received: Bytes that the rank that receives most receives in a round.
        seconds: Seconds of a round.
        exchange_s: Seconds of a round in which messages travel, both ways.
        coding_s: Seconds of a round for coding and averaging.
        speedup: Seconds of the faster of the baselines ``fp32`` and ``bf16`` over those of this round.
        break_even: Break-even bandwidth by baseline, see `fedq.planning.step.Prediction`.
    """

    codec: str
    aggregate: str
    uplink_bytes: int
    downlink_bytes: int
    download_bytes: float
    root_bytes: float
    most_bytes_received: float
    seconds: float
    exchange_s: float
    coding_s: float
    speedup: float
    break_even: dict[str, float]


class RoundModel:
    """The time of a round as a function of the cluster's links.

    Args:
        job: The model, the clients and their work in a round.
        cluster: The cluster that runs the job.
        spec: Codec of the uplink.
        aggregate: Place of the server: ``rooted`` (rank 0) or ``two_phase`` (spread over the ranks).

    Raises:
        FieldError: The codec has no fixed size, or its speed is not known; or the cohort is not 1 to all clients.
    """

    def __init__(self, job: RoundJob, cluster: Cluster, spec: str, aggregate: str) -> None:
        if not 1 <= job.cohort <= job.num_clients:
            raise FieldError("cohort", job.cohort, f"1 to {job.num_clients}, the number of clients")
        self.job, self.cluster, self.spec, self.aggregate = job, cluster, spec, aggregate
        feedback = any(c.wants_feedback for _, c in codec_schedule(spec))
        self.uplink = LayoutSchedule.of(job.shapes.module, spec, feedback=feedback).at(0)
        self.downlink = Layout.of(job.shapes.module, codec(job.downlink).resolved(feedback=True))
        sizes = [layout.fixed_nbytes for layout in (self.uplink, self.downlink)]
        if None in sizes:
            raise FieldError("codec", spec, "one whose payload size follows from the shape alone")
        self._body_up, self._body_down = (size or 0 for size in sizes)
        self.per_rank = math.ceil(job.cohort / cluster.world_size)
        """Number of clients that the busiest rank trains."""
        self.away = job.cohort - self.per_rank
        """Number of messages that rank 0 does not have itself."""
        self.owned = deal(self.uplink, cluster.world_size) if aggregate == "two_phase" else []
        self._seconds_at: dict[float, float] = {}

    @property
    def uplink_nbytes(self) -> int:
        """Bytes of one client's message."""
        return HEADER_NBYTES + self._body_up

    @property
    def downlink_nbytes(self) -> int:
        """Bytes of one change."""
        return HEADER_NBYTES + self._body_down

    @property
    def download_nbytes(self) -> float:
        """Bytes that a sampled client fetches: by the ``cohort`` rule of the downlink, all changes that it missed."""
        missed = self.job.num_clients / self.job.cohort
        return min(missed * self.downlink_nbytes, 4.0 * self.uplink.numel)

    def received(self) -> tuple[float, float]:
        """Return the bytes of messages that rank 0 receives in a round, and those of the rank that receives most."""
        ranks = self.cluster.world_size
        if ranks == 1:
            return 0.0, 0.0
        if self.aggregate == "rooted":
            root = self.away * (self.uplink_nbytes + _SIZE_NBYTES)
            return root, max(root, self.downlink_nbytes + _SIZE_NBYTES)
        shares = [
            self.away * (HEADER_NBYTES + self._share(self.uplink, numbers))
            + self._body_down
            - self._share(self.downlink, numbers)
            for numbers in self.owned
        ]
        return shares[0], max(shares)

    def parts(self, cluster: Cluster | None = None) -> tuple[float, float, float]:
        """Return a round's seconds of training, of messages, and of coding and averaging."""
        cluster = cluster or self.cluster
        training = self.per_rank * self.job.local_steps * self.job.compute_s
        coding = self._coding_s()
        return training, (self._exchange_s(cluster) if cluster.world_size > 1 else 0.0), coding

    def seconds_at(self, bandwidth: float) -> float:
        """Return the seconds of a round where the links that decide have another bandwidth."""
        if bandwidth not in self._seconds_at:
            self._seconds_at[bandwidth] = sum(self.parts(self.cluster.with_bandwidth(bandwidth)))
        return self._seconds_at[bandwidth]

    def _share(self, layout: Layout, numbers: Sequence[int]) -> int:
        return sum(layout.spans[n].codec.payload_nbytes(layout.spans[n].shape) for n in numbers)

    def _exchange_s(self, cluster: Cluster) -> float:
        network, ranks, each = Network(without_bursts(cluster)), cluster.world_size, cluster.ranks_per_node
        if self.aggregate == "rooted":
            message = self.uplink_nbytes + _SIZE_NBYTES
            inside = self.away * (each - 1) / max(1, ranks - 1)
            gathered = network.gather((self.away - inside) * message, inside * message, min(self.away, ranks - 1))
            return gathered.seconds + network.broadcast(self.downlink_nbytes + _SIZE_NBYTES).seconds
        headers = [self.per_rank * HEADER_NBYTES] * ranks
        up = [self.per_rank * self._share(self.uplink, numbers) for numbers in self.owned]
        down = [self._share(self.downlink, numbers) for numbers in self.owned]
        return sum(network.exchange(_fan(sizes, each)).seconds for sizes in (headers, up, down))

    def _coding_s(self) -> float:
        """Clients encode one after another; servers decode the cohort, encode the change; all decode that."""
        up, down = speed_of(self.cluster, self.spec), speed_of(self.cluster, self.job.downlink)
        nbytes, calls = 4 * self.uplink.numel, len(self.uplink.spans)
        share = 1.0
        if self.aggregate == "two_phase":
            share = max(sum(self.uplink.spans[n].numel for n in numbers) for numbers in self.owned) / self.uplink.numel
        encode = self.per_rank * (nbytes * up.encode_residual_s_per_byte + calls * up.encode_call_s)
        average = self.job.cohort * (nbytes * share * up.reduce_s_per_byte + calls * share * up.reduce_call_s)
        change = share * (nbytes * down.encode_residual_s_per_byte + calls * down.encode_call_s)
        apply = nbytes * down.decode_s_per_byte + calls * down.decode_call_s
        flatten = self.per_rank * 4 * nbytes / self.cluster.memory_bandwidth  # in and out of the model, difference
        return encode + average + change + apply + flatten


def _fan(sizes: Sequence[float], each: int) -> Fan:
    """Return the exchange in which all send each rank so many bytes, or each rank so many to all."""
    outside = len(sizes) - each
    of_nodes = [sum(sizes[first : first + each]) for first in range(0, len(sizes), each)]
    return Fan(max(of_nodes) * outside / each, max(sizes) * (each - 1), outside, each - 1)


def without_bursts(cluster: Cluster) -> Cluster:
    """Return the cluster as a round sees it, whose messages are far larger than what a link saves up."""

    def plain(level: Level | None) -> Level | None:
        return level and replace(level, burst_bytes=0.0)

    return replace(cluster, inside=plain(cluster.inside), across=plain(cluster.across))


def predict_rounds(
    job: RoundJob,
    cluster: Cluster,
    specs: Sequence[str] = ROUND_CODECS,
    aggregates: Sequence[str] = AGGREGATES,
    *,
    is_downlink_given: bool = False,
) -> list[RoundPrediction]:
    """Predict every codec with a server on rank 0 and with one spread over the ranks, the fastest first.

    Args:
        job: The model, the clients and their work in a round.
        cluster: The cluster that runs the job.
        specs: Specs of the uplink's codecs; the baselines are added.
        aggregates: Places of the server to predict, see `RoundModel`; on a single rank only ``rooted``.
        is_downlink_given: Whether the baselines have the job's downlink too. By default their changes travel as their
            updates do, so that neither direction is compressed.
    """
    names = [*BASELINES, *(spec for spec in specs if spec not in BASELINES)]
    if cluster.world_size == 1:
        aggregates = ["rooted"]
    models = []
    for spec in names:
        told = job if is_downlink_given or spec not in BASELINES else replace(job, downlink=spec)
        models += [RoundModel(told, cluster, spec, aggregate) for aggregate in aggregates]
    baselines: dict[str, RoundModel] = {}
    for model in models:
        if model.spec in BASELINES:
            best = baselines.setdefault(model.spec, model)
            if sum(model.parts()) < sum(best.parts()):
                baselines[model.spec] = model
    fastest = min(sum(model.parts()) for model in baselines.values())
    found = [_prediction(model, fastest, baselines) for model in models]
    return sorted(found, key=lambda row: (row.seconds, row.uplink_bytes))


def _prediction(model: RoundModel, fastest: float, baselines: dict[str, RoundModel]) -> RoundPrediction:
    training, exchange, coding = model.parts()
    root, most = model.received()
    others = {name: base for name, base in baselines.items() if name != model.spec}
    return RoundPrediction(
        codec=model.spec,
        aggregate=model.aggregate,
        uplink_bytes=model.uplink_nbytes,
        downlink_bytes=model.downlink_nbytes,
        download_bytes=model.download_nbytes,
        root_bytes=root,
        most_bytes_received=most,
        seconds=training + exchange + coding,
        exchange_s=exchange,
        coding_s=coding,
        speedup=fastest / (training + exchange + coding),
        break_even={
            name: break_even(model.seconds_at, base.seconds_at) if model.cluster.world_size > 1 else 0.0
            for name, base in others.items()
        },
    )
