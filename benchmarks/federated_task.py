"""One federated task for fedq and for those it is compared with: the job's flags, and the same task as files.

Also: how a system's processes are started, timed and weighed, from outside and all in the same way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedq.data import load_dataset
from fedq.federated.cohort import sample_cohort
from fedq.federated.partition import partition
from fedq.kernels import derive_seed
from fedq.models import build_model
from fedq.runfolder import environment_info

ROOT = Path(__file__).resolve().parent.parent
_POLL_S = 0.1
_LIMIT_S = 3600


@dataclass(frozen=True)
class FederatedTask:
    """FedAvg on CIFAR-10 without augmentation, plain SGD, one epoch a round, no validation set.

    Args:
        model: Name of the network.
        data_dir: Where CIFAR-10 is.
        num_rounds: Rounds of one run.
        num_clients: Clients, IID.
        cohort: Of them, in each round.
        batch_size: Images a step.
        lr: Local learning rate.
        seed: Of weights, shares, cohorts and orders.
    """

    model: str
    data_dir: Path
    num_rounds: int
    num_clients: int = 100
    cohort: int = 10
    batch_size: int = 50
    lr: float = 0.1
    seed: int = 0

    def flags(self) -> list[str]:
        """Return the flags of fedq's job, all but those of the arms."""
        values = {
            "--data-dir": self.data_dir,
            "--model": self.model,
            "--rounds": self.num_rounds,
            "--eval-every": self.num_rounds,
            "--num-clients": self.num_clients,
            "--cohort": self.cohort,
            "--batch-size": self.batch_size,
            "--lr": self.lr,
            "--seed": self.seed,
        }
        fixed = "--dataset cifar10 --val-fraction 0 --no-augment --lr-schedule constant"
        fixed += " --optimizer sgd:momentum=0,weight_decay=0"
        return [*fixed.split(), "--device", "cpu", *(str(part) for pair in values.items() for part in pair)]

    def write(self, folder: Path) -> None:
        """Write images, shares, cohorts, seeds and first weights, exactly those that fedq's job makes of its flags."""
        images = folder.parent / "images"  # shared by all tasks there
        for path in (folder, images):
            path.mkdir(parents=True, exist_ok=True)
        data = load_dataset("cifar10", data_dir=self.data_dir, val_fraction=0, seed=self.seed)
        for name, split in (("train", data.train), ("test", data.test)):
            np.save(images / f"{name}_images.npy", split.images.numpy())
            np.save(images / f"{name}_labels.npy", split.labels.numpy())
        shares = partition(data.train.labels, self.num_clients, "iid", seed=self.seed)
        np.savez(folder / "shares.npz", **{str(i): share.numpy() for i, share in enumerate(shares)})  # type: ignore[arg-type]
        torch.manual_seed(derive_seed(self.seed, "weights"))
        torch.save(build_model(self.model).state_dict(), folder / f"{self.model}.pt")
        rounds = range(self.num_rounds)
        cohorts = [sample_cohort(self.num_clients, self.cohort, seed=self.seed, round=r) for r in rounds]
        document = {
            "model": self.model,
            "num_rounds": self.num_rounds,
            "cohorts": cohorts,
            "seeds": [[derive_seed(self.seed, "local", r, client) for client in cohorts[r]] for r in rounds],
            "lr": self.lr,
            "batch_size": self.batch_size,
            "mean": data.mean,
            "std": data.std,
        }
        (folder / "task.json").write_text(json.dumps(document))


@dataclass(frozen=True)
class Run:
    """One run of one system.

    Args:
        first_s: From the start of its processes to the end of its first round.
        rounds_s: Seconds of each later round, all that lies between two rounds included.
        rank_mb: Peak memory (VmHWM) of its largest processes, as many as it has ranks; mean.
        tree_mb: Peak of the sum over all of its processes' resident memory.
        facts: What the system said of itself: accuracy, MB a round, versions.
    """

    first_s: float
    rounds_s: list[float]
    rank_mb: float
    tree_mb: float
    facts: dict[str, Any]


class Memory:
    """Peak memory of a process and of all that it starts, looked up in /proc ten times a second."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.tree_mb = 0.0
        self._peaks: dict[int, float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def largest_mb(self, num: int) -> float:
        """Return the mean peak of the largest processes; launchers are smaller than what they start."""
        largest = sorted(self._peaks.values())[-num:]
        return sum(largest) / max(1, len(largest))

    def _watch(self) -> None:
        before: set[int] = set()
        while not self._done.wait(_POLL_S):
            total, tree = 0.0, set(process_tree(self.root))
            for pid in tree & before:  # one that has just been forked still shares all of its parent's memory
                peak, now = _memory_mb(pid)
                self._peaks[pid] = max(peak, self._peaks.get(pid, 0.0))
                total += now
            self.tree_mb, before = max(self.tree_mb, total), tree


def process_tree(root: int) -> list[int]:
    """Return a process and all of its living descendants."""
    pids, found = [root], []
    while pids:
        pid = pids.pop()
        found.append(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except OSError:  # it has ended
            continue
    return found


def _memory_mb(pid: int) -> tuple[float, float]:
    """Return a process's peak and present resident memory in MB, zeros if it has ended."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return 0.0, 0.0
    peak, now = (int(lines.get(key, "0 kB").split()[0]) * 1024 / 1e6 for key in ("VmHWM", "VmRSS"))
    return peak, now


def launcher(python: str, ranks: int) -> list[str]:
    """Return the command that starts a script on one rank, or on several under torchrun."""
    if ranks == 1:
        return [python]
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def run_system(
    command: Sequence[str], ranks: int, log: Path, read: Callable[[], tuple[list[float], dict[str, Any]]]
) -> Run:
    """Run a system to its end.

    Args:
        command: Its command line.
        ranks: Processes that train.
        log: Takes its output.
        read: Called at the end; returns when each round ended, in seconds since the epoch, and its facts.

    Raises:
        RuntimeError: It failed; names the log.
    """
    source = [str(ROOT), str(ROOT / "benchmarks" / "rivals"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(source), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as output:
        begin = time.time()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ, cwd=log.parent)
        with Memory(process.pid) as memory:
            code = process.wait(_LIMIT_S)
    if code != 0:
        raise RuntimeError(f"exit code {code} of {' '.join(command)}; see {log}")
    ends, facts = read()
    return Run(ends[0] - begin, np.diff(ends).tolist(), memory.largest_mb(ranks), memory.tree_mb, facts)


def run_fedq(task: FederatedTask, flags: Sequence[str], ranks: int, threads: int, out: Path) -> Run:
    """Run fedq's job; its rounds end when TensorBoard's scalars of the round were written."""
    options = [*task.flags(), *flags, "--threads", str(threads), "--out", str(out)]
    command = [*launcher(sys.executable, ranks), str(ROOT / "train.py"), *options]

    def read() -> tuple[list[float], dict[str, Any]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(out / "tensorboard"))
        events.Reload()
        summary = json.loads((out / "summary.json").read_text())
        crossed = summary["wire_bytes"] / summary["rounds"]
        facts = {
            "accuracy": summary["test_accuracy"],
            "mb_a_round": crossed / 1e6,
            "versions": {"fedq": (summary["git_commit"] or "unknown")[:10]},
            "precision": summary["precision"],
            "updates_mb_a_round": summary["uplink_bytes"] / summary["rounds"] / 1e6,
            "folder": str(out),
        }
        return [event.wall_time for event in events.Scalars("run/seconds")], facts

    return run_system(command, ranks, out.with_suffix(".log"), read)


def run_script(
    python: str, script: str, task: Path, options: Sequence[str], ranks: int, threads: int, report: Path
) -> Run:
    """Run a script of `rivals/`, which writes a report."""
    path = ROOT / "benchmarks" / "rivals" / script
    given = ["--task", str(task), "--report", str(report), "--threads", str(threads), *options]

    def read() -> tuple[list[float], dict[str, Any]]:
        facts = json.loads(report.read_text())
        return facts.pop("ends"), facts | {"report": str(report)}

    return run_system([*launcher(python, ranks), str(path), *given], ranks, report.with_suffix(".log"), read)


def pooled(runs: Sequence[Run]) -> np.ndarray:
    """Return the seconds of all rounds but each run's first."""
    return np.concatenate([run.rounds_s for run in runs])


def hardware() -> str:
    """Return what the figures are taken on."""
    return f"{len(os.sched_getaffinity(0))} cores of {environment_info()['cpu']}"
