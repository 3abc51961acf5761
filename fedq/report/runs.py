"""Which runs there are and how far each of them is, from their folders alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedq.errors import FieldError
from fedq.report.metric import ACCURACY, Measure, measure_of
from fedq.text import human_bytes


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Args:
        path: The run's folder.
        state: ``finished``, ``unfinished`` (stopped, or still running), ``not started`` (no round finished) or
            ``unreadable``.
        rounds: Number of rounds finished.
        total_rounds: Number of rounds asked for; None if it is not known.
        result: Test accuracy if finished, otherwise the last validation accuracy; of a run on data of one's own the
            last value of its first metric.
        uplink_bytes: Payload bytes of the uplink so far; None if they are not known.
        note: The problem, or what to do next.
        measure: The measure that the result is of.
    """

    path: Path
    state: str
    rounds: int = 0
    total_rounds: int | None = None
    result: float | None = None
    uplink_bytes: int | None = None
    note: str = ""
    measure: Measure = ACCURACY


def find_runs(paths: Sequence[Path]) -> list[RunStatus]:
    """Return the status of each folder that is a run, and of the runs directly inside those that are not.

    Raises:
        FieldError: A folder does not exist, or holds no run.
    """
    runs: list[RunStatus] = []
    for path in paths:
        if not path.is_dir():
            raise FieldError("runs", str(path), "a folder that exists")
        folders = [path] if _is_run(path) else sorted(p for p in path.iterdir() if p.is_dir() and _is_run(p))
        if not folders:
            raise FieldError("runs", str(path), "a run's folder, or one that holds some")
        runs += [run_status(folder) for folder in folders]
    return runs


def run_status(path: Path) -> RunStatus:
    """Return how far one run is."""
    try:
        settings = _settings(path)
        total = int(settings["run"]["rounds"])
        if (path / "summary.json").exists():
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            measure, rounds, sent = measure_of(summary), summary["rounds"], summary["uplink_bytes"]
            return RunStatus(path, "finished", rounds, total, measure.last(summary), sent, measure=measure)
        rows, measure = _metrics(path), measure_of(settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return RunStatus(path, "unreadable", note=f"{type(error).__name__}: {error}")
    has_checkpoints = settings.get("exchange", {}).get("exchange") != "none"
    note = measure.to_go_on(path) if has_checkpoints else "start it again: --exchange none has no checkpoints"
    if not rows:
        return RunStatus(path, "not started", 0, total, note=note, measure=measure)
    last, sent = measure.last_row(rows), rows[-1].get("uplink_bytes")
    return RunStatus(path, "unfinished", rows[-1]["round"] + 1, total, last, sent, note, measure)


def print_runs(runs: Sequence[RunStatus]) -> None:
    """Print one line a run."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    measures = {run.measure: escape(run.measure.metric.name) for run in runs if run.state != "unreadable"}
    heading = "result" if len(measures) > 1 else next(iter(measures.values()), ACCURACY.metric.name)
    table = Table("run", "state", "rounds", heading, "uplink", "", box=None, pad_edge=False)
    for run in runs:
        result = escape(run.measure.text(run.measure.shown(run.result)))
        if len(measures) > 1 and run.result is not None:
            result = f"{measures[run.measure]} {result}"
        uplink = "-" if run.uplink_bytes is None else human_bytes(run.uplink_bytes)
        rounds = f"{run.rounds}/{run.total_rounds or '-'}"
        table.add_row(str(run.path), run.state, rounds, result, uplink, run.note)
    console.print(table)


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").exists() or (path / "summary.json").exists()


def _settings(path: Path) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config.yaml: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError("config.yaml: no settings")
    return settings


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a last line that was cut off by a kill is left out."""
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
