"""Predictions: against hand-made formulas, the bytes that real exchanges count, and what must hold for any numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_group
from hypothesis import given
from hypothesis import strategies as st
from properties import few, is_all, tried
from torch import nn

from fedq import hooks
from fedq.cli import main
from fedq.codecs import codec
from fedq.errors import FieldError
from fedq.layout import LayoutSchedule
from fedq.models import build_model
from fedq.planning.advice import Option, advise
from fedq.planning.assumed import given_cluster
from fedq.planning.cluster import Cluster, Cost, Level
from fedq.planning.network import Network, Work
from fedq.planning.rounds import RoundJob, RoundModel, predict_rounds
from fedq.planning.step import CODECS, Job, StepModel, break_even, predict_steps
from fedq.planning.timeline import play
from fedq.planning.traffic import Fan, Shapes, Traffic
from fedq.planning.units import bandwidth_text, duration_text, parse_bandwidth, parse_duration
from fedq.wire import HEADER_NBYTES

SMALL = "cnn62k"


def cluster_of(
    world_size: int, bandwidth: float = 125e6, latency_s: float = 1e-3, ranks_per_node: int = 1, **more: Any
) -> Cluster:
    return given_cluster(world_size, bandwidth, latency_s, ranks_per_node=ranks_per_node, **more)


# ---- units ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1Gbit", 125e6),
        ("100 Mbit/s", 12.5e6),
        ("100mbit", 12.5e6),
        ("12.5MB/s", 12.5e6),
        ("1.5e3 kB/s", 1.5e6),
        ("8bit/s", 1.0),
        ("2GiB/s", 2.0 * 2**30),
    ],
)
def test_bandwidths(text: str, nbytes: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(nbytes)


@pytest.mark.parametrize(
    "text",
    ["1 Gb", "1Gb/s", "1GB", "1Gbps", "100", "0Gbit", "0MB/s", "-1Gbit", "nan", "nanGbit", "infGbit", "", "1mb/s"],
)
def test_a_bandwidth_that_may_mean_two_things_or_nothing_lists_the_forms(text: str) -> None:
    with pytest.raises(FieldError, match=r"inside_bandwidth=.*100Mbit, 1Gbit/s .*12\.5MB/s") as caught:
        parse_bandwidth(text, "inside_bandwidth")
    assert caught.value.value == text


def test_durations() -> None:
    assert [parse_duration(t) for t in ("1ms", "50us", "50 µs", "300ns", "0s")] == pytest.approx(
        [1e-3, 5e-5, 5e-5, 3e-7, 0]
    )
    for text in ("1", "-1ms", "nan", "1 min", "infs"):
        with pytest.raises(FieldError, match=r"latency=.*1ms"):
            parse_duration(text)


def test_texts_read_back() -> None:
    assert bandwidth_text(125e6) == "1 Gbit/s"
    assert parse_bandwidth(bandwidth_text(1.5e6)) == pytest.approx(1.5e6)
    assert [duration_text(s) for s in (2.5, 1.25e-3, 5e-5, 0)] == ["2.5 s", "1.25 ms", "50 us", "0 s"]


# ---- links ---------------------------------------------------------------------------------------------------------


def test_alpha_and_beta_of_a_ring_and_of_a_tree() -> None:
    """Four ranks: 2(W-1) steps and 2(W-1)/W of the bytes around a ring, 2 log2 W steps up and down a tree."""
    gloo, nccl = (cluster_of(4, 1e6, 1e-3, backend=backend) for backend in ("gloo", "nccl"))
    assert Network(gloo).all_reduce(8e6, "float32").seconds == pytest.approx(6 * 1e-3 + 12)
    assert Network(nccl).all_reduce(8e6, "float32").seconds == pytest.approx(4 * 1e-3 + 12)


def test_a_ring_leaves_a_node_once_but_an_exchange_as_often_as_it_has_ranks() -> None:
    """Two nodes of four ranks share 1 MB/s: the ring carries 7/4 of the buffer, an exchange 4 · 4 messages."""
    cluster = cluster_of(8, 1e6, 0.0, ranks_per_node=4, inside_bandwidth=1e12, inside_latency_s=0.0)
    assert Network(cluster).all_reduce(8e6, "float32").seconds == pytest.approx(14)
    message = 1e6
    fan = Fan(across=4 * message, inside=3 * message, num_across=4, num_inside=3)
    assert Network(cluster).exchange(fan).seconds == pytest.approx(16, rel=1e-4)


def test_measured_points_are_read_off_and_continued() -> None:
    cost = Cost(1.0, 100.0, ranks=2, points=((10, 10, 5.0), (30, 30, 4.0), (50, 50, 9.0)))
    level = Level(1.0, 100.0, collectives={"exchange": cost})
    network = Network(replace(cluster_of(2, 100.0), inside=level, across=None, ranks_per_node=2))

    def seconds(nbytes: float) -> float:
        return network.exchange(Fan(0, nbytes, 0, 1)).seconds

    # A larger message never takes less, whatever was measured.
    assert [seconds(x) for x in (0, 10, 30, 40, 50, 150)] == pytest.approx([5, 5, 5, 7, 9, 10])


def test_another_bandwidth_leaves_what_software_costs() -> None:
    level = Level(0.0, 100.0, collectives={"exchange": Cost(0.0, 50.0)}).with_bandwidth(10.0)
    network = Network(replace(cluster_of(2, 100.0), inside=level, across=None, ranks_per_node=2))
    # 1/50 - 1/100 of a second a byte is not the wire's; the wire's is 1/10 now.
    assert network.exchange(Fan(0, 100, 0, 1)).seconds == pytest.approx(100 * (1 / 10 + 1 / 50 - 1 / 100))


def test_link_json_comes_back(tmp_path: Path) -> None:
    cost = Cost(1e-4, 2e6, 3e-9, 2, ((10, 20, 0.5),))
    level = Level(1e-4, 2e6, 1e-5, 1e3, 1e9, {"exchange": cost})
    cluster = replace(cluster_of(2), across=level, hosts=("a", "b"), cores=2)
    cluster.save(tmp_path / "link.json")
    assert Cluster.load(tmp_path / "link.json") == cluster
    no_burst = replace(cluster, across=replace(level, burst_bandwidth=math.inf))
    no_burst.save(tmp_path / "link.json")
    assert Cluster.load(tmp_path / "link.json") == no_burst


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema_version": 2}, "schema_version 1"),
        ({"world_size": "2"}, "world_size='2'"),
        ({"ranks_per_node": 3}, "ranks_per_node=3"),
        ({"extra": 1}, "extra=1"),
        ({"across": None}, "across=None"),
        ({"memory_bandwidth": "fast"}, "memory_bandwidth='fast'"),
        ({"codecs": {"int4": {"encode_s_per_byte": 1}}}, r"codecs\.int4\.encode_residual_s_per_byte"),
    ],
)
def test_a_link_json_that_is_wrong_names_what(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "link.json"
    cluster_of(2).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FieldError, match=named):
        Cluster.load(path)


def test_a_link_json_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(FieldError, match="a file that `fedq probe` wrote"):
            Cluster.load(tmp_path / name)


# ---- bytes ---------------------------------------------------------------------------------------------------------

TABLE = {  # /shared design: bytes that a rank sends for each element, by ranks
    "fp32": {2: 4, 4: 6, 8: 7, 64: 7.9},
    "bf16": {2: 2, 4: 3, 8: 3.5, 64: 3.9},
    "int8": {2: 1.01, 4: 1.51, 8: 1.76, 64: 1.98},
    "int4": {2: 0.51, 4: 0.76, 8: 0.89, 64: 1.0},
    "int2": {2: 0.26, 4: 0.39, 8: 0.45, 64: 0.51},
    "sign": {2: 0.127, 4: 0.190, 8: 0.222, 64: 0.250},
    "blocktopk:k=1,block=64,bits=2": {2: 0.016, 4: 0.024, 8: 0.028, 64: 0.032},
}


@pytest.mark.parametrize("spec", TABLE)
def test_bytes_of_an_element_are_those_of_the_formula(spec: str) -> None:
    """2(W-1)/W · payload, whatever the number of ranks: of all-reduce and of two phases."""
    with torch.device("meta"):
        shapes = Shapes.of_module("matrix", nn.Linear(1024, 4096, bias=False), (1024,))
    for ranks, expected in TABLE[spec].items():
        schedule = "reduce" if spec in ("fp32", "bf16") else "two_phase"
        sent = Traffic.of(shapes, spec, ranks, schedule=schedule).sent
        assert sent.sum(axis=1).mean() / shapes.numel == pytest.approx(expected, abs=0.01 * max(1, expected))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {}),
    ("bf16", {}),
    ("int4", {"schedule": "one_phase"}),
    ("int4", {"schedule": "two_phase", "second": "int8"}),
    ("sign", {"schedule": "two_phase"}),
    ("blocktopk:k=1,block=64,bits=2", {}),
    ("randk:density=0.25", {"schedule": "reduce"}),
    ("powersgd:rank=2,start=2", {}),
]
WIDE = [("int4", {"schedule": "hierarchical", "ranks_per_node": 2})]


def sent_in_a_step(rank: int, cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[int, int]]:
    """Return what this rank's DDP hook counts by leg, in a step after DDP has settled its buckets."""
    results = []
    for spec, options in cases:
        torch.manual_seed(0)
        ddp = nn.parallel.DistributedDataParallel(build_model("resnet20"))
        state, counts = hooks.register(ddp, spec, **options), []
        for _ in range(4):
            ddp(torch.randn(2, 3, 32, 32)).sum().backward()
            counts.append((state.sent.first, state.sent.second))
        results.append((counts[3][0] - counts[2][0], counts[3][1] - counts[2][1]))
    return results


@pytest.mark.parametrize(("ranks", "cases"), few([(2, CASES), (3, CASES), (4, WIDE)], 1))
def test_predicted_bytes_are_those_that_the_hook_counts(ranks: int, cases: list) -> None:
    shapes, cases = Shapes.of("resnet20"), cases if is_all() else cases[3:6]
    counted = run_group(ranks, sent_in_a_step, cases)
    for number, (spec, options) in enumerate(cases):
        sent = Traffic.of(shapes, spec, ranks, **options).sent
        for rank in range(ranks):
            assert tuple(sent[rank].tolist()) == counted[rank][number], (spec, options, rank)


def test_a_message_of_a_round_weighs_what_is_predicted() -> None:
    model = build_model(SMALL)
    for spec in ("fp32", "int4", "sign"):
        layout = LayoutSchedule.of(model, spec, feedback=codec(spec).wants_feedback).at(0)
        payloads = layout.encode(layout.flatten(model), seed=0)
        job = RoundJob(Shapes.of(SMALL), 10, 5, 1, 0.01)
        made = RoundModel(job, cluster_of(2), spec, "rooted")
        assert made.uplink_nbytes == HEADER_NBYTES + sum(payload.nbytes for payload in payloads)


# ---- time ----------------------------------------------------------------------------------------------------------


def test_a_transfer_hides_behind_computation_but_coding_does_not() -> None:
    compute = Work(1.0, 1.0)
    wire, coding = Work(0.3, 0.0, wire_bytes=1.0), Work(0.3, 1.0)
    assert play(compute, [(0.5, [wire])]).seconds == pytest.approx(1.0)
    assert play(compute, [(0.5, [wire])]).hidden_s == pytest.approx(0.3)
    assert play(compute, [(0.9, [wire])]).exposed_s == pytest.approx(0.2)
    assert play(compute, [(0.5, [coding])]).exposed_s == pytest.approx(0.3)
    assert play(Work(1.0, 0.5), [(0.5, [Work(0.3, 0.5)])]).exposed_s == pytest.approx(0.0)  # a core each
    assert play(compute, [(1.0, [coding, wire])]).exposed_s == pytest.approx(0.6)


def test_buckets_wait_for_each_other() -> None:
    wire = Work(0.5, 0.0, wire_bytes=1.0)
    # Ready at 0.2 and 0.4 of 1 s: 0.2-0.7, 0.7-1.2.
    assert play(Work(1.0, 1.0), [(0.2, [wire]), (0.4, [wire])]).seconds == pytest.approx(1.2)


def test_a_burst_is_free_until_it_is_used_up() -> None:
    """1 byte a second, 1 s of computation: the link saves up a byte, and lets it pass at once."""
    level = Level(0.0, 1.0, burst_bytes=5.0, burst_bandwidth=1e9)
    played = play(Work(1.0, 1.0), [(1.0, [Work(3.0, 0.0, 3.0, level, (3.0, 3.0))])])
    assert played.seconds == pytest.approx(3.0, rel=1e-6)  # not 4: a byte each second is all that counts in the end
    enough = play(Work(4.0, 1.0), [(4.0, [Work(3.0, 0.0, 3.0, level, (3.0, 3.0))])])
    assert enough.seconds == pytest.approx(4.0, rel=1e-6)


def test_directions_save_up_by_themselves() -> None:
    """Two legs of 3 bytes one way and 1 the other: 4 each way, so with a burst large enough a step of 4 s, not 6."""
    level = Level(0.0, 1.0, burst_bytes=5.0, burst_bandwidth=1e9)
    legs = [Work(3.0, 0.0, 3.0, level, (3.0, 1.0)), Work(3.0, 0.0, 3.0, level, (1.0, 3.0))]
    assert play(Work(0.01, 1.0), [(0.01, legs)]).seconds == pytest.approx(4.0, rel=0.02)


def test_gradients_of_the_last_layers_are_ready_first() -> None:
    shapes = Shapes.of("cnn1m")
    assert [sorted(bucket) for bucket in shapes.buckets] == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert shapes.ready[0] < 0.2  # two linear layers: most parameters, few multiplications
    assert shapes.ready[1] == 1.0


def test_a_single_rank_has_nothing_to_exchange() -> None:
    rows = predict_steps(Job(Shapes.of(SMALL), 0.1), cluster_of(1))
    assert {row.seconds for row in rows} == {0.1}
    assert {row.bytes_per_rank for row in rows} == {0.0}


@pytest.mark.parametrize(("ranks", "each"), [(2, 1), (8, 1), (64, 8)])
def test_at_the_break_even_bandwidth_both_take_the_same_time(ranks: int, each: int) -> None:
    cluster, job = cluster_of(ranks, ranks_per_node=each), Job(Shapes.of("cnn1m"), 0.02)
    found = 0
    for row in predict_steps(job, cluster):
        for name, bandwidth in row.break_even.items():
            mine = StepModel(job, cluster, row.codec, schedule="auto" if "powersgd" in row.codec else row.schedule)
            base = StepModel(job, cluster, name)
            if 0 < bandwidth < math.inf:
                found += 1
                assert mine.seconds_at(bandwidth) == pytest.approx(base.seconds_at(bandwidth), rel=1e-5)
                assert mine.seconds_at(bandwidth / 2) < base.seconds_at(bandwidth / 2)
    assert found


@pytest.mark.parametrize("each", [1, 3])
def test_on_a_slow_link_a_step_takes_as_long_as_its_bytes(each: int) -> None:
    """Three ranks, on one node or on three: the busiest rank's bytes over the bandwidth, in each schedule."""
    job, slow = Job(Shapes.of("cnn1m"), 0.01), 1e4
    cluster = cluster_of(3, slow * each, 0.0, ranks_per_node=each, inside_bandwidth=slow)
    for row in predict_steps(job, cluster, ["int4", "sign"]):
        assert row.seconds == pytest.approx(row.link_bytes / slow, rel=0.05)
        if row.schedule in ("reduce", "one_phase"):
            assert row.link_bytes == pytest.approx(row.bytes_per_rank, rel=1e-3)
        else:  # owners of single large segments get more than they send
            assert row.bytes_per_rank / 2 < row.link_bytes < 3 * row.bytes_per_rank


def test_break_even_says_never_and_always() -> None:
    assert break_even(lambda b: 1 + 1 / b, lambda b: 1 / b) == 0.0
    assert break_even(lambda b: 1 / b, lambda b: 1 + 2 / b) == math.inf
    assert break_even(lambda b: 1e-4 + 1e3 / b, lambda b: 3e3 / b) == pytest.approx(2e7)


SHAPES = Shapes.of(SMALL)


@tried(40)
@given(
    bandwidth=st.floats(1e4, 1e10),
    more=st.floats(1.01, 100),
    latency_s=st.floats(0, 1e-2),
    compute_s=st.floats(1e-3, 1),
    nodes=st.integers(2, 6),
    each=st.integers(1, 4),
    spec=st.sampled_from(CODECS),
)
def test_more_of_anything_that_costs_never_takes_less(
    bandwidth: float, more: float, latency_s: float, compute_s: float, nodes: int, each: int, spec: str
) -> None:
    def seconds(bandwidth: float = bandwidth, latency_s: float = latency_s, compute_s: float = compute_s) -> float:
        cluster = cluster_of(nodes * each, bandwidth, latency_s, ranks_per_node=each)
        return StepModel(Job(SHAPES, compute_s), cluster, spec).play().seconds

    now = seconds()
    assert now >= compute_s
    slack = 1 + 1e-9
    assert seconds(bandwidth=bandwidth * more) <= now * slack
    assert seconds(latency_s=latency_s + 1e-3) * slack >= now
    assert seconds(compute_s=compute_s * more) * slack >= now


def test_four_thousand_ranks_and_a_hundred_thousand_clients() -> None:
    cluster = cluster_of(4096, 1.25e9, 50e-6, ranks_per_node=8)
    shapes = Shapes.of("resnet50")
    rows = predict_steps(Job(shapes, 0.12), cluster)
    assert {row.schedule for row in rows} == {"reduce", "one_phase", "two_phase", "hierarchical"}
    assert all(math.isfinite(row.seconds) for row in rows)
    rounds = predict_rounds(RoundJob(shapes, 100_000, 100, 10, 0.12), cluster)
    rooted, spread = ({r.codec: r for r in rounds if r.aggregate == a} for a in ("rooted", "two_phase"))
    assert rooted["int4"].root_bytes == 99 * (rooted["int4"].uplink_bytes + 8)
    assert spread["int4"].root_bytes < rooted["int4"].root_bytes
    # Nobody is sampled again before a thousand changes, so everyone fetches the model.
    assert rooted["int4"].download_bytes == 4 * LayoutSchedule.of(shapes.module, "fp32", feedback=False).at(0).numel


# ---- advice --------------------------------------------------------------------------------------------------------


def option(name: str, seconds: float, schedule: str = "two_phase") -> Option:
    return Option(name, schedule, seconds, 1e6, 0.1, {"fp32": 1e6, "bf16": 5e5})


def test_nothing_is_recommended_for_a_gain_within_the_error() -> None:
    found = advise([option("fp32", 1.02), option("bf16", 1.0), option("int4", 0.95), option("sign", 0.5)], "step", 1e6)
    assert (found.codec, found.compresses) == ("fp32", False)  # as fast as bf16 within 5 %, and finer
    assert "does not pay" in found.because
    assert "below 4 Mbit/s it would" in found.because
    assert "sign" in found.note


def test_of_codecs_that_are_alike_the_finest_is_taken() -> None:
    rows = [option("fp32", 2.0), option("bf16", 1.0), option("int4", 0.5), option("int8", 0.52), option("sign", 0.1)]
    found = advise(rows, "step", 1e6)
    assert (found.codec, found.schedule) == ("int8", "two_phase")
    assert "1.9 times" in found.because
    assert advise([*rows[:3], option("int8", 0.6)], "step", 1e6).codec == "int4"


# ---- the command ---------------------------------------------------------------------------------------------------

GIVEN = ["plan", "--bandwidth", "100Mbit", "--latency", "1ms", "--world", "4", "--model", SMALL, "--compute-ms", "5"]


@pytest.mark.parametrize("more", [[], ["--exchange", "round", "--clients", "1000", "--cohort", "20"]])
def test_the_plan_is_readable(capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    assert main([*GIVEN, *more]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert "assumed" in text
    assert "Recommended: " in text
    assert "Because " in text


def test_the_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GIVEN, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["advice"]["codec"] in ("fp32", "bf16", "int8", "int4")
    assert {row["codec"] for row in tree["rows"]} == set(CODECS)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--bandwidth", "1 Gb"], "bandwidth='1 Gb'"),
        (["--bandwidth", "0Mbit"], "bandwidth='0Mbit'"),
        (["--latency", "1"], "latency='1'"),
        (["--ranks-per-node", "3"], "ranks_per_node=3"),
        (["--model", "resnet19"], "model='resnet19'"),
        (["--codecs", "int9"], "codec='int9'"),
        (["--codecs", "threshold:value=1"], "codec='threshold:value=1"),
        (["--compute-ms", "nan"], "compute_ms=nan"),
        (["--exchange", "round", "--cohort", "9"], "cohort=9"),
        (["--exchange", "round", "--clients", "0"], "clients=0"),
        (["--link", "no.json"], "bandwidth='100Mbit'"),
    ],
)
def test_bad_numbers_are_named(capsys: pytest.CaptureFixture[str], flags: list[str], named: str) -> None:
    assert main([*GIVEN, *flags]) == 2
    assert named in capsys.readouterr().err


def test_a_plan_of_nothing_says_what_it_wants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", SMALL, "--compute-ms", "5"]) == 2
    assert "link.json" in capsys.readouterr().err
