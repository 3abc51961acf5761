"""What fedq's rounds cost beside a hand-written PyTorch loop with the same maths, and whether both end the same.

    python benchmarks/speed/overhead.py --data-dir DIR --work DIR --models cnn62k cnn1m resnet20 --out rows.json

The loop is `rivals/plain_loop.py`: the same weights, shares, cohorts and orders, the same memory format, a float32
all-reduce a round and nothing else. fedq does its whole job beside: messages, ledger, checkpoint, metrics, TensorBoard.
Runs of all arms alternate; the seconds are those of all rounds but each run's first. Exits with 1 if the models after
one round differ by more than the order of float32 sums explains. (Later rounds amplify any rounding: one unit in the
last place of cnn62k's first weights moves the model after four rounds by 5 % of the way it has gone.)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of what the benchmarks share

from evidence import replace_section
from federated_task import FederatedTask, Run, hardware, pooled, run_fedq, run_script
from safetensors.torch import load_file

TITLE = "Overhead of a round"
LOOP = "hand-written loop"
FEDQ = {
    "fedq, fp32": "--uplink fp32 --downlink fp32",
    "fedq, int4 up, int8 down": "--uplink int4 --downlink int8",
}
# Ten updates summed in another order differ by a few roundings of 2^-24 of the weights, which moved by a tenth or more.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Row:
    """One system's figures for one network and number of ranks."""

    model: str
    ranks: int
    threads: int
    system: str
    rounds_s: list[float]
    ratio: float
    first_s: float
    rank_mb: float
    memory_ratio: float
    accuracy: float
    difference: float | None
    """Norm of the difference to the loop's model after one round, as a share of how far that has moved."""


def run_arm(task: FederatedTask, name: str, ranks: int, threads: int, place: Path) -> Run:
    if name == LOOP:
        options, report = ["--channels-last"], place.with_suffix(".json")
        return run_script(
            sys.executable, "plain_loop.py", place.parent / f"task-{task.num_rounds}", options, ranks, threads, report
        )
    return run_fedq(task, [*FEDQ[name].split(), "--precision", "fp32"], ranks, threads, place)


def run_arms(task: FederatedTask, ranks: int, threads: int, repetitions: int, work: Path) -> dict[str, list[Run]]:
    """Run every arm as often as asked, in turns that begin with another arm each time."""
    runs: dict[str, list[Run]] = {LOOP: [], **{name: [] for name in FEDQ}}
    names = list(runs)
    for repetition in range(repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            run = run_arm(task, name, ranks, threads, work / f"{names.index(name)}-{repetition}")
            runs[name].append(run)
            print(f"{task.model}, {ranks} ranks, {name}: {np.median(run.rounds_s):.3f} s a round", flush=True)
    return runs


def difference(task: FederatedTask, ranks: int, threads: int, work: Path) -> float:
    """Return |fedq - loop| / |loop - start| of the models after one round."""
    one, name = replace(task, num_rounds=1), "fedq, fp32"
    loop, fedq = (run_arm(one, arm, ranks, threads, work / f"one-{arm == name:d}") for arm in (LOOP, name))
    start = torch.load(work / "task-1" / f"{task.model}.pt", weights_only=True)
    theirs = torch.load(Path(loop.facts["report"]).with_suffix(".pt"), weights_only=True)
    ours = load_file(Path(fedq.facts["folder"]) / "model.safetensors")
    names = [name for name, tensor in start.items() if tensor.is_floating_point()]
    apart, moved = (
        torch.cat([(a[n].double() - b[n].double()).flatten() for n in names]).norm()
        for a, b in ((ours, theirs), (theirs, start))
    )
    return float(apart / moved)


def rows_of(task: FederatedTask, ranks: int, threads: int, repetitions: int, work: Path) -> Iterator[Row]:
    for num_rounds in (1, task.num_rounds):
        replace(task, num_rounds=num_rounds).write(work / f"task-{num_rounds}")
    apart = difference(task, ranks, threads, work)
    runs = run_arms(task, ranks, threads, repetitions, work)
    loop_s = float(np.median(pooled(runs[LOOP])))
    loop_mb = max(run.rank_mb for run in runs[LOOP])
    for name, done in runs.items():
        rounds_s = pooled(done)
        rank_mb = max(run.rank_mb for run in done)
        yield Row(
            model=task.model,
            ranks=ranks,
            threads=threads,
            system=name,
            rounds_s=rounds_s.round(4).tolist(),
            ratio=float(np.median(rounds_s)) / loop_s,
            first_s=float(np.median([run.first_s for run in done])),
            rank_mb=rank_mb,
            memory_ratio=rank_mb / loop_mb,
            accuracy=done[0].facts["accuracy"],
            difference=apart if "fp32" in name else None,
        )


def table(rows: list[Row], task: FederatedTask, command: str) -> str:
    lines = [
        f"## {TITLE}",
        "",
        f"FedAvg on CIFAR-10, {task.num_clients} IID clients, {task.cohort} a round, one epoch, batch "
        f"{task.batch_size}, SGD {task.lr:g}, float32, channels last; {hardware()}, torch {torch.__version__}.",
        "",
        f"Median seconds a round with quartiles, over {len(rows[0].rounds_s)} rounds in alternating runs, each run's "
        f'first round left out. "Until round 1": from the start of the processes to the end of the first round. '
        f'Memory: peak of a rank (VmHWM). "Apart": distance of the models after one round, as a share of how far the '
        f"weights moved.",
        "",
        "| network | ranks x threads | system | s a round | to the loop | until round 1, s | peak MB a rank "
        "| to the loop | test accuracy, % | apart |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        low, median, high = np.percentile(row.rounds_s, [25, 50, 75])
        apart = "" if row.difference is None else f"{row.difference:.1e}"
        lines.append(
            f"| {row.model} | {row.ranks} x {row.threads} | {row.system} | {median:.3f} ({low:.3f}-{high:.3f}) "
            f"| {row.ratio:.2f} | {row.first_s:.1f} | {row.rank_mb:.0f} | {row.memory_ratio:.2f} "
            f"| {100 * row.accuracy:.1f} | {apart} |"
        )
    return "\n".join([*lines, "", f"Re-made by `{command}`.", ""])


def arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="a new folder, where the runs go")
    parser.add_argument("--models", nargs="+", default=["cnn62k", "cnn1m"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--cores", type=int, default=cores, help="shared by the ranks; default: all")
    parser.add_argument("--rounds", type=int, default=8, help="of one run")
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each arm")
    parser.add_argument("--out", type=Path, help="takes the rows as JSON")
    parser.add_argument("--table", type=Path, help="Markdown file whose section is replaced; default: print")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    work = args.work.resolve()
    rows: list[Row] = []
    for model in args.models:
        task = FederatedTask(model, args.data_dir.resolve(), args.rounds)
        for ranks in args.ranks:
            threads = max(1, args.cores // ranks)
            rows += rows_of(task, ranks, threads, args.repetitions, work / f"{model}-{ranks}")
    if args.out:
        args.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    command = f"python benchmarks/speed/overhead.py --data-dir DIR --work DIR --models {' '.join(args.models)}"
    section = table(rows, task, command)
    if args.table:
        replace_section(args.table, TITLE, section)
    print(section)
    wrong = [row for row in rows if row.difference is not None and not row.difference < TOLERANCE]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
