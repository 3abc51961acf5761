"""Seconds a round of fedq, a hand-written loop, pfl-research and Flower on one federated task, alternated in one run.

    python benchmarks/speed/bench_rounds.py --data-dir DIR --work DIR --models cnn62k cnn1m \\
        --rival-python pfl=PFL/bin/python --rival-python flwr=FLWR/bin/python --out rows.json --table docs/results.md

The task: FedAvg on CIFAR-10, 100 IID clients of 500 images, 10 a round, one epoch, batch 50, SGD 0.1, no augmentation.
All systems train the same network from the same weights on the same shares; fedq and the loop the same cohorts in the
same order. Each rival runs in an environment of its own:

    python -m venv PFL && PFL/bin/pip install 'pfl[pytorch]'
    python -m venv FLWR && FLWR/bin/pip install 'flwr[simulation]' torch

A rival without one is named and left out. Rivals run as their users would write them (contiguous tensors, float32); the
arms "channels last" and "bf16" give them what fedq chooses by itself, where their user can ask for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of what the benchmarks share

from evidence import replace_section
from federated_task import FederatedTask, Run, hardware, pooled, run_fedq, run_script

from fedq.engines.precision import choose_precision
from fedq.report.encoding import make_readable

TITLE = "Rounds beside other systems"
SCRIPTS = {"loop": "plain_loop.py", "pfl": "pfl_rounds.py", "flwr": "flower_rounds.py"}
NAMES = {"fedq": "fedq", "loop": "hand-written loop", "pfl": "pfl-research", "flwr": "Flower"}
INSTALL = {"pfl": "'pfl[pytorch]'", "flwr": "'flwr[simulation]' torch"}
FEDQ_FLAGS = "--uplink fp32 --downlink fp32"


@dataclass(frozen=True)
class Arm:
    """A system, and how it is asked to run.

    Args:
        system: A key of `NAMES`.
        processes: That train; they share the cores.
        precision: fp32 or bf16.
        channels_last: Memory format of images and weights; fedq chooses its own.
    """

    system: str
    processes: int
    precision: str = "fp32"
    channels_last: bool = False

    @property
    def key(self) -> str:
        """The name that ``--arms`` knows, for example ``pfl-2-bf16-last``."""
        last = ["last"] if self.channels_last and self.system != "fedq" else []
        return "-".join([self.system, str(self.processes), self.precision, *last])

    def options(self) -> list[str]:
        """Return the options of its script."""
        given = ["--bf16"] if self.precision == "bf16" else []
        return given + (["--channels-last"] if self.channels_last else [])


ARMS = [
    Arm("fedq", 2, channels_last=True),
    Arm("fedq", 1, channels_last=True),
    Arm("loop", 2),
    Arm("pfl", 2),
    Arm("pfl", 1),
    Arm("flwr", 2),
    Arm("flwr", 1),
    Arm("loop", 2, channels_last=True),
    Arm("pfl", 2, channels_last=True),
    Arm("flwr", 2, channels_last=True),
    Arm("fedq", 2, "bf16", channels_last=True),
    Arm("loop", 2, "bf16", channels_last=True),
    Arm("pfl", 2, "bf16"),
    Arm("flwr", 2, "bf16"),
]


@dataclass(frozen=True)
class Row:
    """One arm's figures for one network; seconds and MB as in `federated_task.Run`."""

    model: str
    arm: str
    system: str
    processes: int
    threads: int
    precision: str
    channels_last: bool
    rounds_s: list[float]
    first_s: list[float]
    rank_mb: float
    tree_mb: float
    mb_a_round: float
    accuracy: list[float]
    versions: dict[str, str]

    @property
    def median_s(self) -> float:
        """Median seconds a round."""
        return float(np.median(self.rounds_s))


class Bench:
    """Runs arms of one task.

    Args:
        task: The task.
        work: A new folder.
        cores: Shared by the processes of an arm.
        pythons: Interpreters of the rivals.
    """

    def __init__(self, task: FederatedTask, work: Path, cores: int, pythons: dict[str, str]) -> None:
        self.task = task
        self.work = work
        self.cores = cores
        self.pythons = pythons | {"loop": sys.executable}
        task.write(work / "task")

    def threads(self, arm: Arm) -> int:
        """Return the threads of each of an arm's processes."""
        return max(1, self.cores // arm.processes)

    def run(self, arm: Arm, repetition: int) -> Run:
        """Run an arm once."""
        place, threads = self.work / f"{arm.key}-{repetition}", self.threads(arm)
        if arm.system == "fedq":
            flags = [*FEDQ_FLAGS.split(), "--precision", arm.precision]
            return run_fedq(self.task, flags, arm.processes, threads, place)
        options, ranks = arm.options(), arm.processes
        if arm.system == "flwr":  # starts its own processes, and its server trains nothing
            options, ranks = [*options, "--processes", str(arm.processes)], 1
        python, report = self.pythons[arm.system], place.with_suffix(".json")
        return run_script(python, SCRIPTS[arm.system], self.work / "task", options, ranks, threads, report)

    def rows(self, arms: list[Arm], repetitions: int) -> Iterator[Row]:
        """Run all arms in turns, each turn beginning with another one."""
        runs: dict[Arm, list[Run]] = {arm: [] for arm in arms}
        for repetition in range(repetitions):
            shift = repetition % len(arms)
            for arm in arms[shift:] + arms[:shift]:
                run = self.run(arm, repetition)
                runs[arm].append(run)
                words = f"{np.median(run.rounds_s):.3f} s a round, {run.first_s:.1f} s until round 1"
                print(f"{self.task.model} {arm.key} {repetition}: {words}", flush=True)
        for arm, done in runs.items():
            yield Row(
                model=self.task.model,
                arm=arm.key,
                system=NAMES[arm.system],
                processes=arm.processes,
                threads=self.threads(arm),
                precision=arm.precision,
                channels_last=arm.channels_last,
                rounds_s=pooled(done).round(4).tolist(),
                first_s=[round(run.first_s, 2) for run in done],
                rank_mb=max(run.rank_mb for run in done),
                tree_mb=max(run.tree_mb for run in done),
                mb_a_round=done[0].facts["mb_a_round"],
                accuracy=[run.facts["accuracy"] for run in done],
                versions=done[0].facts["versions"],
            )


def fastest(rows: list[Row], model: str, system: str, precision: str = "fp32") -> float | None:
    """Return the fewest median seconds a round of a system's arms with contiguous tensors (fedq: any)."""
    own = [row for row in rows if (row.model, row.system, row.precision) == (model, NAMES[system], precision)]
    return min((row.median_s for row in own if system == "fedq" or not row.channels_last), default=None)


def _line(row: Row, rows: list[Row]) -> str:
    low, high = np.percentile(row.rounds_s, [25, 75])
    reference = fastest(rows, row.model, "pfl") or fastest(rows, row.model, "loop")
    ratio = f"{row.median_s / reference:.2f}" if reference else ""
    layout = "channels last" if row.channels_last else "contiguous"
    return (
        f"| {row.model} | {row.system} | {row.processes} x {row.threads} | {row.precision}, {layout} "
        f"| {row.median_s:.3f} ({low:.3f}-{high:.3f}) | {ratio} | {np.median(row.first_s):.1f} | {row.tree_mb:.0f} "
        f"| {row.rank_mb:.0f} | {row.mb_a_round:.2f} | {100 * np.mean(row.accuracy):.1f} |"
    )


def table(rows: list[Row], task: FederatedTask, missing: list[str], command: str) -> str:
    """Return the section: the set-up, a line for each arm, and what was left out."""
    versions = {f"{name} {value}" for row in rows for name, value in row.versions.items() if name != "fedq"}
    auto = choose_precision("auto", torch.device("cpu")).name
    repetitions = len(rows[0].first_s)
    lines = [
        f"## {TITLE}",
        "",
        f"FedAvg on CIFAR-10, {task.num_clients} IID clients, {task.cohort} a round, one epoch, batch "
        f"{task.batch_size}, SGD {task.lr:g}, no augmentation, no evaluation. {repetitions} alternating runs of "
        f"{task.num_rounds} rounds an arm, on {hardware()}; {', '.join(sorted(versions))}.",
        "",
        'Median seconds a round with quartiles, each run\'s first round left out. "To pfl": median over that of '
        'pfl-research\'s fastest arm in float32 with contiguous tensors. "Until round 1": from the start of the '
        "processes to the end of the first round, median. Memory: peak of all processes together (resident), and of "
        "one that trains. MB a round: between processes. Accuracy: after the last round, mean over the runs. fedq's "
        f"`--precision auto` is {auto} on this machine.",
        "",
        "| network | system | processes x threads | arithmetic | s a round | to pfl | until round 1, s | MB in all "
        "| MB a rank | MB a round | test accuracy, % |",
        "|---" * 11 + "|",
        *(_line(row, rows) for row in rows),
        "",
        *(f"Left out: {words}" for words in missing),
        f"Re-made by `{command}`.",
        "",
    ]
    return "\n".join(lines)


def find_rivals(given: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the rivals' interpreters that work, and what to do about the others."""
    pythons = dict(item.split("=", 1) for item in given)
    missing = []
    for module, packages in INSTALL.items():
        python = pythons.get(module)
        command = [python or "", "-c", f"import {module}, torch"]
        if python is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pythons.pop(module, None)
            install, flag = (
                f"python -m venv DIR && DIR/bin/pip install {packages}",
                f"--rival-python {module}=DIR/bin/python",
            )
            missing.append(f"{NAMES[module]}, without an environment that works: `{install}`, then `{flag}`.")
    return pythons, missing


def arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    known = [arm.key for arm in ARMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="a new folder, where the runs go")
    parser.add_argument("--models", nargs="+", default=["cnn62k", "cnn1m"])
    parser.add_argument("--rival-python", action="append", default=[], metavar="NAME=PATH", help="pfl or flwr")
    parser.add_argument("--arms", nargs="+", choices=known, default=known, metavar="ARM", help=f"of {', '.join(known)}")
    parser.add_argument("--rounds", type=int, default=10, help="of one run")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each arm")
    parser.add_argument("--cores", type=int, default=cores, help="shared by an arm's processes; default: all")
    parser.add_argument("--out", type=Path, help="takes the rows as JSON")
    parser.add_argument("--table", type=Path, help="Markdown file whose section is replaced; default: print")
    return parser.parse_args()


def main() -> None:
    make_readable()
    args = arguments()
    pythons, missing = find_rivals(args.rival_python)
    print(*missing, sep="\n")
    arms = [arm for arm in ARMS if arm.key in args.arms and (arm.system not in INSTALL or arm.system in pythons)]
    rows: list[Row] = []
    for model in args.models:
        task = FederatedTask(model, args.data_dir.resolve(), args.rounds)
        bench = Bench(task, args.work.resolve() / model, args.cores, pythons)
        rows += bench.rows(arms, args.repetitions)
        if args.out:  # what is measured is kept, also if a later network fails
            args.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    rivals = " ".join(f"--rival-python {name}=..." for name in pythons)
    command = (
        f"python benchmarks/speed/bench_rounds.py --data-dir DIR --work DIR --models {' '.join(args.models)} {rivals}"
    )
    section = table(rows, task, missing, command.strip())
    if args.table:
        replace_section(args.table, TITLE, section)
    print(section)


if __name__ == "__main__":
    main()
