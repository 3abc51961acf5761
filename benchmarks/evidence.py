"""Run arms x seeds from one YAML file, each as a job of its own, and write the table that compares them.

    python benchmarks/evidence.py benchmarks/cifar_codecs.yaml --data-dir DIR --work DIR --table docs/results.md

An arm that has a summary already is not run again and one that was interrupted is resumed. Differences to
the first arm are paired by seed; their 95 % interval is Student's t. The table replaces the section of the same title.

``budgets_mb`` in a plan adds a column for each: the best validation accuracy that a run had reached when its uplink had
carried that many megabytes ("-": not one evaluation fits). It is the reading at equal megabytes, the others are at
equal rounds. ``--workers 2`` runs two jobs side by side.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
    budgets_mb: list[float] = field(default_factory=list)

    def flags(self, arm: str, seed: int) -> str:
        return f"{self.common} {self.arms[arm]} --seed {seed}"

    def command(self, arm: str) -> str:
        launcher = "python" if self.ranks == 1 else f"torchrun --nproc-per-node {self.ranks}"
        return f"{launcher} train.py {self.common} {self.arms[arm]}"


def run_job(plan: Plan, arm: str, seed: int, work: Path, data_dir: Path) -> dict[str, Any]:
    """Run one job unless its summary exists; return the summary."""
    out = work / f"{re.sub(r'[^A-Za-z0-9]+', '-', arm)}-seed{seed}"
    summary = out / "summary.json"
    if not summary.exists():
        launcher = [sys.executable]
        if plan.ranks > 1:
            launcher += f"-m torch.distributed.run --standalone --nproc-per-node {plan.ranks}".split()
        flags = [*shlex.split(plan.flags(arm, seed)), "--data-dir", str(data_dir), "--out", str(out)]
        if (out / "config.yaml").exists():  # begun before, and interrupted
            if "--exchange none" in plan.flags(arm, seed):  # has no checkpoints
                shutil.rmtree(out)
            else:
                flags = ["--resume", str(out)]
        begin = time.time()
        subprocess.run([*launcher, str(ROOT / "train.py"), *flags], check=True, stdout=subprocess.DEVNULL)
        print(f"{arm}, seed {seed}: {time.time() - begin:.0f} s", flush=True)
    result: dict[str, Any] = json.loads(summary.read_text())
    result["metrics"] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return result


def within_budget(run: dict[str, Any], megabytes: float) -> float | None:
    """Return the best validation accuracy that the run reached within so many megabytes up."""
    reached = [
        r["val_accuracy"] for r in run["metrics"] if "val_accuracy" in r and r["uplink_bytes"] <= megabytes * 1e6
    ]
    return max(reached, default=None)


def budget_cell(runs: list[dict[str, Any]], megabytes: float) -> str:
    reached = [within_budget(run, megabytes) for run in runs]
    known = [100 * r for r in reached if r is not None]
    return f"{np.mean(known):.1f}" if len(known) == len(runs) else "-"


def interval(differences: np.ndarray) -> str:
    """Return the mean of paired differences, in points, with its 95 % interval."""
    mean = float(differences.mean())
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return f"{mean:+.2f} ± {half:.2f}"


def row(arm: str, runs: list[dict[str, Any]], baseline: list[dict[str, Any]], budgets_mb: list[float]) -> str:
    accuracy = 100 * np.array([r["test_accuracy"] for r in runs])
    reference = 100 * np.array([r["test_accuracy"] for r in baseline])
    spread = f" ± {accuracy.std(ddof=1):.2f}" if len(runs) > 1 else ""
    versus = "" if runs is baseline else interval(accuracy - reference)
    seconds = np.mean([r["seconds"] for r in runs])
    cells = [
        arm,
        f"{accuracy.mean():.2f}{spread}",
        versus,
        *_bytes_cells(runs),
        f"{seconds:.0f}",
        *(budget_cell(runs, megabytes) for megabytes in budgets_mb),
    ]
    return "| " + " | ".join(cells) + " |"


def _bytes_cells(runs: list[dict[str, Any]]) -> list[str]:
    if runs[0].get("exchange") == "none":
        return []
    up, down = (np.mean([r[f"{d}_bytes"] for r in runs]) / 1e6 for d in ("uplink", "downlink"))
    ratios = [r["uplink_bytes_fp32"] / r["uplink_bytes"] for r in runs if r["uplink_bytes"]]
    return [f"{up:.1f}", f"{np.mean(ratios):.1f}x" if ratios else "-", f"{down:.1f}"]  # "-": nothing is sent


def _set_up(head: dict[str, Any]) -> str:
    if head["exchange"] == "step":
        return f"{head['rounds']} epochs, {head['precision']}"
    if head["exchange"] == "none" and head["num_clients"] == 1:
        return f"trained centrally, {head['rounds']} epochs, {head['precision']}"
    clients = f"{head['num_clients']} clients ({head['partition']}), {head['cohort']} a round"
    return f"{clients}, {head['rounds']} rounds, {head['precision']}, server {head['server']}"


def table(plan: Plan, results: dict[str, list[dict[str, Any]]], data_note: str, command: str) -> str:
    """Return the section: what was run, the table, and every arm's command."""
    first = next(iter(results.values()))
    spent = sum(r["seconds"] for runs in results.values() for r in runs) / 60
    head = first[0]
    data = re.sub(r" from [/~][^:]*", data_note and f" ({data_note})", head["dataset"])  # no machine's paths
    commits = sorted({(r["git_commit"] or "unknown")[:10] for runs in results.values() for r in runs})
    ranks = "rank" if head["world_size"] == 1 else "ranks"
    columns = [
        "arm",
        "test accuracy, %",
        "difference to the first arm (95 %)",
        *(["MB up", "float32 / up", "MB down"] if head["exchange"] != "none" else []),
        "s",
        *(f"val. % within {megabytes:g} MB up" for megabytes in plan.budgets_mb),
    ]
    lines = [
        f"## {plan.title}",
        "",
        f"{plan.note}",
        "",
        f"{data}. {head['model']} ({head['num_params']:,} parameters), {_set_up(head)}; "
        f"{head['world_size']} {ranks} on {head['cpu']}, torch {head['versions']['torch']}, commit "
        f"{', '.join(commits)}; seeds {', '.join(map(str, plan.seeds))}; {spent:.0f} minutes in all. Differences are "
        f"paired by seed.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *(row(arm, runs, first, plan.budgets_mb) for arm, runs in results.items()),
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
    """Put a section in place of the one with the same title, or at the end; what a person wrote about it stays."""
    text = path.read_text() if path.exists() else "# Results\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.M | re.S)
    old = pattern.search(text)
    comment = re.search(r"^What it says:\n.*?(?=^Re-made by)", old[0], re.M | re.S) if old else None
    if comment:
        section = section.replace("Re-made by", comment[0] + "Re-made by", 1)
    new = pattern.sub(lambda _: section + "\n", text) if old else text.rstrip() + "\n\n" + section
    path.write_text(new.rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the runs' folders go")
    parser.add_argument("--data-note", default="", help="what a reader must know of these files, e.g. JPEG quality")
    parser.add_argument("--workers", type=int, default=1, help="jobs side by side")
    parser.add_argument("--table", type=Path, help="Markdown file whose section is replaced; default: print")
    args = parser.parse_args()
    plan = Plan(**yaml.safe_load(args.plan.read_text()))
    # Seeds outside: an interrupted table has every arm of the seeds it has.
    jobs = [(arm, seed) for seed in plan.seeds for arm in plan.arms]
    with ThreadPoolExecutor(args.workers) as pool:
        runs = list(pool.map(lambda job: run_job(plan, job[0], job[1], args.work, args.data_dir), jobs))
    results = {arm: [run for job, run in zip(jobs, runs, strict=True) if job[0] == arm] for arm in plan.arms}
    command = f"python benchmarks/evidence.py {args.plan.name} --data-dir DIR --work DIR --table docs/results.md"
    section = table(plan, results, args.data_note, command.replace(args.plan.name, f"benchmarks/{args.plan.name}"))
    if args.table:
        replace_section(args.table, plan.title, section)
    else:
        print(section)


if __name__ == "__main__":
    main()
