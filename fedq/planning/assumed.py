"""A cluster of which only numbers are given; the speed of codecs then stands in for one that was measured."""

from __future__ import annotations

from fedq.errors import FieldError
from fedq.planning.cluster import Cluster, CodecSpeed, Level
from fedq.planning.step import speed_name

CODECS_FROM = (
    "assumed, not measured here: kernels and PowerSGD as in docs/results.md (2 cores of an Intel Xeon at 2.8 GHz, "
    "AVX-512, no GPU); what a call costs is a guess; `fedq probe` measures yours"
)
INSIDE_BANDWIDTH, INSIDE_LATENCY_S = 10e9, 10e-6
"""Bytes a second of a rank, and seconds of latency, inside a node by default: memory or NVLink is no bottleneck."""
_MEMORY_BANDWIDTH = 10.81e9
_CALL_S, _SMALL_TENSOR_S, _MESSAGE_S = 15e-6, 2e-6, 2e-6
"""Guesses: docs/results.md times whole tensors only. They matter for models of many small tensors, and many ranks."""
_DECODE = 10.75e9

_GB_PER_S = {
    # Encode, encode with residual, one payload of a reduce. Where the table has no such row, that of the nearest kind:
    # int6 as int8, int8 with residual as int4 without rotation, sums as decode_accumulate of the like.
    "fp32": (10.81, 10.81, 10.81),
    "fp16": (10.47, 10.47, 11.69),
    "bf16": (10.47, 10.47, 11.69),
    "int8": (10.45, 6.68, 11.00),
    "int6": (10.45, 6.68, 11.00),
    "int4": (3.65, 3.65, 10.75),
    "int3": (3.46, 3.46, 10.75),
    "int2": (3.56, 3.56, 10.75),
    "sign": (10.53, 6.75, 11.69),
    "sign:block=256,rotate=true": (5.37, 5.37, 10.75),
    "ternary": (5.70, 5.70, 10.75),
    "blocktopk:k=1,block=64,bits=2": (5.77, 5.77, 10.25),
    "blocktopk": (5.77, 5.77, 10.25),
    "topk": (3.47, 3.47, 10.25),
    "randk": (4.89, 4.89, 10.25),
}
_POWERSGD_GB_PER_S = 0.0447 / 0.147
"""ResNet-18's 44.7 MB took 147 ms above `no_sync` on unlimited links (Training steps on limited links, powersgd-2);
ranks 1 and 4 took 135 and 124, so the rank does not show. Its messages are in it, so this errs on the slow side."""


def assumed_speeds() -> dict[str, CodecSpeed]:
    """Return the speeds of the codecs in docs/results.md, of an idle machine with two threads."""
    speeds = {}
    for spec, (encode, with_residual, reduce) in _GB_PER_S.items():
        speeds[speed_name(spec)] = CodecSpeed(
            encode_s_per_byte=1e-9 / encode,
            encode_residual_s_per_byte=1e-9 / with_residual,
            encode_call_s=_CALL_S,
            reduce_s_per_byte=1e-9 / reduce,
            reduce_call_s=_CALL_S,
            decode_s_per_byte=1 / _DECODE,
            decode_call_s=_CALL_S,
        )
    for rank in (1, 2, 4):
        passes = 1e-9 / _POWERSGD_GB_PER_S
        speeds[speed_name(f"powersgd:rank={rank}")] = CodecSpeed(passes, passes, 0, 0, 0, 0, 0)
    return speeds


def given_cluster(
    world_size: int,
    bandwidth: float,
    latency_s: float,
    *,
    ranks_per_node: int = 1,
    inside_bandwidth: float = INSIDE_BANDWIDTH,
    inside_latency_s: float = INSIDE_LATENCY_S,
    backend: str = "nccl",
) -> Cluster:
    """Return a cluster of given numbers.

    Args:
        world_size: Number of ranks.
        bandwidth: Bytes a second of a node's link, which its ranks share.
        latency_s: Latency from node to node, in seconds.
        ranks_per_node: Number of ranks on each node.
        inside_bandwidth: Bytes a second of a rank inside its node.
        inside_latency_s: Latency inside a node, in seconds.
        backend: Backend of the all-reduce: ``gloo`` goes around a ring, ``nccl`` up and down trees.

    Raises:
        FieldError: The ranks do not fill the nodes.
    """
    if world_size < 1:
        raise FieldError("world", world_size, "1 or more")
    if ranks_per_node < 1 or world_size % ranks_per_node:
        raise FieldError("ranks_per_node", ranks_per_node, f"a divisor of the number of ranks, {world_size}")
    inside = Level(inside_latency_s, inside_bandwidth, _MESSAGE_S)
    across = Level(latency_s, bandwidth / ranks_per_node, _MESSAGE_S)
    return Cluster(
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        backend=backend,
        device="cpu",
        hosts=(),
        cores=0,
        threads=1,
        memory_bandwidth=_MEMORY_BANDWIDTH,
        small_tensor_s=_SMALL_TENSOR_S,
        inside=inside if ranks_per_node > 1 else None,
        across=across if world_size > ranks_per_node else None,
        codecs=assumed_speeds(),
        codecs_from=CODECS_FROM,
    )
