"""One result under every launcher: the same model and the same counted bytes, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
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
        ("accelerate", ("accelerate", "launch", "--config_file", "accelerate_config/cpu.yaml"), {}),
        ("accelerate", ("accelerate", "launch", "--config_file", "accelerate_config/multi_gpu.yaml"), {}),
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
    assert "accelerate_config/cpu.yaml" in done.stderr
    assert not (tmp_path / "run").exists()
