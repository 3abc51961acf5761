"""`fedq sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fedq.errors import FieldError
from fedq.files import replace_file
from fedq.report.page import write_report
from fedq.sweep.plan import Check, Plan, read_plan
from fedq.sweep.runner import run_tasks
from fedq.sweep.table import finished_runs, markdown


def main(argv: Sequence[str], program: str, check: Check) -> int:
    """Run arms x seeds from a YAML file, each as a job of its own, and compare them: `fedq sweep PLAN.yaml --out DIR`.

    What is finished is not run again, what was interrupted goes on. Flags after -- go to every run.
    """
    given = _parse(argv, program)
    plan = read_plan(given.plan, lambda flags: check([*flags, *given.extra]))
    if given.count or given.task is not None:
        print(len(plan.tasks) if given.count else _task_lines(plan, given.task))
        return 0
    failed = 0
    if not given.compare:
        failed = len(run_tasks(plan, given.out, extra=given.extra, workers=given.workers))
    _compare(plan, given.out, given.plan)
    return 1 if failed else 0


def _parse(argv: Sequence[str], program: str) -> argparse.Namespace:
    own, extra = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, extra = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(prog=program, description=main.__doc__)
    parser.add_argument("plan", type=Path, help="YAML: title, arms (name: flags), common flags, seeds, ranks")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="where the runs' folders and report/ go")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("--compare", action="store_true", help="run nothing, compare what is finished")
    parser.add_argument("--task", type=int, help="run nothing, print the n-th run's folder and its flags (SLURM)")
    parser.add_argument("--count", action="store_true", help="run nothing, print the number of runs (SLURM)")
    given = parser.parse_args(own)
    if given.workers < 1:
        raise FieldError("workers", given.workers, "1 or more")
    given.extra = extra
    return given


def _task_lines(plan: Plan, number: int) -> str:
    tasks = plan.tasks
    if not 0 <= number < len(tasks):
        raise FieldError("task", number, f"0 to {len(tasks) - 1}: {len(tasks)} runs")
    return "\n".join([tasks[number].folder, *tasks[number].flags])


def _compare(plan: Plan, out: Path, path: Path) -> None:
    """Write table and report of what is finished, and print the table."""
    results = finished_runs(plan, out)
    if not results:
        raise FieldError("out", str(out), "a folder with at least one finished run of the plan")
    text = markdown(plan, results, command=f"fedq sweep {path.name} --out {out}")
    replace_file(out / "comparison.md", text.encode())
    print(text)
    folders = [out / task.folder for task in plan.tasks if (out / task.folder).exists()]
    write_report(folders, out / "report", title=plan.title)
    print(f"comparison {out / 'comparison.md'}\nreport     {out / 'report' / 'report.html'}")
