"""What a step of data-parallel training would cost: bytes, seconds and break-even bandwidth of every codec."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from fedq.codecs import Codec, codec
from fedq.errors import FieldError, one_of
from fedq.hooks import PowerSGDExchange, StepState, is_powersgd
from fedq.hooks.powersgd_options import PowerSGDOptions
from fedq.planning.cluster import Cluster, CodecSpeed
from fedq.planning.network import Network, Work
from fedq.planning.timeline import Played, play
from fedq.planning.traffic import Fan, Hierarchy, Part, Shapes, Traffic, to_everyone, to_owners

CODECS = ("fp32", "bf16", "int8", "int4", "int2", "sign", "blocktopk:k=1,block=64,bits=2", "powersgd:rank=2")
"""Specs of the codecs that are compared unless others are named."""
BASELINES = ("fp32", "bf16")
_BACKWARD = 2 / 3
"""Share of a step's computation that is the backward pass: two multiplications of matrices of three."""
_SLOWEST, _FASTEST, _HALVINGS = 1e2, 1e13, 34
"""Bytes a second between which a break-even bandwidth is looked for, and halvings of that range."""
Request = Callable[[Network], Work]


@dataclass(frozen=True)
class Job:
    """What is trained, and how long that takes without any exchange.

    Args:
        shapes: The model, without values.
        compute_s: Seconds of a step's computation, when all ranks compute at once.
        overlaps: Whether buckets are exchanged while the backward pass goes on.
    """

    shapes: Shapes
    compute_s: float
    overlaps: bool = True


@dataclass(frozen=True)
class Prediction:
    """A way to exchange, and what it would cost.

    Args:
        codec: Spec of the codec.
        schedule: Schedule of the exchange.
        bytes_per_rank: Bytes that a rank hands to the process group in a step; mean over ranks.
        most_bytes_of_a_rank: Bytes that the rank that sends most hands to it.
        link_bytes: Bytes over the busiest of the links that decide (of a node, where there are several nodes), in its
            busier direction.
        seconds: Seconds of a step.
        exposed_s: Seconds of a step above computation alone.
        hidden_s: Seconds of exchange that computation hides.
        coding_s: Seconds of encode, reduce and decode in a step.
        speedup: Seconds of the faster of the baselines ``fp32`` and ``bf16`` over those of this step.
        break_even: Bandwidth, bytes a second a rank, below which it is faster than each baseline; 0: never,
            infinity: always.
    """

    codec: str
    schedule: str
    bytes_per_rank: float
    most_bytes_of_a_rank: int
    link_bytes: float
    seconds: float
    exposed_s: float
    hidden_s: float
    coding_s: float
    speedup: float
    break_even: dict[str, float]


class StepModel:
    """The time of a step as a function of the cluster's links.

    Args:
        job: The model, and how long its computation takes.
        cluster: The cluster that runs the job, with the speed of its codecs.
        spec: Codec of the first leg, or PowerSGD.
        second: Codec of the second leg; default: the same.
        schedule: Schedule of the exchange, see `fedq.collectives.compressed_mean`.

    Raises:
        FieldError: A codec or schedule cannot be used, or the speed of a codec is not known.
    """

    def __init__(
        self, job: Job, cluster: Cluster, spec: str, *, second: str | None = None, schedule: str = "auto"
    ) -> None:
        self.job, self.cluster, self.spec = job, cluster, spec
        self.traffic = Traffic.of(
            job.shapes,
            spec,
            cluster.world_size,
            ranks_per_node=cluster.ranks_per_node if cluster.num_nodes > 1 else 1,
            second=None if is_powersgd(spec) else second,
            schedule=schedule,
        )
        self._seconds_at: dict[float, float] = {}
        self._demand = demand_of_ranks(cluster)
        copies = 2 * 4 * job.shapes.numel / cluster.memory_bandwidth  # into DDP's buckets, and out of them
        self._compute = Work(job.compute_s + copies * (cluster.world_size > 1), self._demand)
        self._requests = [(self._ready(part), self._requests_of(part)) for part in self.traffic.parts]

    def play(self, cluster: Cluster | None = None) -> Played:
        """Return a step on the cluster, or on one with other links."""
        if self.cluster.world_size == 1:
            return play(self._compute, [])
        network = Network(cluster or self.cluster)
        return play(self._compute, [(ready, [r(network) for r in requests]) for ready, requests in self._requests])

    def seconds_at(self, bandwidth: float) -> float:
        """Return the seconds of a step where the links that decide have another bandwidth."""
        if bandwidth not in self._seconds_at:
            self._seconds_at[bandwidth] = self.play(self.cluster.with_bandwidth(bandwidth)).seconds
        return self._seconds_at[bandwidth]

    @cached_property
    def works(self) -> list[Work]:
        """All that an exchange of a step consists of."""
        network = Network(self.cluster)
        return [request(network) for _, requests in self._requests for request in requests]

    def _ready(self, part: Part) -> float:
        share = part.ready if self.job.overlaps else 1.0
        return self._compute.seconds * (1 - _BACKWARD * (1 - share))

    def _requests_of(self, part: Part) -> list[Request]:
        if isinstance(self.traffic.exchange, PowerSGDExchange):
            return self._of_powersgd(self.traffic.exchange)
        if self.traffic.is_whole_cast:
            return self._of_cast(part)
        return {
            "reduce": self._of_sum,
            "one_phase": self._of_one_phase,
            "two_phase": self._of_two_phase,
            "hierarchical": self._of_hierarchical,
        }[self.traffic.schedule](part)

    # ---- schedules -----------------------------------------------------------------------------------------------

    def _of_powersgd(self, exchange: PowerSGDExchange) -> list[Request]:
        speed = speed_of(self.cluster, self.spec)
        num_matrices = sum(part == "codes" for _, part, _ in exchange.makeup("second"))
        seconds = 4 * self.job.shapes.numel * speed.encode_s_per_byte + num_matrices * speed.encode_call_s
        sums = [nbytes for leg in self.traffic.messages for nbytes in leg if nbytes]
        return [self._coding(seconds), *(_all_reduce(nbytes, "float32") for nbytes in sums)]

    def _of_cast(self, part: Part) -> list[Request]:
        (name, *_) = self._codecs
        speed, nbytes = speed_of(self.cluster, name.spec), sum(s.nbytes["first"] for s in part.segments)
        return [
            self._coding(4 * part.numel * speed.encode_s_per_byte + speed.encode_call_s),
            _all_reduce(nbytes, "float32" if name.spec == "fp32" else "bfloat16"),
            self._coding(4 * part.numel * speed.decode_s_per_byte + speed.decode_call_s),
        ]

    def _of_sum(self, part: Part) -> list[Request]:
        nbytes = sum(segment.nbytes["first"] for segment in part.segments)
        return [
            self._encode(part, 0, part.numel, part.num_coded),
            _all_reduce(nbytes, "float32"),
            self._decode(part, 0),
        ]

    def _of_one_phase(self, part: Part) -> list[Request]:
        nbytes = sum(segment.nbytes["first"] for segment in part.segments)
        fan = to_everyone(nbytes, self.cluster.world_size, self.cluster.ranks_per_node)
        ranks = self.traffic.world_size
        return [
            self._encode(part, 0, part.numel, part.num_coded),
            partial(_exchange, fan),
            self._sum(part, ranks, part.numel, part.num_coded),
        ]

    def _of_two_phase(self, part: Part) -> list[Request]:
        ranks, each = self.cluster.world_size, self.cluster.ranks_per_node
        legs = [to_owners(part.segments, leg, ranks, each) for leg in ("first", "second")]  # type: ignore[arg-type]
        owned, calls = part.numel_owned, min(part.num_coded, part.num_coded_owned)
        return [
            self._encode(part, 0, part.numel, part.num_coded),
            partial(_exchange, legs[0]),
            self._sum(part, ranks, owned, calls),
            self._encode(part, 1, owned, calls),
            partial(_exchange, legs[1]),
            self._decode(part, 1),
        ]

    def _of_hierarchical(self, part: Part) -> list[Request]:
        """Inside in float32, across in two phases between ranks in the same place, inside again."""
        ranks, each = self.cluster.world_size, self.cluster.ranks_per_node
        way = Hierarchy.of(part.segments, ranks, each)
        return [
            partial(_exchange, way.inside),
            self._sum(part, each, way.numel_of_place, way.num_of_place),
            self._encode(part, 0, way.numel_of_place, way.num_of_place),
            partial(_exchange, way.to_owners),
            self._sum(part, ranks // each, way.numel_owned, way.num_owned),
            self._encode(part, 1, way.numel_owned, way.num_owned),
            partial(_exchange, way.to_place),
            partial(_exchange, way.shared),
            self._decode(part, 1),
        ]

    # ---- passes over memory --------------------------------------------------------------------------------------

    @property
    def _codecs(self) -> tuple[Codec, Codec]:
        assert isinstance(self.traffic.exchange, StepState)
        return self.traffic.exchange.codecs

    def _coding(self, seconds: float) -> Request:
        work = Work(seconds, self._demand, is_coding=True)
        return lambda network: work

    def _encode(self, part: Part, leg: int, numel: int, calls: int) -> Request:
        chosen = self._codecs[leg]
        speed = speed_of(self.cluster, chosen.spec)
        keeps = self.traffic.exchange.feedback and chosen.wants_feedback
        per_byte = speed.encode_residual_s_per_byte if keeps else speed.encode_s_per_byte
        return self._coding(4 * numel * per_byte + calls * speed.encode_call_s + self._small(part))

    def _sum(self, part: Part, num: int, numel: int, calls: int) -> Request:
        speed = speed_of(self.cluster, self._codecs[0].spec)
        seconds = num * 4 * numel * speed.reduce_s_per_byte + calls * speed.reduce_call_s + self._small(part)
        return self._coding(seconds)

    def _decode(self, part: Part, leg: int) -> Request:
        speed = speed_of(self.cluster, self._codecs[leg].spec)
        seconds = 4 * part.numel * speed.decode_s_per_byte + part.num_coded * speed.decode_call_s + self._small(part)
        return self._coding(seconds)

    def _small(self, part: Part) -> float:
        return part.num_small * self.cluster.small_tensor_s


def demand_of_ranks(cluster: Cluster) -> float:
    """Return the share of a node's processors that its ranks' computation keeps busy; all of a GPU."""
    if cluster.device != "cpu" or not cluster.cores:
        return 1.0
    return min(1.0, cluster.ranks_per_node * cluster.threads / cluster.cores)


def speed_of(cluster: Cluster, spec: str) -> CodecSpeed:
    """Return the speed of a codec; of one with other options if there is no other.

    Raises:
        FieldError: The codec's speed is not known.
    """
    name = speed_name(spec)
    if name in cluster.codecs:
        return cluster.codecs[name]
    alike = [speed for other, speed in cluster.codecs.items() if other.split(":")[0] == name.split(":")[0]]
    if not alike or is_powersgd(spec):
        known = one_of(cluster.codecs, name)
        raise FieldError("codec", spec, f"one whose speed is known ({known}); `fedq probe --codecs` measures others")
    return alike[0]


def speed_name(spec: str) -> str:
    """Return the name under which the speed of a codec is kept, however its spec is written."""
    if is_powersgd(spec):
        return f"powersgd:rank={PowerSGDOptions.parse(spec).rank}"
    return codec(spec).resolved(feedback=True).spec


def predict_steps(
    job: Job,
    cluster: Cluster,
    specs: Sequence[str] = CODECS,
    *,
    second: str | None = None,
    schedules: Sequence[str] | None = None,
) -> list[Prediction]:
    """Predict every codec by every schedule that it can have, the fastest first.

    Args:
        job: The model, and how long its computation takes.
        cluster: The cluster that runs the job, with the speed of its codecs.
        specs: Specs of the codecs; the baselines are added.
        second: Codec of the second leg; default: the same as of the first.
        schedules: Schedules to predict; default: all that fit the codec.
    """
    names = [*BASELINES, *(spec for spec in specs if spec not in BASELINES)]
    models = [
        StepModel(job, cluster, spec, second=second if schedule != "reduce" else None, schedule=schedule)
        for spec in names
        for schedule in _schedules_of(spec, cluster, schedules)
    ]
    baselines = {model.spec: model for model in models if model.spec in BASELINES}
    best = min(model.play().seconds for model in baselines.values())
    found = [_prediction(model, best, baselines) for model in models if model.spec in BASELINES or model.spec in specs]
    return sorted(found, key=lambda row: (row.seconds, row.bytes_per_rank))


def _schedules_of(spec: str, cluster: Cluster, wanted: Sequence[str] | None) -> list[str]:
    if is_powersgd(spec):
        return ["auto"]
    if spec in BASELINES or spec == "fp16":
        return ["reduce"]
    fits = ["one_phase"]
    if cluster.world_size > 2 or (wanted and "two_phase" in wanted):
        fits.append("two_phase")
    if cluster.num_nodes > 1 and cluster.ranks_per_node > 1:
        fits.append("hierarchical")
    return [schedule for schedule in fits if wanted is None or schedule in wanted]


def _prediction(model: StepModel, best_s: float, baselines: dict[str, StepModel]) -> Prediction:
    played, sent = model.play(), model.traffic.sent.sum(axis=1)
    return Prediction(
        codec=model.spec,
        schedule=model.traffic.schedule,
        bytes_per_rank=float(sent.mean()),
        most_bytes_of_a_rank=int(sent.max()),
        link_bytes=model.cluster.ranks_per_link * sum(work.wire_bytes for work in model.works),
        seconds=played.seconds,
        exposed_s=played.exposed_s,
        hidden_s=played.hidden_s,
        coding_s=sum(work.seconds for work in model.works if work.is_coding),
        speedup=best_s / played.seconds,
        break_even={
            name: break_even(model.seconds_at, base.seconds_at) if model.cluster.world_size > 1 else 0.0
            for name, base in baselines.items()
            if base is not model
        },
    )


def break_even(seconds_at: Callable[[float], float], baseline_at: Callable[[float], float]) -> float:
    """Return the bandwidth, bytes a second a rank, below which the first takes less time than the second.

    Returns:
        0 if the first never takes less time, infinity if it always does.
    """

    def wins(bandwidth: float) -> bool:
        return seconds_at(bandwidth) < baseline_at(bandwidth)

    if not wins(_SLOWEST):
        return 0.0
    if wins(_FASTEST):
        return math.inf
    low, high = math.log(_SLOWEST), math.log(_FASTEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if wins(math.exp(middle)) else (low, middle)
    return math.exp(low)


def _all_reduce(nbytes: float, value_type: str) -> Request:
    return lambda network: network.all_reduce(nbytes, value_type)


def _exchange(fan: Fan, network: Network) -> Work:
    return network.exchange(fan)
