"""One result under every launcher, and after its restarts: the same model and the same counted bytes, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import kill_resume
import pytest
from kill_resume import Supervised
from launched import SMALL, environ, execute, free_ports, require, results, slurm_cluster, summary, torchrun, train
from properties import few

MULTI_GPU = ("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("torchrun") / "run", torchrun(2))


@pytest.mark.slow
def test_python_gives_what_one_rank_of_torchrun_gives(tmp_path: Path, two_ranks: Path) -> None:
    alone = train(tmp_path / "python", (sys.executable,))
    assert (summary(alone)["launcher"], summary(alone)["world_size"]) == ("python", 1)
    assert results(alone) == results(train(tmp_path / "torchrun", torchrun(1)))
    assert results(alone)[0] == results(two_ranks)[0]  # nor does the model depend on the number of ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher", "more"),
    [
        ("deepspeed", ("deepspeed", "--num_accelerators", "2", "--master_port", "PORT"), {}),
        ("accelerate", ("accelerate", "launch", "--config_file", "examples/accelerate_config/cpu.yaml"), {}),
        ("accelerate", ("accelerate", "launch", "--config_file", "examples/accelerate_config/multi_gpu.yaml"), {}),
        ("accelerate", MULTI_GPU, {"ACCELERATE_USE_CPU": "true"}),
    ],
    ids=["deepspeed", "accelerate cpu.yaml", "accelerate multi_gpu.yaml", "accelerate flags"],
)
def test_launchers_on_one_machine_give_what_torchrun_gives(
    tmp_path: Path, two_ranks: Path, name: str, launcher: tuple[str, ...], more: dict[str, str]
) -> None:
    require(launcher[0])
    launcher = tuple(str(free_ports()) if word == "PORT" else word for word in launcher)
    run = train(tmp_path / "run", launcher, env=environ(**more))
    assert (summary(run)["launcher"], summary(run)["world_size"]) == (name, 2)
    assert results(run) == results(two_ranks)


@pytest.mark.slow
def test_srun_on_two_nodes_gives_what_torchrun_gives(tmp_path: Path, two_ranks: Path) -> None:
    with slurm_cluster() as env:
        run = train(tmp_path / "run", ("srun", "--nodes=2", "--ntasks=2", sys.executable), env=env)
    assert (summary(run)["launcher"], summary(run)["world_size"]) == ("srun", 2)
    assert results(run) == results(two_ranks)


@pytest.mark.parametrize("by", few(["flag", "file"], 1))
def test_accelerate_that_would_start_one_process_of_two_is_refused(tmp_path: Path, by: str) -> None:
    require("accelerate")
    file = tmp_path / "multi_cpu.yaml"  # what `accelerate config` writes for several processes on a CPU
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\n")
    with file.open("a") as text:
        text.write("machine_rank: 0\nmixed_precision: 'no'\nnum_processes: 2\nuse_cpu: true\n")
    flags = ("--cpu", "--num_processes", "2") if by == "flag" else ("--config_file", str(file))
    done = execute("accelerate", "launch", *flags, "train.py", *SMALL, "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "error: num_processes=2 is not allowed" in done.stderr
    assert "examples/accelerate_config/cpu.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


# ---- torchrun starts killed ranks again, and the run ends as one that was left in peace ----

ROUNDS = 12


def flags(*more: str) -> str:
    return " ".join((*SMALL, "--rounds", str(ROUNDS), *more))


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole") / "run", torchrun(2), "--rounds", str(ROUNDS))


def num_rounds(folder: Path) -> int:
    """Return the rounds finished of the runs in a folder, which are one or none."""
    return max((int(path.name) for path in folder.glob("*/checkpoints/0*")), default=0)


def kill_after(job: Supervised, folder: Path, rounds: int, rank: int) -> None:
    """Kill a rank when so many rounds are finished; the processes must be others than were seen before."""
    ranks = job.next_ranks()
    assert ranks, job.log.read_text()
    job.wait_until(lambda: num_rounds(folder) >= rounds)
    os.kill(ranks[rank], signal.SIGKILL)


def starts_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


TWICE = ((3, 1), (6, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "kills"),
    [("", ((3, 1),)), ("", TWICE), ("--out runs/mine", TWICE)],
    ids=["once", "without --out", "with --out"],
)
def test_a_killed_rank_costs_a_start_and_no_run(
    tmp_path: Path, long_run: Path, more: str, kills: tuple[tuple[int, int], ...]
) -> None:
    where = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    job = Supervised(flags(more), 2, tmp_path / "log", *where)
    for rounds, rank in kills:
        kill_after(job, tmp_path / "runs", rounds, rank)
    assert job.end() == 0, job.log.read_text()
    (run,) = (tmp_path / "runs").iterdir()
    assert results(run) == results(long_run)
    assert summary(run)["restarts"] == len(kills)
    assert not [line for line in starts_of(run) if "error" in line], "no rank has failed by itself"


@pytest.mark.slow
def test_two_agents_meet_again_whichever_side_was_killed(tmp_path: Path, long_run: Path) -> None:
    """The agents' counts of restarts may differ from the first kill on."""
    where = ("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "5", "--rdzv-backend", "c10d")
    meeting = ("--rdzv-endpoint", f"127.0.0.1:{free_ports()}", "--rdzv-id", "two", "--local-addr", "127.0.0.1")
    sides = [
        Supervised(flags("--out", str(tmp_path / "runs/mine")), 1, tmp_path / f"log{side}", *where, *meeting)
        for side in range(2)
    ]
    for side, rounds in ((0, 2), (1, 4), (0, 6), (1, 8)):
        both = [job.next_ranks() for job in sides]
        sides[side].wait_until(lambda rounds=rounds: num_rounds(tmp_path / "runs") >= rounds)
        (pid,) = both[side].values()
        os.kill(pid, signal.SIGKILL)
    assert [job.end() for job in sides] == [0, 0], "\n".join(job.log.read_text() for job in sides)
    assert results(tmp_path / "runs/mine") == results(long_run)
    assert summary(tmp_path / "runs/mine")["restarts"] == 4


@pytest.mark.slow
def test_sigterm_to_one_rank_is_no_success(tmp_path: Path, long_run: Path) -> None:
    """Of one rank alone, because others fail by themselves when it goes."""
    alone = train(tmp_path / "alone", torchrun(1), "--rounds", str(ROUNDS))
    where = ("--standalone", "--nproc-per-node", "1", "--max-restarts", "2")
    job = Supervised(flags("--out", "runs/mine"), 1, tmp_path / "log", *where)
    (pid,) = job.next_ranks().values()
    job.wait_until(lambda: num_rounds(tmp_path / "runs") >= 2)
    os.kill(pid, signal.SIGTERM)
    assert job.end() == 0, job.log.read_text()
    assert results(tmp_path / "runs/mine") == results(alone)
    assert summary(tmp_path / "runs/mine")["restarts"] == 1


@pytest.mark.slow
def test_kills_at_random_moments_repeat_a_round_at_most(tmp_path: Path) -> None:
    tally = kill_resume.torment_by_torchrun("sign, fedavgm, int4 down", 2, 3, tmp_path / "work", random.Random(4))
    assert tally.differences == []
    assert sum(tally.kills.values()) == 3
