"""What a cluster can do, measured or given: `Cluster`, and the file ``link.json`` that holds one.

A *level* is a set of links of one kind: those ``inside`` a node, and those ``across`` nodes. Bandwidths are bytes a
second that one rank sends while all others do the same, so a node's link is worth ``ranks_per_node`` times as much.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from fedq.errors import FieldError, one_of
from fedq.files import replace_file

SCHEMA_VERSION = 1
COLLECTIVES = ("all_reduce_float32", "all_reduce_bfloat16", "exchange", "broadcast", "gather")


def moved_nbytes(collective: str, nbytes: float, ranks: int) -> float:
    """Return the bytes that the busiest rank moves in one direction.

    Args:
        collective: One of `COLLECTIVES`.
        nbytes: Bytes of the buffer; for ``exchange`` and ``gather`` bytes of the message to, or from, each other rank.
        ranks: Number of ranks that take part.
    """
    if collective.startswith("all_reduce"):
        return 2 * (ranks - 1) / ranks * nbytes
    return nbytes if collective == "broadcast" else (ranks - 1) * nbytes


@dataclass(frozen=True)
class Cost:
    """What a collective costs on a level: ``steps · latency_s + moved bytes / bandwidth``.

    Args:
        latency_s: Seconds of latency of one step; the number of ranks gives the number of steps.
        bandwidth: Bytes a second that the busiest rank moves in one direction.
        cpu_s_per_byte: Processor seconds of a rank for each of these bytes.
        ranks: Number of ranks that took part when it was measured; 0: it was not measured.
        points: Measured points: bytes of the message, bytes moved by the busiest rank, and seconds.
    """

    latency_s: float
    bandwidth: float
    cpu_s_per_byte: float = 0.0
    ranks: int = 0
    points: tuple[tuple[int, float, float], ...] = ()


@dataclass(frozen=True)
class Level:
    """Links of one kind.

    Args:
        latency_s: Seconds of a small message from rank to rank.
        bandwidth: Bytes a second of a rank in the fastest collective.
        message_s: Seconds that each further message of an exchange takes.
        burst_bytes: Bytes that pass at ``burst_bandwidth`` after a rest (a token bucket); 0: none.
        burst_bandwidth: Bytes a second during a burst.
        collectives: Cost of each collective by name; one that is missing costs ``latency_s`` and ``bandwidth``.
        slower_s_per_byte: Seconds added to the time of every byte, where a measured level was given another bandwidth.
    """

    latency_s: float
    bandwidth: float
    message_s: float = 0.0
    burst_bytes: float = 0.0
    burst_bandwidth: float = math.inf
    collectives: Mapping[str, Cost] = field(default_factory=dict)
    slower_s_per_byte: float = 0.0

    def with_bandwidth(self, bandwidth: float) -> Level:
        """Return the level with another bandwidth; what software adds to the wire's time stays."""
        slower = self.slower_s_per_byte + 1 / bandwidth - 1 / self.bandwidth
        return replace(self, bandwidth=bandwidth, slower_s_per_byte=slower)

    def cost(self, collective: str) -> Cost:
        """Return what a collective costs."""
        plain = Cost(self.latency_s, 1 / (1 / self.bandwidth - self.slower_s_per_byte))
        return self.collectives.get(collective, plain)


@dataclass(frozen=True)
class CodecSpeed:
    """Seconds of a codec's passes, for each byte of float32 and for each call, when all ranks of a node work at once.

    Of a cast that is summed on the way (``fp32``, ``bf16``) encode is division and cast, decode the copy back. Of
    PowerSGD, encode is all arithmetic of a step, and a call is a matrix.

    Args:
        encode_s_per_byte: Seconds of encoding a byte without residual.
        encode_residual_s_per_byte: Seconds of encoding a byte with residual.
        encode_call_s: Seconds of a call that encodes, with or without residual.
        reduce_s_per_byte: Seconds of summing, for each byte of each payload.
        reduce_call_s: Seconds of a call that sums.
        decode_s_per_byte: Seconds of decoding a byte of the second leg's payloads.
        decode_call_s: Seconds of a call that decodes.
    """

    encode_s_per_byte: float
    encode_residual_s_per_byte: float
    encode_call_s: float
    reduce_s_per_byte: float
    reduce_call_s: float
    decode_s_per_byte: float
    decode_call_s: float


@dataclass(frozen=True)
class Cluster:
    """Ranks, links and codecs.

    Args:
        world_size: Number of ranks.
        ranks_per_node: Number of ranks on each node.
        backend: ``gloo`` or ``nccl``.
        device: ``cpu`` or ``cuda``.
        hosts: Names of the machines; empty if the cluster is given by numbers alone.
        cores: Processors of a node that its ranks may use; 0: unknown, and then nothing runs beside anything.
        threads: Threads of a rank.
        memory_bandwidth: Bytes a second that a copy reads (it writes as many).
        small_tensor_s: Seconds of gathering and scattering one small exempt tensor (a bias) in a message.
        inside: Links inside a node; None with one rank a node.
        across: Links across nodes; None with one node.
        codecs: Speed of each codec by its spec.
        codecs_from: Source of the speeds, in words.
    """

    world_size: int
    ranks_per_node: int
    backend: str
    device: str
    hosts: tuple[str, ...]
    cores: int
    threads: int
    memory_bandwidth: float
    small_tensor_s: float
    inside: Level | None
    across: Level | None
    codecs: Mapping[str, CodecSpeed]
    codecs_from: str

    @property
    def num_nodes(self) -> int:
        """Nodes."""
        return self.world_size // self.ranks_per_node

    @property
    def bottleneck(self) -> str:
        """The level whose bandwidth decides whether compression pays: ``across`` where there are several nodes."""
        return "across" if self.num_nodes > 1 else "inside"

    @property
    def ranks_per_link(self) -> int:
        """Ranks that share one of the links of that level."""
        return self.ranks_per_node if self.bottleneck == "across" else 1

    @property
    def bandwidth(self) -> float:
        """Bytes a second a rank on the level that decides."""
        level = self.across if self.bottleneck == "across" else self.inside
        return math.inf if level is None else level.bandwidth

    def with_bandwidth(self, bandwidth: float) -> Cluster:
        """Return the cluster with another bandwidth on the level that decides."""
        if self.bottleneck == "across":
            return replace(self, across=self.across and self.across.with_bandwidth(bandwidth))
        return replace(self, inside=self.inside and self.inside.with_bandwidth(bandwidth))

    def save(self, path: Path) -> None:
        """Write ``link.json`` in one step."""
        tree = {"schema_version": SCHEMA_VERSION} | asdict(self)
        replace_file(path, (json.dumps(_finite(tree), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Cluster:
        """Read ``link.json``.

        Raises:
            FieldError: The file cannot be read, has another version, or a key or value that does not fit.
        """
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FieldError("link", str(path), f"a file that `fedq probe` wrote ({error})") from None
        if not isinstance(tree, dict) or tree.pop("schema_version", None) != SCHEMA_VERSION:
            raise FieldError("link", str(path), f"a file that `fedq probe` wrote, of schema_version {SCHEMA_VERSION}")
        cluster = _read(cls, tree, f"{path}: ")
        _check(cluster, path)
        return cluster


def _check(cluster: Cluster, path: Path) -> None:
    """Refuse numbers that no cluster has."""
    size, each = cluster.world_size, cluster.ranks_per_node
    if size < 1 or each < 1 or size % each:
        raise FieldError(f"{path}: ranks_per_node", each, f"a divisor of world_size, {size}")
    for name, level, has_some in (
        ("inside", cluster.inside, each > 1),
        ("across", cluster.across, cluster.num_nodes > 1),
    ):
        if (level is None) == has_some:
            raise FieldError(f"{path}: {name}", level, f"a level exactly where there are such links ({size}, {each})")
        if level and not (0 < level.bandwidth < math.inf and 0 <= level.latency_s < math.inf):
            value = (level.bandwidth, level.latency_s)
            raise FieldError(f"{path}: {name}", value, "a bandwidth above 0 and a latency of 0 or more")


def _finite(tree: Any) -> Any:
    """Return a tree in which what JSON cannot say, an infinite number, is null."""
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and math.isinf(tree) else tree


def _read(kind: Any, tree: Any, place: str) -> Any:
    """Return a value of a type from plain values, strictly.

    Raises:
        FieldError: A key is missing or unknown, or a value has another type; the message names it.
    """
    arguments = get_args(kind)
    if NoneType in arguments:
        return None if tree is None else _read(arguments[0], tree, place)
    origin = get_origin(kind)
    if origin is tuple:
        inner = arguments[0] if arguments[-1] is Ellipsis else None
        _expect(isinstance(tree, list) and (inner is not None or len(tree) == len(arguments)), place, tree, "a list")
        return tuple(_read(inner or arguments[i], value, f"{place}[{i}]") for i, value in enumerate(tree))
    if origin is not None:  # a mapping of names
        _expect(isinstance(tree, dict), place, tree, "an object")
        return {name: _read(arguments[1], value, f"{place}.{name}") for name, value in tree.items()}
    if kind in (int, float, str):
        return _scalar(kind, tree, place)
    _expect(isinstance(tree, dict), place, tree, "an object")
    hints = get_type_hints(kind)
    for name in tree:
        _expect(name in hints, f"{place}.{name}", tree[name], f"only the keys {one_of(hints, name)}")
    for name in (f.name for f in fields(kind)):
        _expect(name in tree, f"{place}.{name}", None, "a value: the key is missing")
    return kind(**{name: _read(hints[name], value, f"{place}.{name}") for name, value in tree.items()})


def _scalar(kind: type, value: Any, place: str) -> Any:
    if kind is float and value is None:
        return math.inf
    accepted = (int, float) if kind is float else (kind,)
    _expect(
        type(value) in accepted and value == value,
        place,
        value,
        {int: "a whole number", str: "text"}.get(kind, "a number"),
    )
    return kind(value)


def _expect(holds: bool, place: str, value: Any, allowed: str) -> None:
    if not holds:
        raise FieldError(place.replace(": .", ": "), value, allowed)
