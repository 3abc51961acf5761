"""The benchmarks' instruments: the same task for all, processes weighed from outside, tables that say what is so."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

import bench_rounds
import federated_task
import numpy as np
import overhead
import plain_loop
import pytest
import torch
from properties import few
from safetensors.torch import load_file
from task import Task
from torch.nn import functional

from fedq.cli import parse_args
from fedq.config import Config
from fedq.trainers.run import run_job

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred random training images and twenty test images, as torchvision keeps CIFAR-10."""
    folder = tmp_path_factory.mktemp("data") / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        entry = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": rng.integers(0, 10, 20).tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
    return folder.parent


def small_task(cifar: Path, model: str = "cnn62k") -> federated_task.FederatedTask:
    return federated_task.FederatedTask(model, cifar, num_rounds=1, num_clients=4, cohort=3, batch_size=10, seed=3)


@pytest.mark.parametrize("model", few(["cnn62k", "resnet20"], 1))
def test_fedq_and_the_hand_written_loop_have_the_same_task(cifar: Path, tmp_path: Path, model: str) -> None:
    """Weights, shares, cohort, orders, statistics of BatchNorm and the mean: all of it must agree, or nothing does."""
    small = small_task(cifar, model)
    flags = [
        *small.flags(),
        *["--uplink", "fp32", "--downlink", "fp32", "--precision", "fp32", "--threads", "1"],
        *["--out", str(tmp_path / "run")],
    ]
    with redirect_stdout(io.StringIO()):
        run_job(parse_args(flags, defaults=Config()))
    small.write(tmp_path / "task")
    task = Task.load(tmp_path / "task")
    net = task.build(torch.channels_last).train()
    state = [p.detach() for p in net.parameters()] + [b for b in net.buffers() if b.is_floating_point()]
    plain_loop.run_round(task, net, state, 0, rank=0, ranks=1, bf16=False)
    ours, start = load_file(tmp_path / "run" / "model.safetensors"), task.build().state_dict()
    names = [name for name, value in start.items() if value.is_floating_point()]
    apart, moved = (
        torch.cat([(a[n] - b[n]).double().flatten() for n in names]).norm()
        for a, b in ((ours, net.state_dict()), (net.state_dict(), start))
    )
    assert apart < overhead.TOLERANCE * moved


def test_two_ranks_of_the_loop_share_the_cohort(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_task(cifar).write(tmp_path / "task")
    task = Task.load(tmp_path / "task")
    seen: list[list[int]] = []

    def noted(task: Task, model: torch.nn.Module, client: int, seed: int, bf16: bool) -> int:
        seen[-1].append(client)
        return 1

    monkeypatch.setattr(plain_loop, "train", noted)
    monkeypatch.setattr(plain_loop.dist, "all_reduce", lambda total: None)
    for rank in (0, 1):
        seen.append([])
        net = task.build()
        plain_loop.run_round(task, net, [p.detach() for p in net.parameters()], 0, rank, 2, False)
    assert sorted(seen[0] + seen[1]) == task.cohorts[0]
    assert len(seen[0]) == 2


def test_a_task_normalizes_and_tests_by_the_formula(cifar: Path, tmp_path: Path) -> None:
    small_task(cifar).write(tmp_path / "task")
    task = Task.load(tmp_path / "task")
    x, y = task.client(2)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (task.mean, task.std))
    expected = (task.images[task.shares[2]].double() / 255 - mean) / std
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-6)  # one float32 rounding of values below 4
    assert torch.equal(y, task.labels[task.shares[2]])
    assert sorted(torch.cat(task.shares).tolist()) == list(range(100))
    images = np.load(tmp_path / "images" / "test_images.npy")
    labels = torch.from_numpy(np.load(tmp_path / "images" / "test_labels.npy"))

    class Oracle(torch.nn.Module):
        """Right for the first five test images and wrong for all others."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answers = torch.where(torch.arange(20) < 5, labels, (labels + 1) % 10)
            return functional.one_hot(answers, 10).float()

    assert len(images) == 20
    assert task.accuracy(Oracle()) == 0.25


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_that_of_the_tree_and_of_its_largest_processes(tmp_path: Path) -> None:
    child = "import time; x = b'1' * 60_000_000; time.sleep(0.8)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    run = federated_task.run_system(
        [sys.executable, "-c", script], 1, tmp_path / "log", lambda: ([2e9, 2e9 + 1, 2e9 + 3], {"accuracy": 1.0})
    )
    assert 60 < run.rank_mb < 120
    assert run.rank_mb < run.tree_mb < 200
    assert run.rounds_s == [1, 2]
    assert os.getpid() in federated_task.process_tree(os.getpid())


def test_a_system_that_fails_names_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('why'); raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match=f"exit code 3 .*see {tmp_path / 'log'}"):
        federated_task.run_system(command, 1, tmp_path / "log", lambda: ([], {}))
    assert (tmp_path / "log").read_text() == "why\n"


def test_rivals_without_an_environment_are_named_with_the_cure() -> None:
    pythons, missing = bench_rounds.find_rivals([f"pfl={sys.executable}"])  # has torch, but not pfl
    assert pythons == {}
    assert "Flower" in missing[1]
    assert "pip install 'pfl[pytorch]'" in missing[0]


def row(system: str, rounds_s: list[float], **changes: object) -> bench_rounds.Row:
    values = {"processes": 2, "threads": 1, "precision": "fp32", "channels_last": False, "first_s": [4.0], "rank_mb": 1}
    values |= {"tree_mb": 2.0, "mb_a_round": 0.5, "accuracy": [0.5, 0.6], "versions": {"torch": "2"}}
    return bench_rounds.Row("cnn62k", "arm", bench_rounds.NAMES[system], rounds_s=rounds_s, **(values | changes))


def test_ratios_are_to_the_fastest_arm_that_pfl_offers_by_itself() -> None:
    rows = [
        row("fedq", [1.0, 3.0, 2.0], channels_last=True),
        row("pfl", [4.0, 4.0, 9.0]),
        row("pfl", [5.0], processes=1),
        row("pfl", [1.0], channels_last=True),
        row("pfl", [1.0], precision="bf16"),
    ]
    assert bench_rounds.fastest(rows, "cnn62k", "pfl") == 4.0
    assert bench_rounds.fastest(rows, "cnn62k", "flwr") is None
    small = federated_task.FederatedTask("cnn62k", Path(), 3)
    lines = bench_rounds.table(rows, small, ["Flower, because."], "python x").splitlines()
    line = next(line for line in lines if line.startswith("| cnn62k | fedq"))
    assert "| 2.000 (1.500-2.500) | 0.50 | 4.0 | 2 | 1 | 0.50 | 55.0 |" in line
    assert "Left out: Flower, because." in lines
    tables = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1


@pytest.mark.slow
def test_scripts_of_rivals_need_nothing_of_fedq_but_its_networks() -> None:
    """They run in environments that have torch and the rival alone."""
    script = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {"pyarrow", "yaml", "rich", "tyro", "safetensors", "tensorboard", "sklearn"}:
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocker())
    import plain_loop, task
    """
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks" / "rivals")])}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environ, timeout=120)
