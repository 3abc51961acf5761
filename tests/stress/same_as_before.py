"""Runs short jobs of every mode by an earlier commit and by this tree: the same models, metrics and counted bytes.

    python tests/stress/same_as_before.py HEAD~5                 # a few minutes on two cores
    python tests/stress/same_as_before.py b3fc2dc --only network,resume

The commit is checked out beside this tree and its kernels are built. Both run on the same machine, in float32 on one
thread a rank, because sums inside a training step are rounded as the processor likes. What must be equal, file by file:
models (`*.safetensors`, `model.fedq`), the ledger's totals by direction, every number in `metrics.jsonl` but times.
Bytes between ranks that differ are told and are no failure: they belong to the simulation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300
SMALL = (
    "--dataset digits --train-examples 200 --model cnn62k --local-steps 2 --batch-size 16 --lr 0.05 --rounds 3 "
    "--precision fp32 --device cpu --threads 1"
)
FOUR = "--num-clients 4"
NOT_COMPARED = ("seconds", "root_ingress_bytes", "wire_bytes")
"""Of `metrics.jsonl`: times, and sums with bytes between ranks."""
TOLD = "ledger: peer"


@dataclass(frozen=True)
class Job:
    """A job, by how it is started and its flags.

    Args:
        name: Its name here.
        flags: Over `SMALL`.
        how: ``python``, ``ranks`` (two, by torchrun), ``accelerate``, ``deepspeed`` or ``network``.
        then: Flags with which it is gone on with; empty: it is not.
    """

    name: str
    flags: str
    how: str = "python"
    then: str = ""


STEP = "--exchange step --uplink int4 --downlink int8"
PERSONAL = f"{FOUR} --partition shards:classes=3 --uplink int8"
JOBS = (
    Job("round", f"{FOUR} --uplink int4", "ranks"),
    Job("round-optimizer", f"{FOUR} --uplink fp32 --downlink fp32 --server fedadam:lr=0.01 --norm-rule drop"),
    Job(
        "round-two-phase",
        f"{FOUR} --aggregate two_phase --uplink sign --downlink int4 --server fedavgm:lr=0.5",
        "ranks",
    ),
    Job(
        "round-faults",
        "--num-clients 7 --cohort 5 --partition dirichlet:alpha=0.5 --min-examples 2 --residual-memory 0.9 "
        "--uplink 'blocktopk:k=4,block=64 int4@2' --max-update-norm 1.2 --chaos nan=0.2,fail=0.1,seed=3",
        "ranks",
    ),
    Job("round-seed", f"{FOUR} --start seed --downlink-to all --uplink topk:density=0.1"),
    Job("side-by-side", f"{FOUR} --side-by-side 4 --uplink int4"),
    Job("step-reduce", f"{STEP} --schedule reduce --downlink fp32 --uplink fp32", "ranks"),
    Job("step-one-phase", f"{STEP} --schedule one_phase", "ranks"),
    Job("step-two-phase", f"{STEP} --schedule two_phase", "ranks"),
    Job("step-powersgd", "--exchange step --uplink powersgd:rank=2,start=2", "ranks"),
    Job("none", "--exchange none --num-clients 2", "ranks"),
    Job("few-bit", f"{FOUR} --weights binary --sends weights --server-sends weights"),
    Job("few-bit-layers", f"{FOUR} --weights head=8,body=2,tail=8 --uplink int4", "ranks"),
    Job("fedbat", f"{FOUR} --algorithm fedbat --uplink sign:rotate=false"),
    Job("local", f"{PERSONAL} --algorithm local"),
    Job("perfedavg", f"{PERSONAL} --algorithm perfedavg", "ranks"),
    Job("pfedme", f"{PERSONAL} --algorithm pfedme"),
    Job("mutual", f"{PERSONAL} --algorithm mutual"),
    Job("qupel", f"{PERSONAL} --algorithm qupel --client-bits 2"),
    Job("quped", f"{PERSONAL} --algorithm quped --client-bits 1,2,32", "ranks"),
    Job("quped-alone", "--exchange none --num-clients 2 --algorithm quped --client-bits 2 --rounds 4"),
    Job("network", "--num-clients 2 --uplink int4", "network"),
    Job("resume", f"{FOUR} --uplink int4 --server fedadam:lr=0.01 --lr-schedule constant", "ranks", "--rounds 5"),
    Job("resume-step", f"{STEP} --lr-schedule constant", "ranks", "--rounds 5"),
    Job("resume-quped", f"{PERSONAL} --algorithm quped --client-bits 2 --lr-schedule constant", then="--rounds 5"),
    Job("accelerate", f"{FOUR} --uplink int4", "accelerate"),
    Job("deepspeed", f"{FOUR} --uplink int4", "deepspeed"),
    Job("deepspeed-step", STEP, "deepspeed"),
)
HANDED_OVER = [job for job in JOBS if job.then]
"""Jobs that the commit begins and this tree goes on with."""


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _launcher(how: str) -> list[str]:
    program = str(Path(sys.executable).parent)
    return {
        "python": [sys.executable],
        "ranks": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": [f"{program}/accelerate", "launch", "--multi_gpu", "--num_processes", "2"],
        "deepspeed": [f"{program}/deepspeed", "--num_accelerators", "2", "--master_port", str(_port())],
    }[how]


def _environ(tree: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def run(tree: Path, job: Job, out: Path) -> None:
    """Run a job by a tree's code."""
    flags = shlex.split(f"{SMALL} {job.flags}")
    if job.how == "network":
        _run_network(tree, flags, out)
    else:
        _execute(tree, [*_launcher(job.how), "train.py", *flags, "--out", str(out)])


def go_on(tree: Path, job: Job, out: Path) -> None:
    """Go on with a job by a tree's code."""
    _execute(tree, [*_launcher(job.how), "train.py", "--resume", str(out), *shlex.split(job.then)])


def _execute(tree: Path, command: list[str]) -> None:
    done = subprocess.run(command, cwd=tree, env=_environ(tree), capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} in {tree} ended with {done.returncode}\n{done.stdout}{done.stderr}")


def _run_network(tree: Path, flags: list[str], out: Path) -> None:
    address, fedq = f"localhost:{_port()}", [sys.executable, "-m", "fedq"]
    commands = [[*fedq, "server", "--insecure", "--bind", address, *flags, "--out", str(out)]]
    for number in range(2):
        own = ["--number", str(number), "--out", f"{out}-client{number}", "--threads", "1", "--device", "cpu"]
        commands.append([*fedq, "client", "--insecure", "--connect", address, *own])
    with tempfile.TemporaryFile("w+") as log:
        parties = [
            subprocess.Popen(command, cwd=out.parent, env=_environ(tree), stdout=log, stderr=log)
            for command in commands
        ]
        try:
            codes = [party.wait(LIMIT_S) for party in parties]
        finally:
            for party in parties:
                party.kill()
        if any(codes):
            log.seek(0)
            raise RuntimeError(f"{commands} in {tree} ended with {codes}\n{log.read()}")


def outcome(out: Path) -> dict[str, Any]:
    """Return all of a run that must not change, by name."""
    files = sorted([*out.glob("*.safetensors"), *out.glob("personal/*.safetensors"), *out.glob("model.fedq")])
    found: dict[str, Any] = {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}
    for row in pq.read_table(out / "ledger.parquet").to_pylist():
        totals = found.setdefault(f"ledger: {row['direction']}", {})
        for name, value in row.items():
            if name.endswith("bytes"):
                totals[name] = totals.get(name, 0) + value
    for text in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(text)
        found |= {f"{name} of round {row['round']}": row[name] for name in row if name not in NOT_COMPARED}
    return found


def compare(before: Path, now: Path) -> tuple[list[str], list[str]]:
    """Return what differs between two runs, and what differs and may."""
    old, new = outcome(before), outcome(now)
    differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    words = {name: f"{name}: {old.get(name)} -> {new.get(name)}" for name in differ}
    return [text for name, text in words.items() if name != TOLD], [words[TOLD]] if TOLD in words else []


@contextmanager
def checked_out(commit: str, place: Path) -> Iterator[Path]:
    """Give a tree of a commit with its kernels built."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
    try:
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=place, check=True)
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


def _both(job: Job, old: Path, work: Path, *, is_handed_over: bool = False) -> tuple[list[str], list[str]]:
    runs = {}
    for name, tree in (("before", old), ("now", ROOT)):
        out = runs[name] = work / f"{job.name}-{name}"
        run(old if is_handed_over else tree, job, out)
        if job.then:
            go_on(tree, job, out)
    differences = compare(runs["before"], runs["now"])
    for out in work.iterdir():
        shutil.rmtree(out)
    return differences


def main(argv: list[str] | None = None) -> int:
    """Run and report; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--only", default="", help="names of jobs, or their beginnings, with commas")
    args = parser.parse_args(argv)
    wanted = tuple(args.only.split(",")) if args.only else ("",)
    jobs = [(job, False) for job in JOBS] + [(job, True) for job in HANDED_OVER]
    failed = 0
    with tempfile.TemporaryDirectory() as folder, checked_out(args.commit, Path(folder) / "before") as old:
        work = Path(folder) / "work"
        work.mkdir()
        for job, is_handed_over in jobs:
            if not job.name.startswith(wanted):
                continue
            title = job.name + (", begun before and gone on with now" if is_handed_over else "")
            try:
                wrong, told = _both(job, old, work, is_handed_over=is_handed_over)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                wrong, told = [str(error)], []
            failed += bool(wrong)
            print("\n    ".join([f"{'DIFFERS' if wrong else 'same   '}  {title}", *wrong, *told]), flush=True)
    print(f"{failed} of the jobs differ" if failed else "all the same")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
