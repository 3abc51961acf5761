"""The same small job under every launcher, for tests: its flags, how a launcher is run, and a private SLURM cluster."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[2]
LIMIT_S = 200  # of one command; DeepSpeed may compile for a minute when it is first used

# Digits come with scikit-learn; one thread, so that sums have one order wherever the job runs.
SMALL = (
    *("--dataset", "digits", "--train-examples", "200", "--model", "cnn62k", "--num-clients", "4"),
    *("--local-steps", "2", "--batch-size", "16", "--precision", "fp32", "--device", "cpu", "--threads", "1"),
)


def environ(**more: str) -> dict[str, str]:
    """Return this process's environment without a launcher's traces, for a process that finds fedq and its tools."""
    ours = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM_", "ACCELERATE_"))}
    path = f"{Path(sys.executable).parent}:{ours.get('PATH', '')}:/usr/sbin:/sbin"
    return ours | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def require(*programs: str) -> None:
    """Skip the test where a program is not installed."""
    missing = [program for program in programs if shutil.which(program, path=environ()["PATH"]) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def execute(*command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's root, within the limit, and return what it said, whatever its exit code."""
    if command[0] == sys.executable:
        return warm.run(command[1:], env=env or environ(), cwd=ROOT, limit_s=LIMIT_S)
    return subprocess.run(command, cwd=ROOT, env=env or environ(), capture_output=True, text=True, timeout=LIMIT_S)


def train(out: Path, launcher: tuple[str, ...], *flags: str, env: Mapping[str, str] | None = None) -> Path:
    """Run the small job by `launcher` and return its folder."""
    done = execute(*launcher, "train.py", *SMALL, "--rounds", "2", "--out", str(out), *flags, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def command(out: Path, *more: str) -> list[str]:
    """Return the command of the small job of three rounds."""
    return [sys.executable, str(ROOT / "train.py"), *SMALL, "--rounds", "3", "--out", str(out), *more]


def files_of(folder: Path) -> set[str]:
    """Return the files of a run, without the events of TensorBoard, which are named by time."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith("tensorboard")}


def torchrun(num_ranks: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))


def results(out: Path) -> tuple[bytes, bytes]:
    """Return the bytes of a run's model and ledger: all that must not depend on the launcher."""
    return (out / "model.safetensors").read_bytes(), (out / "ledger.parquet").read_bytes()


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def free_ports(num: int = 1) -> int:
    """Return the first of so many ports in a row that are free just now."""
    for _ in range(100):
        first = random.randrange(10000, 20000)
        with ExitStack() as stack:
            try:
                for port in range(first, first + num):
                    stack.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


@contextmanager
def slurm_cluster() -> Iterator[dict[str, str]]:
    """Start a cluster of two nodes, node1 and node2, on this machine; yield the environment of its users."""
    require("munged", "slurmctld", "slurmd", "sbatch", "srun")
    if os.geteuid() != 0:
        pytest.skip("only root can start a SLURM cluster")
    # A short path, because a socket's is limited; and entered by all, as munge wants it.
    with tempfile.TemporaryDirectory(prefix="fedq-slurm-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        script = str(ROOT / ".ci/slurm_cluster")
        try:
            up = execute(script, "up", folder, str(free_ports(3)))
            assert up.returncode == 0, up.stdout + up.stderr
            yield environ(SLURM_CONF=f"{folder}/slurm.conf")
        finally:
            execute(script, "down", folder)


def until(condition: Callable[[], object], what: str, limit_s: float = 60) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s:g} s in vain for {what}"
        time.sleep(0.05)
