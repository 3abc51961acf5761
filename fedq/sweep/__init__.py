"""Arms x seeds from one YAML file: runs, resumable, and one comparison of them."""

from fedq.sweep.plan import Plan, Task, read_plan
from fedq.sweep.runner import run_tasks
from fedq.sweep.table import finished_runs, markdown

__all__ = ["Plan", "Task", "finished_runs", "markdown", "read_plan", "run_tasks"]
