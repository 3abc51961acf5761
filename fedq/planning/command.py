"""The commands `fedq plan` and `fedq probe`."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedq.errors import FieldError
from fedq.files import writable
from fedq.planning import assumed
from fedq.planning.advice import Advice, Option, advise, step_options
from fedq.planning.cluster import Cluster
from fedq.planning.rounds import AGGREGATES, ROUND_CODECS, RoundJob, RoundPrediction, predict_rounds
from fedq.planning.step import CODECS, Job, Prediction, predict_steps
from fedq.planning.text import describe, round_table, step_table, wrapped
from fedq.planning.traffic import Shapes
from fedq.planning.units import BANDWIDTH_FORMS, DURATION_FORMS, parse_bandwidth, parse_duration

_PLANS = "Predict what each codec would cost on a cluster, and recommend one, or none."
_PROBES = (
    "Measure links, memory and codecs of the ranks that run this, and write link.json. Start it as a job: "
    "torchrun --nproc-per-node 2 -m fedq probe."
)
_GIVEN = ("bandwidth", "latency", "world", "ranks_per_node", "inside_bandwidth", "inside_latency", "backend")
_EPILOG = f"Bandwidths: {BANDWIDTH_FORMS}. Durations: {DURATION_FORMS}. See docs/planning.md."


def plan(argv: Sequence[str], program: str) -> int:
    """Predict: see `_PLANS`.

    Raises:
        FieldError: A setting cannot be used.
    """
    given = _plan_parser(program).parse_args(argv)
    cluster = _cluster(given)
    image = (given.channels, given.image_size, given.image_size)
    shapes = Shapes.of(given.model, num_classes=given.num_classes, image=image)
    compute_s = _positive("compute_ms", given.compute_ms) / 1e3
    rows: Sequence[Prediction] | Sequence[RoundPrediction]
    if given.exchange == "step":
        job = Job(shapes, compute_s, not given.no_overlap)
        steps, advice = plan_steps(job, cluster, given.codecs, given.downlink)
        rows, table = steps, step_table(steps, cluster)
    else:
        round_job = _round_job(given, shapes, cluster)
        rounds, advice = plan_rounds(round_job, cluster, given.codecs)
        rows, table = rounds, round_table(rounds, cluster, round_job)
    if given.json:
        print(json.dumps(_plain({"cluster": cluster, "rows": rows, "advice": advice}), indent=1))
        return 0
    what = f"{shapes.name}, {shapes.numel:,} parameters, {given.compute_ms:g} ms of computation a step"
    print("\n".join([*describe(cluster), what, "", *table, "", *_advice_lines(advice)]))
    return 0


def _round_job(given: argparse.Namespace, shapes: Shapes, cluster: Cluster) -> RoundJob:
    """Return what is trained in a round, checked."""
    for name in ("clients", "cohort", "local_steps"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise FieldError(name, value, "1 or more")
    num_clients = given.clients or cluster.world_size
    job = RoundJob(shapes, num_clients, given.cohort or num_clients, given.local_steps, given.compute_ms / 1e3)
    return replace(job, downlink=given.downlink or job.downlink)


def plan_steps(
    job: Job,
    cluster: Cluster,
    codecs: Sequence[str] | None = None,
    second: str | None = None,
    schedules: Sequence[str] | None = None,
) -> tuple[list[Prediction], Advice]:
    """Return what each codec would cost in a step, and which to use."""
    rows = predict_steps(job, cluster, codecs or CODECS, second=second, schedules=schedules)
    return rows, advise(step_options(rows), "step", cluster.bandwidth, cluster.ranks_per_link)


def plan_rounds(
    job: RoundJob, cluster: Cluster, codecs: Sequence[str] | None = None, aggregate: str | None = None
) -> tuple[list[RoundPrediction], Advice]:
    """Return what each codec would cost in a round, and which to use; given who averages, of the uplink alone."""
    aggregates, is_given = ([aggregate], True) if aggregate else (AGGREGATES, False)
    rows = predict_rounds(job, cluster, codecs or ROUND_CODECS, aggregates, is_downlink_given=is_given)
    options = [Option(r.codec, r.aggregate, r.seconds, r.most_bytes_received, r.coding_s, r.break_even) for r in rows]
    return rows, advise(options, "round", cluster.bandwidth, cluster.ranks_per_link)


def _advice_lines(advice: Advice) -> list[str]:
    name = f"{advice.codec}, {advice.schedule}" if advice.compresses else f"none ({advice.codec})"
    return [f"Recommended: {name}", *wrapped(f"Because {advice.because}."), *wrapped(f"Note: {advice.note}.")]


def _cluster(given: argparse.Namespace) -> Cluster:
    """Return the cluster of a file, or of the numbers given."""
    if given.link is not None:
        for name in _GIVEN:
            if getattr(given, name) is not None:
                raise FieldError(name, getattr(given, name), "left out with --link, which says it")
        return Cluster.load(given.link)
    for name in ("bandwidth", "latency", "world"):
        if getattr(given, name) is None:
            allowed = "--link link.json (from `fedq probe`), or --bandwidth, --latency and --world"
            raise FieldError(name, None, allowed)
    options: dict[str, Any] = {"ranks_per_node": given.ranks_per_node or 1, "backend": given.backend or "nccl"}
    if given.inside_bandwidth is not None:
        options["inside_bandwidth"] = parse_bandwidth(given.inside_bandwidth, "inside_bandwidth")
    if given.inside_latency is not None:
        options["inside_latency_s"] = parse_duration(given.inside_latency, "inside_latency")
    bandwidth, latency_s = parse_bandwidth(given.bandwidth), parse_duration(given.latency)
    return assumed.given_cluster(given.world, bandwidth, latency_s, **options)


def _plan_parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=_PLANS, epilog=_EPILOG)
    add = parser.add_argument
    add("--link", type=Path, metavar="FILE", help="link.json that `fedq probe` wrote; instead of the six below")
    add("--bandwidth", help="of a node's link, which its ranks share, for example 1Gbit")
    add("--latency", help="from node to node, for example 1ms")
    add("--world", type=int, help="ranks")
    add("--ranks-per-node", type=int, help="default: 1")
    add("--inside-bandwidth", help="of a rank inside its node; default: 10GB/s")
    add("--inside-latency", help="inside a node; default: 10us")
    add("--backend", choices=["nccl", "gloo"], help="whose all-reduce: by trees (nccl, default) or around a ring")
    add("--model", required=True, help="resnet18, resnet50, cnn1m, ...")
    add("--image-size", type=int, default=32, help="side of the images; default: 32")
    add("--channels", type=int, default=3)
    add("--num-classes", type=int, default=10)
    add("--compute-ms", type=float, required=True, help="of a step without exchange, milliseconds")
    add("--exchange", choices=["step", "round"], default="step")
    add("--clients", type=int, help="of the federation; default: as many as ranks")
    add("--cohort", type=int, help="clients a round; default: all")
    add("--local-steps", type=int, default=10, help="optimizer steps of a client in a round; default: 10")
    add("--codecs", nargs="+", metavar="SPEC", help="default: those of docs/results.md")
    add("--downlink", help="codec of the second leg; default: as the first, in rounds int8")
    add("--no-overlap", action="store_true", help="the exchange begins when the backward pass is over")
    add("--json", action="store_true", help="print everything as JSON")
    return parser


def probe(argv: Sequence[str], program: str) -> int:
    """Measure: see `_PROBES`.

    Raises:
        FieldError: A setting cannot be used.
    """
    from fedq.planning.probe import measure
    from fedq.runtime import distributed, on_root, without_local_rank

    parser = argparse.ArgumentParser(prog=program, description=_PROBES)
    parser.add_argument("--out", type=Path, default=Path("link.json"), help="default: link.json")
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long; default: 60")
    parser.add_argument("--codecs", nargs="+", metavar="SPEC", default=list(CODECS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads a rank; default: 1 if a machine has several ranks")
    given = parser.parse_args(without_local_rank(argv, os.environ))
    _positive("seconds", given.seconds)
    with distributed(given.device, given.threads) as runtime:
        cluster = measure(runtime, given.codecs, budget_s=given.seconds)
        on_root(runtime, lambda: _save(cluster, given.out))
        if runtime.is_root:
            print("\n".join([runtime.note, *describe(cluster, in_detail=True), f"written to {given.out}"]))
    return 0


def _save(cluster: Cluster, path: Path) -> None:
    with writable("out", path):
        cluster.save(path)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise FieldError(name, value, "above 0")
    return value


def _plain(tree: Any) -> Any:
    """Return plain values; what JSON cannot say, an infinite number, as null."""
    if hasattr(tree, "__dataclass_fields__"):
        return _plain(asdict(tree))
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return None if isinstance(tree, float) and math.isinf(tree) else tree
