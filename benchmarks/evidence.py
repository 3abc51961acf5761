"""Run arms x seeds from one YAML file, each as a job of its own, and write the table that compares them.

    python benchmarks/evidence.py benchmarks/cifar_codecs.yaml --data-dir DIR --work DIR --table docs/results.md

An arm that has a summary already is not run again, so an interrupted table goes on where it stopped. Differences to
the first arm are paired by seed; their 95 % interval is Student's t. The table replaces the section of the same title.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Plan:
    """What to run: flags of every job, flags of each arm, and the seeds."""

    title: str
    note: str
    ranks: int
    common: str
    arms: dict[str, str]
    seeds: list[int]

    def flags(self, arm: str, seed: int) -> str:
        return f"{self.common} {self.arms[arm]} --seed {seed}"

    def command(self, arm: str) -> str:
        return f"torchrun --nproc-per-node {self.ranks} train.py {self.common} {self.arms[arm]}"


def run_job(plan: Plan, arm: str, seed: int, work: Path, data_dir: Path) -> dict[str, Any]:
    """Run one job unless its summary exists; return the summary."""
    out = work / f"{re.sub(r'[^A-Za-z0-9]+', '-', arm)}-seed{seed}"
    summary = out / "summary.json"
    if not summary.exists():
        launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {plan.ranks}".split()
        flags = [*shlex.split(plan.flags(arm, seed)), "--data-dir", str(data_dir), "--out", str(out)]
        begin = time.time()
        subprocess.run([*launcher, str(ROOT / "train.py"), *flags], check=True, stdout=subprocess.DEVNULL)
        print(f"{arm}, seed {seed}: {time.time() - begin:.0f} s", flush=True)
    result: dict[str, Any] = json.loads(summary.read_text())
    return result


def interval(differences: np.ndarray) -> str:
    """Return the mean of paired differences, in points, with its 95 % interval."""
    mean = float(differences.mean())
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return f"{mean:+.2f} ± {half:.2f}"


def row(arm: str, runs: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> str:
    accuracy = 100 * np.array([r["test_accuracy"] for r in runs])
    reference = 100 * np.array([r["test_accuracy"] for r in baseline])
    spread = f" ± {accuracy.std(ddof=1):.2f}" if len(runs) > 1 else ""
    versus = "" if runs is baseline else interval(accuracy - reference)
    up, down = (np.mean([r[f"{d}_bytes"] for r in runs]) / 1e6 for d in ("uplink", "downlink"))
    ratio = np.mean([r["uplink_bytes_fp32"] / r["uplink_bytes"] for r in runs])
    seconds = np.mean([r["seconds"] for r in runs])
    cells = [
        arm,
        f"{accuracy.mean():.2f}{spread}",
        versus,
        f"{up:.1f}",
        f"{ratio:.1f}x",
        f"{down:.1f}",
        f"{seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(plan: Plan, results: dict[str, list[dict[str, Any]]], data_note: str, command: str) -> str:
    """Return the section: what was run, the table, and every arm's command."""
    first = next(iter(results.values()))
    spent = sum(r["seconds"] for runs in results.values() for r in runs) / 60
    head = first[0]
    data = re.sub(r" from [/~][^:]*", data_note and f" ({data_note})", head["dataset"])  # no machine's paths
    commits = sorted({(r["git_commit"] or "unknown")[:10] for runs in results.values() for r in runs})
    lines = [
        f"## {plan.title}",
        "",
        f"{plan.note}",
        "",
        f"{data}. {head['model']} ({head['num_params']:,} parameters), {head['num_clients']} clients "
        f"({head['partition']}), {head['cohort']} a round, {head['rounds']} rounds, {head['precision']}, server "
        f"{head['server']}; {head['world_size']} ranks on {head['cpu']}, torch {head['versions']['torch']}, commit "
        f"{', '.join(commits)}; seeds {', '.join(map(str, plan.seeds))}; {spent:.0f} minutes in all. Differences are "
        f"paired by seed.",
        "",
        "| arm | test accuracy, % | difference to the first arm (95 %) | MB up | float32 / up | MB down | s |",
        "|---|---|---|---|---|---|---|",
        *(row(arm, runs, first) for arm, runs in results.items()),
        "",
        f"Re-made by `{command}`; one arm by itself:",
        "",
        "```",
        *(f"{plan.command(arm)}    # {arm}" for arm in results),
        "```",
        "",
    ]
    return "\n".join(lines)


def replace_section(path: Path, title: str, section: str) -> None:
    """Put a section in place of the one with the same title, or at the end."""
    text = path.read_text() if path.exists() else "# Results\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.M | re.S)
    new = pattern.sub(lambda _: section + "\n", text) if pattern.search(text) else text.rstrip() + "\n\n" + section
    path.write_text(new.rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the runs' folders go")
    parser.add_argument("--data-note", default="", help="what a reader must know of these files, e.g. JPEG quality")
    parser.add_argument("--table", type=Path, help="Markdown file whose section is replaced; default: print")
    args = parser.parse_args()
    plan = Plan(**yaml.safe_load(args.plan.read_text()))
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in plan.arms}
    for seed in plan.seeds:  # seeds outside: an interrupted table has every arm of the seeds it has
        for arm in plan.arms:
            results[arm].append(run_job(plan, arm, seed, args.work, args.data_dir))
    command = f"python benchmarks/evidence.py {args.plan.name} --data-dir DIR --work DIR --table docs/results.md"
    section = table(plan, results, args.data_note, command.replace(args.plan.name, f"benchmarks/{args.plan.name}"))
    if args.table:
        replace_section(args.table, plan.title, section)
    else:
        print(section)


if __name__ == "__main__":
    main()
