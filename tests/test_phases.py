"""Where time goes: timers driven by a clock that is moved by hand, and what a job's folder says of it."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from distributed import run_group
from properties import few
from torch import nn

from fedq import hooks
from fedq.cli import main
from fedq.phases import PHASES, BesideTimer, PhaseTimer, Spent


class Hands:
    """A clock that is moved by hand; its moments are numbers."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def between(self, begin: float, end: float) -> float:
        return end - begin


def test_time_within_an_inner_phase_is_not_the_outer_ones() -> None:
    clock = Hands()
    timer = PhaseTimer(clock)
    clock.now = 5  # nothing is open: nobody's
    with timer.phase("evaluation"):
        clock.now = 7
        with timer.phase("exchange"):
            clock.now = 10
            with timer.phase("exchange"):  # one that is open already
                clock.now = 11
        clock.now = 15
    clock.now = 99
    spent = timer.take()
    assert spent["evaluation"] == Spent(2 + 4, 0, 1)
    assert spent["exchange"] == Spent(3 + 1, 0, 2)
    assert sum(s.seconds for s in spent.values()) == 10
    assert timer.take() == {name: Spent() for name in PHASES}


def test_a_phase_that_is_open_is_divided_where_totals_are_taken() -> None:
    clock = Hands()
    timer = PhaseTimer(clock)
    with timer.phase("compute"):
        clock.now = 3
        assert timer.take()["compute"].seconds == 3
        clock.now = 4
    assert timer.take()["compute"] == Spent(1, 0, 0)


def test_a_phase_ends_when_its_body_raises() -> None:
    clock = Hands()
    timer = PhaseTimer(clock)

    def failing() -> None:
        with timer.phase("compute"), timer.phase("encode"):
            clock.now += 2
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    with timer.phase("server"):
        clock.now += 1
    spent = timer.take()
    assert (spent["encode"].seconds, spent["server"].seconds) == (2, 1)


def test_more_moments_than_are_kept_add_up() -> None:
    clock = Hands()
    timer = PhaseTimer(clock)
    for _ in range(10_000):
        with timer.phase("encode"):
            clock.now += 1
    assert timer.take()["encode"] == Spent(10_000, 0, 10_000)


def beside_two_steps(clock: Hands, timer: PhaseTimer) -> BesideTimer:
    """Two steps of 10 s: buckets submitted at 2 and 6, work at 3-5 (encode), 5-8 (exchange) and 8-9 (decode)."""
    beside = timer.beside()
    with timer.phase("compute"):
        for start in (0, 10):
            clock.now = start + 2
            beside.submitted(is_first=True, is_last=False)
            for name, begin, end in (("encode", 3, 5), ("exchange", 5, 8), ("decode", 8, 9)):
                if name == "exchange":  # meanwhile the backward pass reaches its end
                    clock.now = start + 6
                    beside.submitted(is_first=False, is_last=True)
                clock.now = start + begin
                beside.enter(name)
                clock.now = start + end
                beside.leave()
            beside.finished()
            clock.now = start + 10
    return beside


def test_work_beside_computation_is_exposed_from_the_last_bucket_on() -> None:
    clock = Hands()
    timer = PhaseTimer(clock)
    beside_two_steps(clock, timer)
    spent = timer.take()
    assert spent["encode"] == Spent(0, 2 * 2, 2)
    assert spent["exchange"] == Spent(2 * 2, 2 * 1, 2)  # of 5 to 8 the part after 6 was waited for
    assert spent["decode"] == Spent(2 * 1, 0, 2)
    assert spent["compute"].seconds == 20 - 2 * 3


def test_what_a_failed_step_has_left_is_forgotten() -> None:
    clock = Hands()
    timer = PhaseTimer(clock)
    beside = timer.beside()
    beside.submitted(is_first=True, is_last=False)
    with beside.phase("encode"):
        clock.now += 100
    clock.now = 0
    beside.submitted(is_first=True, is_last=True)
    with beside.phase("encode"):
        clock.now += 1
    beside.finished()
    assert timer.take()["encode"] == Spent(1, 0, 1)


def test_phases_are_ranges_of_a_profilers_trace() -> None:
    timer = PhaseTimer()
    timer.annotate(True)
    with torch.profiler.profile() as profile, timer.phase("compute"), timer.phase("encode"):
        torch.ones(3).sum()
    timer.annotate(False)
    with timer.phase("decode"):
        pass
    names = [event.key for event in profile.key_averages()]
    assert {"fedq::compute", "fedq::encode"} <= set(names)
    assert "fedq::decode" not in names


# ---- exchanges ----


def times_of_ddp(rank: int, spec: str) -> tuple[float, dict[str, Spent]]:
    """Take 6 steps in which rank 1 computes 0.1 s longer; return the seconds of the last 5, and their phases."""
    torch.manual_seed(0)
    timer = PhaseTimer()
    ddp = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)))
    hooks.register(ddp, spec, timer=timer)
    for step in range(6):
        if step == 1:
            timer.take()
            begin = time.perf_counter()
        with timer.phase("compute"):
            if rank == 1:
                time.sleep(0.1)
            ddp(torch.randn(4, 64)).square().mean().backward()
    return time.perf_counter() - begin, timer.take()


@pytest.mark.parametrize("spec", few(["int4", "fp32", "powersgd:rank=1,start=2"], 1))
def test_a_rank_that_waits_for_another_says_so(spec: str) -> None:
    (seconds, early), (_, late) = run_group(2, times_of_ddp, spec)
    assert 0.4 <= early["exchange"].seconds <= seconds
    assert late["exchange"].seconds < early["exchange"].seconds
    assert late["compute"].seconds >= 0.5
    assert sum(spent.seconds for spent in early.values()) == pytest.approx(seconds, rel=0.05)
    assert early["exchange"].calls >= 5


def times_without_ddp(rank: int) -> dict[str, Spent]:
    module, timer = nn.Linear(64, 64), PhaseTimer()
    state = hooks.step_state(module, "int4", timer=timer)
    dist.barrier()  # or the one that began later would wait less
    with timer.phase("compute"):
        module(torch.randn(4, 64)).sum().backward()
        if rank == 0:
            time.sleep(0.2)
        state.average_gradients()
    return timer.take()


def test_without_ddp_an_exchange_is_all_exposed() -> None:
    slow, fast = run_group(2, times_without_ddp)
    assert slow["compute"].seconds >= 0.2
    assert fast["exchange"].seconds >= 0.15
    assert slow["encode"].calls == fast["encode"].calls > 0
    assert all(spent.hidden == 0 for spent in (*slow.values(), *fast.values()))


# ---- a job ----


def run(*flags: str, out: Path) -> dict:
    small = (
        "--dataset digits --train-examples 280 --model cnn62k --num-clients 4 --local-steps 2 --rounds 3 --threads 1"
    )
    assert main([*small.split(), *flags, "--out", str(out)]) == 0
    return json.loads((out / "summary.json").read_text())


def test_a_jobs_folder_says_where_its_time_went(tmp_path: Path) -> None:
    summary = run(out=tmp_path / "run")
    rows = pq.read_table(tmp_path / "run/phases.parquet").to_pylist()
    assert {(row["round"], row["rank"], row["phase"]) for row in rows} == {(n, 0, p) for n in range(3) for p in PHASES}
    by_round = [json.loads(line)["seconds"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for number, seconds in enumerate(by_round):
        spent = sum(row["seconds"] for row in rows if row["round"] == number)
        assert 0 < spent <= seconds + 0.05
    assert sum(row["seconds"] for row in rows if row["round"] == 1) >= 0.5 * by_round[1], "no histograms there"
    calls = {row["phase"]: row["calls"] for row in rows if row["round"] == 1}
    assert calls["compute"] == 4, "one client after another"
    assert calls["encode"] == 4 + 1, "their updates, and the change"
    assert calls["server"] == 1
    for phase in PHASES:
        total = sum(row["seconds"] for row in rows if row["phase"] == phase)
        assert summary["seconds_by_phase"][phase] == pytest.approx(total)
    assert summary["interface"] is None, "one rank sends nothing"
    assert summary["command"].startswith("python ")


@pytest.mark.parametrize("flags", [("--exchange", "none"), ("--algorithm", "local"), ("--exchange", "step")])
def test_other_kinds_of_jobs_do_too(tmp_path: Path, flags: tuple[str, ...]) -> None:
    given = [*flags, *(("--num-clients", "2") if flags[1] != "step" else ())]
    if flags[1] == "step":
        given += ["--rounds", "2"]
    summary = run(*given, out=tmp_path / "run")
    assert summary["seconds_by_phase"]["compute"] > 0
    assert summary["seconds_by_phase"]["evaluation"] > 0
    assert (tmp_path / "run/phases.parquet").exists()


NAMESPACE = """
set -e
mount -t sysfs sysfs /sys
ip link set lo up
exec "$@"
"""


@pytest.mark.slow
def test_interfaces_agree_with_what_was_counted(tmp_path: Path) -> None:
    """Two ranks in a network namespace of their own, where nobody else sends anything."""
    alone = ["unshare", "--net", "--mount", "sh", "-c", NAMESPACE, "sh"]
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("needs unshare and ip")
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make network namespaces")
    root = Path(__file__).resolve().parent.parent
    flags = "--dataset digits --train-examples 280 --model cnn1m --exchange step --rounds 1 --uplink bf16 --threads 1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(root / "train.py"), *flags.split(), "--batch-size", "14", "--out", str(tmp_path / "run")]
    done = subprocess.run([*alone, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    interface = json.loads((tmp_path / "run/summary.json").read_text())["interface"]
    (host,) = interface["hosts"]
    assert host["ranks"] == [0, 1]
    assert list(host["interfaces"]) == ["lo"]
    assert interface["counted"] > 20e6
    assert 1.0 <= interface["ratio"] <= 1.01


@pytest.mark.parametrize("exchange", few(["round", "step", "none"], 1))
def test_a_profile_has_the_phases_of_the_first_round(tmp_path: Path, exchange: str) -> None:
    clients = ["--local-steps", "5"] if exchange == "step" else ["--num-clients", "2"]
    run("--profile", "--exchange", exchange, "--rounds", "1", *clients, out=tmp_path / "run")
    with gzip.open(tmp_path / "run/trace-rank0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::conv2d" in names
    assert exchange != "round" or {"fedq::encode", "fedq::decode", "fedq::server"} <= names
