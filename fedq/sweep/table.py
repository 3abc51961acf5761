"""The table that compares a sweep's arms: mean and spread over seeds, paired differences, bytes, seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from fedq.errors import FieldError
from fedq.report import read_summary
from fedq.sweep.plan import Plan


def finished_runs(plan: Plan, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the summaries of the runs that are finished, by arm and in the order of seeds, with their ``metrics``."""
    found: dict[str, list[dict[str, Any]]] = {}
    for task in plan.tasks:
        folder = out / task.folder
        try:
            summary = read_summary(folder)
        except FieldError:
            continue
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found.setdefault(task.arm, []).append(summary | {"metrics": [json.loads(line) for line in lines]})
    return {arm: found[arm] for arm in plan.arms if arm in found}


def _within_budget(run: dict[str, Any], megabytes: float) -> float | None:
    """Return the best validation accuracy that the run reached within so many megabytes up."""
    reached = [
        r["val_accuracy"] for r in run["metrics"] if "val_accuracy" in r and r["uplink_bytes"] <= megabytes * 1e6
    ]
    return max(reached, default=None)


def _budget_cell(runs: list[dict[str, Any]], megabytes: float) -> str:
    reached = [_within_budget(run, megabytes) for run in runs]
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
    """Return an arm's line.

    Args:
        arm: Name of the arm.
        runs: Results of the arm's finished runs.
        baseline: Results of the first arm's runs; differences are over the seeds that both have.
        budgets_mb: Megabytes of uplink at which accuracies are compared, see `Plan`.
    """
    accuracy = 100 * np.array([r["test_accuracy"] for r in runs])
    spread = f" ± {accuracy.std(ddof=1):.2f}" if len(runs) > 1 else ""
    reference = {r["seed"]: r["test_accuracy"] for r in baseline}
    pairs = [100 * (r["test_accuracy"] - reference[r["seed"]]) for r in runs if r["seed"] in reference]
    versus = interval(np.array(pairs)) if pairs and runs is not baseline else ""
    seconds = np.mean([r["seconds"] for r in runs])
    cells = [
        arm,
        f"{accuracy.mean():.2f}{spread}",
        versus,
        *_bytes_cells(runs),
        f"{seconds:.0f}",
        *(_budget_cell(runs, megabytes) for megabytes in budgets_mb),
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


def markdown(plan: Plan, results: dict[str, list[dict[str, Any]]], *, data_note: str = "", command: str) -> str:
    """Return a section of Markdown: what was run, a line for each arm, and every arm's command.

    Args:
        plan: The sweep.
        results: Results by arm, as `finished_runs` returned them, with at least one run.
        data_note: Text on the images that a reader must know, in place of their folder; may be empty.
        command: Command that makes the section again.
    """
    baseline = results.get(next(iter(plan.arms)), [])
    spent = sum(r["seconds"] for runs in results.values() for r in runs) / 60
    head = next(iter(results.values()))[0]
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
        *_unfinished(plan, results),
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *(row(arm, runs, baseline, plan.budgets_mb) for arm, runs in results.items()),
        "",
        f"Re-made by `{command}`; one arm by itself:",
        "",
        "```",
        *(f"{plan.command(arm)}    # {arm}" for arm in results),
        "```",
        "",
    ]
    return "\n".join(lines)


def _unfinished(plan: Plan, results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a line that says which runs are not there, if any."""
    num = len(plan.tasks)
    done = sum(map(len, results.values()))
    return [] if done == num else [f"Only {done} of {num} runs are finished."]
