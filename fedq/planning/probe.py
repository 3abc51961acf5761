"""Measures a cluster over its real process group: what each collective costs, memory, and how fast codecs work.

Every time is that of the slowest rank, counted from a barrier to the moment when the last byte has arrived where it was
to go, so nothing is counted as sent that still lies in a buffer. Large messages come first, so that a link that lets a
burst pass after a rest has none left when the smaller ones are timed; the burst is measured by itself. What the ranks
of a node do at once (coding, copying) is measured while all of them do it.
"""

from __future__ import annotations

import datetime
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from fedq.codecs import Codec, codec
from fedq.codecs.dense import Cast
from fedq.collectives import Residuals, Transport, cut
from fedq.collectives.mean import encode
from fedq.collectives.peers import Peers
from fedq.errors import FieldError
from fedq.hooks import is_powersgd, make_exchange
from fedq.hooks.powersgd_options import PowerSGDOptions
from fedq.layout import exempt_codec
from fedq.planning.cluster import Cluster, CodecSpeed, Cost, Level, moved_nbytes
from fedq.planning.network import num_steps
from fedq.planning.step import BASELINES, speed_name
from fedq.runtime import Runtime

_SMALLEST, _LARGEST, _STEP = 1 << 10, 1 << 24, 4
"""Bytes that a rank moves in the smallest and in the largest measurement, and the factor between sizes."""
_FIRST_GUESS = 1 << 16
_MOST, _FEWEST = 11, 3
"""Most and fewest repetitions of a measurement."""
_REST_S, _RESTED_S, _RESTED_MOST, _RESTS = 0.4, 0.7, 3 << 19, 5
"""Seconds of rest before a burst is looked for; seconds' worth that is sent then, its most bytes; repetitions."""
_LEAST_SAVED, _MOST_SAVED = 0.08, 0.85
"""Shares of a message's time that a burst has to save at least, and of its bytes that it has to stay below."""
_SHARES = {"all_reduce_float32": 0.2, "all_reduce_bfloat16": 0.2, "exchange": 0.2, "broadcast": 0.1, "gather": 0.1}
"""Shares of the time budget for each collective; the rest is for codecs."""
_WARM_UP = 2
_BIG, _SMALL = (1 << 21,), (2304,) * 64
"""Elements of the timed tensors: whole segments, and the weights of small convolutions."""
_BIASES = (64,) * 64
_SUMMED = 4
"""Number of payloads in a timed sum."""
_MESSAGE_S = 20e-6
"""Seconds assumed for a further message where two ranks cannot tell."""


def measure(runtime: Runtime, specs: Sequence[str], *, budget_s: float = 60.0) -> Cluster:
    """Measure the cluster that runs this; every rank must call it.

    Args:
        runtime: This rank, in its process group.
        specs: Specs of the codecs; the casts ``fp32`` and ``bf16`` are added.
        budget_s: Seconds that the measurement may take, about.

    Returns:
        The measured cluster, the same on every rank.

    Raises:
        FieldError: Nodes have different numbers of ranks, or a codec does not exist.
    """
    names = list(dict.fromkeys([*BASELINES, *specs]))
    wanted = {speed_name(spec): spec for spec in names}
    told = _all(runtime, (socket.gethostname(), runtime.local_world_size, sorted(_processors())))
    sizes = sorted({size for _, size, _ in told})
    if len(sizes) > 1:
        raise FieldError("local_world_size", sizes, "the same number of ranks on every node")
    each = runtime.local_world_size
    clock = Clock(runtime)
    inside, across = _levels(runtime, clock, budget_s)
    share_s = (1 - sum(_SHARES.values())) * budget_s / len(wanted)
    speeds = {name: _speed(runtime, clock, spec, share_s) for name, spec in wanted.items()}
    return Cluster(
        world_size=runtime.world_size,
        ranks_per_node=each,
        backend=runtime.backend or "gloo",
        device=runtime.device.type,
        hosts=tuple(dict.fromkeys(host for host, *_ in told)),
        cores=len({number for _, _, numbers in told[:each] for number in numbers}),
        threads=torch.get_num_threads(),
        memory_bandwidth=_memory_bandwidth(runtime, clock),
        small_tensor_s=_small_tensor_s(runtime, clock),
        inside=inside,
        across=across,
        codecs={name: speed for name, speed in speeds.items() if speed is not None},
        codecs_from=f"measured on {told[0][0]}, {datetime.date.today().isoformat()}",
    )


def _processors() -> set[int]:
    """Return the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _all(runtime: Runtime, value: tuple) -> list[tuple]:
    """Return every rank's value."""
    values: list[tuple] = [value] * runtime.world_size
    if runtime.world_size > 1:
        dist.all_gather_object(values, value)
    return values


class Clock:
    """Times what all ranks do together.

    Args:
        runtime: This rank, in its process group.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._device = runtime.device if runtime.backend == "nccl" else torch.device("cpu")

    def barrier(self) -> None:
        """Wait for all ranks, and for the device."""
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        if self.runtime.world_size > 1:
            dist.barrier()

    def slowest(self, values: Sequence[float]) -> list[float]:
        """Return each value's maximum over ranks."""
        told = torch.tensor(values, dtype=torch.float64, device=self._device)
        if self.runtime.world_size > 1:
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return told.tolist()

    def once(self, work: Callable[[], object]) -> tuple[float, float]:
        """Return this rank's seconds, and processor seconds, from a barrier to the end."""
        self.barrier()
        begin, cpu = time.perf_counter(), time.process_time()
        work()
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, time.process_time() - cpu

    def median(self, work: Callable[[], object], share_s: float, most: int = _MOST) -> tuple[float, float]:
        """Return the median over repetitions of the slowest rank's seconds, and of processor seconds."""
        for _ in range(_WARM_UP - 1):
            work()
        (guess,) = self.slowest([self.once(work)[0]])
        num = int(min(most, max(_FEWEST, share_s / max(guess, 1e-6))))
        if guess > share_s:  # far beyond what was planned: that once has to do
            num = 1
        taken = [self.once(work) for _ in range(num)]
        seconds = self.slowest([seconds for seconds, _ in taken])
        cpu = self.slowest([cpu for _, cpu in taken])
        return statistics.median(seconds), statistics.median(cpu)


# ---- links ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Party:
    """Ranks that talk to each other over links of one kind, all such parties at once.

    Args:
        group: Process group of the collectives; None: all ranks.
        peers: Ranks that exchange messages with each other.
        ranks: Number of ranks in each collective.
        sharing: Number by which moved bytes are divided: the ranks of a node whose link the group's ring, tree or root
            has to itself.
        outside: Number of ranks whose messages come over these links to rank 0.
    """

    group: dist.ProcessGroup | None
    peers: Peers
    ranks: int
    sharing: int
    outside: int

    def moved(self, collective: str, nbytes: float) -> float:
        """Return the bytes that a rank moves over these links, its share where several have one link."""
        if collective == "exchange":
            return moved_nbytes(collective, nbytes, self.peers.size)
        if collective == "gather":
            return self.outside * nbytes / self.sharing
        return moved_nbytes(collective, nbytes, self.ranks) / self.sharing


def _levels(runtime: Runtime, clock: Clock, budget_s: float) -> tuple[Level | None, Level | None]:
    """Measure links inside nodes and across them, where there are such."""
    size, each = runtime.world_size, runtime.local_world_size
    if size == 1:
        return None, None
    nodes = size // each
    if nodes == 1:
        return _level(runtime, clock, Party(None, Peers(), size, 1, size - 1), budget_s), None
    node, place = divmod(runtime.rank, each)
    groups = [dist.new_group(list(range(n * each, (n + 1) * each))) for n in range(nodes)]
    own, inside = groups[node], None
    if each > 1:
        assert isinstance(own, dist.ProcessGroup), "this rank is a member"
        party = Party(own, Peers(own), each, 1, each - 1)
        inside = _level(runtime, clock, party, budget_s / 2)
    same_place = Peers(None, list(range(place, size, each)))
    return inside, _level(runtime, clock, Party(None, same_place, size, each, size - each), budget_s / (1 + (each > 1)))


def _level(runtime: Runtime, clock: Clock, party: Party, budget_s: float) -> Level:
    """Measure every collective, by falling size."""
    backend = runtime.backend or "gloo"
    costs = {}
    for name, share in _SHARES.items():
        points, cpu = _points(runtime, clock, party, name, share * budget_s)
        ranks = party.peers.size if name == "exchange" else party.ranks
        fixed, bandwidth = fit([(moved, seconds) for _, moved, seconds in points])
        if name == "broadcast":
            ranks = party.ranks // party.sharing
        costs[name] = Cost(fixed / num_steps(name, ranks, backend), bandwidth, cpu, ranks, tuple(points))
    message_s = _message_s(runtime, clock, party, costs["exchange"].points[0][2])
    num = party.peers.size - 1
    for name, count in (("exchange", num), ("gather", party.outside)):
        costs[name] = replace(costs[name], latency_s=max(0.0, costs[name].latency_s - count * message_s))
    # Not of gather and broadcast, whose root alone is busy.
    bandwidth = max(costs[name].bandwidth for name in ("all_reduce_float32", "all_reduce_bfloat16", "exchange"))
    level = Level(costs["exchange"].latency_s + message_s, bandwidth, message_s, collectives=costs)
    rest_s = min(_REST_S, budget_s / 20)
    burst_bytes, burst_bandwidth = _burst(runtime, clock, party, costs["exchange"], rest_s)
    return replace(level, burst_bytes=burst_bytes, burst_bandwidth=burst_bandwidth)


def _points(
    runtime: Runtime, clock: Clock, party: Party, name: str, share_s: float
) -> tuple[list[tuple[int, float, float]], float]:
    """Return message bytes, moved bytes and seconds by rising size, and processor seconds for each byte moved."""

    def message_nbytes(moved: float) -> int:
        return max(8, int(moved / party.moved(name, 1.0)) // 8 * 8)

    moved = float(_FIRST_GUESS)
    while moved < _LARGEST:
        (took,) = clock.slowest([clock.once(_collective(runtime, party, name, message_nbytes(moved)))[0]])
        if took * _STEP > share_s / (2 * _FEWEST):  # what passes at once after a rest is over in the first rounds
            break
        moved *= _STEP
    found: list[tuple[int, float, float]] = []
    cpu_per_byte = 0.0
    while moved >= _SMALLEST:
        nbytes = message_nbytes(moved)
        seconds, cpu = clock.median(_collective(runtime, party, name, nbytes), share_s / 4)
        found.append((nbytes, party.moved(name, nbytes), seconds))
        if not cpu_per_byte and runtime.backend == "gloo":
            cpu_per_byte = cpu / party.moved(name, nbytes)
        moved /= _STEP
    return found[::-1], cpu_per_byte


def _collective(runtime: Runtime, party: Party, name: str, nbytes: int) -> Callable[[], object]:
    """Return a collective that moves a message of so many bytes."""
    peers, wire = party.peers, runtime.device
    if name.startswith("all_reduce"):
        kind = torch.float32 if name.endswith("float32") else torch.bfloat16
        values = torch.zeros(nbytes // kind.itemsize, dtype=kind, device=wire)
        group = Peers(party.group)
        return lambda: group.all_reduce(values)
    message = torch.zeros(nbytes, dtype=torch.uint8, device=wire)
    if name == "exchange":
        return lambda: peers.exchange([message] * peers.size, [nbytes] * peers.size)
    transport = Transport(wire, party.group)
    if name == "broadcast":
        return lambda: transport.broadcast(message if transport.rank == 0 else None)
    return lambda: transport.gather([message], [1] * transport.world_size)


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return fixed seconds and bytes a second: the time of the smallest messages, and the slope up to the largest.

    Not least squares: where a burst passes after a rest, or caches end, the middle lies on no straight line.

    Args:
        points: Moved bytes and seconds of each measurement, by rising size.
    """
    (small, small_s), (large, large_s) = points[0], points[-1]
    fixed = min(seconds for _, seconds in points[:2])
    if large_s <= small_s * 1.1:  # latency alone, as far as can be seen
        return fixed, large / large_s
    return fixed, (large - small) / (large_s - small_s)


def _message_s(runtime: Runtime, clock: Clock, party: Party, all_s: float) -> float:
    """Return what each further message of an exchange costs: all against pairs."""
    size = party.peers.size
    if size < 3:
        return min(_MESSAGE_S, all_s / 4)
    place = party.peers.rank
    mates = [place - place % 2, place - place % 2 + 1]
    pair = Peers(party.group, [party.peers.members[m] for m in mates if m < size])
    pairs = replace(party, peers=pair)
    nbytes = max(8, _SMALLEST // (size - 1))
    pair_s = clock.median(_collective(runtime, pairs, "exchange", nbytes), 0.1)[0]
    return max(0.0, all_s - pair_s) / (size - 2)


def _burst(runtime: Runtime, clock: Clock, party: Party, cost: Cost, rest_s: float) -> tuple[float, float]:
    """Return the bytes that pass at a higher rate after a rest, and that rate; no bytes if there are no such.

    A token bucket that is full lets ``burst`` bytes pass before its rate counts, so a message after a rest takes
    ``burst · (1/rate - 1/faster rate)`` less than one after others.
    """
    moved = min(_RESTED_MOST, cost.bandwidth * _RESTED_S)
    nbytes = max(8, int(moved / party.moved("exchange", 1.0)))
    work = _collective(runtime, party, "exchange", nbytes)
    work()
    # Others on the machine only add time, so the least is the link's own.
    busy = min(clock.slowest([clock.once(work)[0] for _ in range(_FEWEST)]))
    quarter = max(8, nbytes // 4)
    small = _collective(runtime, party, "exchange", quarter)
    rested = min(_after_rest(clock, work, rest_s) for _ in range(_RESTS))
    quick = min(_after_rest(clock, small, rest_s) for _ in range(_RESTS))
    moved = party.moved("exchange", nbytes)
    faster = moved / 4 / quick
    saved = busy - rested
    if saved < _LEAST_SAVED * busy or faster < 2 * cost.bandwidth:
        return 0.0, cost.bandwidth
    burst = saved / (1 / cost.bandwidth - 1 / faster)
    # All of it at once is no token bucket: the network was merely quicker.
    return (burst, faster) if burst < _MOST_SAVED * moved else (0.0, cost.bandwidth)


def _after_rest(clock: Clock, work: Callable[[], object], rest_s: float) -> float:
    time.sleep(rest_s)
    return clock.slowest([clock.once(work)[0]])[0]


# ---- memory and codecs ---------------------------------------------------------------------------------------------


def _memory_bandwidth(runtime: Runtime, clock: Clock) -> float:
    source = torch.ones(1 << 23, device=runtime.device)
    target = torch.empty_like(source)
    return 4 * source.numel() / clock.median(lambda: target.copy_(source), 0.5)[0]


def _small_tensor_s(runtime: Runtime, clock: Clock) -> float:
    """Return the seconds that a bias adds to a pass."""
    coding = _Coding(runtime, exempt_codec(codec("int8")), _BIASES)
    return clock.median(coding.encode, 0.1)[0] / len(_BIASES)


class _Coding:
    """The passes of a codec over tensors of some sizes, as an exchange makes them.

    Args:
        runtime: This rank, in its process group.
        chosen: The codec.
        numels: Number of elements of each tensor.
    """

    def __init__(self, runtime: Runtime, chosen: Codec, numels: Sequence[int]) -> None:
        self._codec = chosen
        self._flat = torch.randn(sum(numels), device=runtime.device)
        self._segments = cut(numels, [(chosen, chosen)] * len(numels), range(len(numels)))
        self._residuals = Residuals() if chosen.wants_feedback else None
        self._payloads = [chosen.encode(self._flat[s.slice], seed=0) for s in self._segments]
        self._type = torch.bfloat16 if chosen.spec != "fp32" else torch.float32

    @property
    def num_calls(self) -> int:
        """Calls of a pass."""
        return len(self._segments)

    def encode(self) -> None:
        """Encode without residual."""
        encode(self._segments, "first", self._flat, 0, None)

    def encode_with_residual(self) -> None:
        """Encode with residual, where the codec has use for it."""
        encode(self._segments, "first", self._flat, 0, self._residuals)

    def reduce(self) -> None:
        """Sum payloads."""
        weights = [1 / _SUMMED] * _SUMMED
        for segment, payload in zip(self._segments, self._payloads, strict=True):
            self._codec.decode_sum([payload] * _SUMMED, weights, self._flat[segment.slice])

    def decode(self) -> None:
        """Decode one message and write its values."""
        for segment, payload in zip(self._segments, self._payloads, strict=True):
            self._flat[segment.slice] = payload.decode()

    def cast(self) -> None:
        """Divide, cast, and copy back."""
        self._flat.mul_(1.0)
        self._flat.copy_(self._flat.to(self._type))


def _speed(runtime: Runtime, clock: Clock, spec: str, share_s: float) -> CodecSpeed | None:
    """Measure a codec on large tensors and on many small ones: seconds for each byte, and for each call."""
    if is_powersgd(spec):
        return _powersgd_speed(runtime, clock, spec, share_s)
    chosen = codec(spec).resolved(feedback=True)
    big, small = _Coding(runtime, chosen, _BIG), _Coding(runtime, chosen, _SMALL)

    def line(name: str) -> tuple[float, float]:
        """Return seconds a byte and a call: two times, two equations."""
        large_s, small_s = (clock.median(getattr(of, name), share_s / 8)[0] for of in (big, small))
        nbytes, few, share = 4 * sum(_BIG), 4 * sum(_SMALL), big.num_calls / small.num_calls
        per_byte = max(0.0, (large_s - small_s * share) / (nbytes - few * share))
        return per_byte, max(0.0, small_s - few * per_byte) / small.num_calls

    if isinstance(chosen, Cast):
        half = clock.median(big.cast, share_s / 2)[0] / 2 / (4 * sum(_BIG))
        return CodecSpeed(half, half, 0.0, half, 0.0, half, 0.0)
    (plain, _), (kept, kept_call), (reduce, reduce_call), (decode, decode_call) = (
        line(name) for name in ("encode", "encode_with_residual", "reduce", "decode")
    )
    return CodecSpeed(plain, kept, kept_call, reduce / _SUMMED, reduce_call, decode, decode_call)


def _powersgd_speed(runtime: Runtime, clock: Clock, spec: str, share_s: float) -> CodecSpeed | None:
    """Measure PowerSGD's arithmetic: processor seconds of whole steps, whose messages are small; None on one rank."""
    if runtime.world_size == 1:
        return None
    options = PowerSGDOptions.parse(spec)
    sides = ((1024, 2048),), ((16, 144),) * 32
    seconds = []
    for shapes in sides:
        module = nn.ParameterList([nn.Parameter(torch.randn(shape, device=runtime.device)) for shape in shapes])
        for param in module:
            param.grad = torch.randn_like(param)
        exchange = make_exchange(module, Peers(), f"powersgd:rank={options.rank},start=2")
        for _ in range(3):
            exchange.average_gradients()
        wall, cpu = clock.median(exchange.average_gradients, share_s / 2)
        seconds.append(min(wall, cpu * _crowding(runtime)) if runtime.device.type == "cpu" else wall)
    nbytes = [4 * sum(rows * cols for rows, cols in shapes) for shapes in sides]
    calls = len(sides[1])
    per_byte = max(0.0, (seconds[0] - seconds[1] / calls) / (nbytes[0] - nbytes[1] / calls))
    call_s = max(0.0, seconds[1] - nbytes[1] * per_byte) / calls
    return CodecSpeed(per_byte, per_byte, call_s, 0.0, 0.0, 0.0, 0.0)


def _crowding(runtime: Runtime) -> float:
    """Return how much longer work takes when all ranks of the node do it at once than its processor seconds."""
    return max(1.0, runtime.local_world_size / len(_processors()))
